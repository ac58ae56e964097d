"""Small networks that make latents, and what they take."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from meduet_fast.models.transformer3d import MeDUETTransformer3D
from meduet_fast.models.unet3d import MeDUETUNet3D

SIZES: dict[str, Any] = {
    "in_channels": 3, "sample_size": (4, 6, 2), "content_dim": 12, "style_dim": 5, "content_projection": 4,
    "latents_mean": (0.0,) * 3, "latents_std": (1.0,) * 3,
}  # fmt: skip
TRANSFORMER: dict[str, Any] = {"patch_size": 2, "hidden_size": 12, "depth": 3, "num_heads": 2}
UNET: dict[str, Any] = {
    "num_channels": (8, 16), "num_res_blocks": 1, "attention_levels": (False, True), "num_heads": 2,
    "norm_num_groups": 4, "features_patch": 2,
}  # fmt: skip
NETWORKS: dict[str, tuple[type[nn.Module], dict[str, Any]]] = {
    "transformer pooled": (MeDUETTransformer3D, TRANSFORMER),
    "transformer tokens": (
        MeDUETTransformer3D, {**TRANSFORMER, "content": "tokens", "qk_norm": True, "gelu": "exact"}
    ),
    "U-Net pooled": (MeDUETUNet3D, UNET),
    "U-Net tokens": (MeDUETUNet3D, {**UNET, "content": "tokens"}),
    "U-Net of patches": (
        MeDUETUNet3D, {**UNET, "patch_size": 2, "num_channels": (8,), "attention_levels": (True,)}
    ),
}  # fmt: skip
TRANSFORMERS = [name for name in NETWORKS if name.startswith("transformer")]
INPUTS = ("sample", "timestep", "content", "style", "content_dropped", "style_dropped")


def network(name: str, started: bool = True) -> Any:
    """Build one; other than it starts if ``started``, when zeros would hide most of it."""
    torch.manual_seed(0)
    kind, own = NETWORKS[name]
    model: Any = kind(**SIZES, **own)
    for key, parameter in model.named_parameters() if started else ():
        nn.init.normal_(parameter, 0.5 * key.endswith("temperature"), 0.1 if parameter.dim() == 1 else 0.3)
    if model.device.type == "cpu":
        model.set_statistics(torch.randn(12), torch.rand(12) + 0.5, torch.randn(5), torch.rand(5) + 0.5)
    return model


def inputs(name: str, batch: int = 3, size: tuple[int, ...] = (4, 6, 2)) -> list[Tensor]:
    """Draw what a pass takes; the second of three rows has no content, the first no style."""
    randn = partial(torch.randn, generator=torch.Generator().manual_seed(1))
    content = (batch, *(edge // 2 for edge in size), 12) if "tokens" in name else (batch, 12)
    rows = torch.arange(batch) % 3
    times = 1000 * torch.linspace(0.1, 1, batch)
    return [randn(batch, 3, *size), times, randn(*content), randn(batch, 5), rows == 1, rows == 0]
