"""A task of training without a store: a table that has no rows, small networks, batches of noise."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from meduet_fast.synthesis.config import SynthesisConfig, TransformerConfig, UNetConfig

DIM, STYLE_DIM, WINDOW, GRID = 12, 6, (4, 6, 4), (2, 3, 2)
WIDTHS = {"content": DIM, "token": DIM, "style": STYLE_DIM, "style_token": STYLE_DIM}
CONFIG = SynthesisConfig(
    steps=4, content_projection=4, power_averages=(0.1,),
    transformer=TransformerConfig(patch_size=2, hidden_size=12, depth=1, num_heads=2, qk_norm=True),
    unet=UNetConfig(
        patch_size=2, num_channels=(12,), num_res_blocks=1, attention_levels=(True,), num_heads=2,
        norm_num_groups=4,
    ),
)  # fmt: skip
TABLE: Any = SimpleNamespace(
    window=WINDOW, patch=2, content=torch.empty(1, DIM), style=torch.empty(1, STYLE_DIM),
    latents_mean=torch.zeros(4), latents_deviation=torch.ones(4),
    **{
        f"{kind}_{what}": torch.ones(width)
        for kind, width in WIDTHS.items()
        for what in ("mean", "deviation")
    },
)  # fmt: skip


def made_up_batch(size: int, device: torch.device | str, seed: int = 0) -> dict[str, Tensor]:
    """Draw all that a batch of crops may have."""
    torch.manual_seed(seed)
    return {
        "latents": torch.randn(size, 4, *WINDOW, dtype=torch.bfloat16, device=device),
        "content": torch.randn(size, DIM, device=device),
        "style": torch.randn(size, STYLE_DIM, device=device),
        "content_map": torch.randn(size, *GRID, DIM, dtype=torch.bfloat16, device=device),
        "aligned_map": torch.randn(size, *GRID, DIM + STYLE_DIM, dtype=torch.bfloat16, device=device),
    }
