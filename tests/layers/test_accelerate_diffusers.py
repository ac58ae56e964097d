"""diffusers' models before and after ``accelerate``."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from meduet_fast.layers import accelerate, restore

from .test_accelerate import require_same

pytest.importorskip("diffusers", reason="diffusers is not installed (0.42 wants Python 3.11 or later)")

from diffusers.models.autoencoders.autoencoder_kl_cogvideox import CogVideoXResnetBlock3D
from diffusers.models.autoencoders.autoencoder_kl_hunyuan_video import HunyuanVideoResnetBlockCausal3D
from diffusers.models.autoencoders.autoencoder_kl_magvit import EasyAnimateResidualBlock3D
from diffusers.models.autoencoders.autoencoder_kl_mochi import MochiResnetBlock3D
from diffusers.models.resnet import ResnetBlock2D, TemporalConvLayer, TemporalResnetBlock
from diffusers.models.unets.unet_3d_condition import UNet3DConditionModel


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


class Block(nn.Module):
    """A block without what it gives or keeps for the frames of a later call, and some arguments fixed."""

    def __init__(self, block: nn.Module, **fixed: Any) -> None:
        super().__init__()
        self.block, self.fixed = block, fixed

    def forward(self, *inputs: Any) -> Tensor:
        for module in self.block.modules():
            if hasattr(module, "prev_features"):
                module.prev_features = None
        result = self.block(*inputs, **self.fixed)
        return result if isinstance(result, Tensor) else result[0]


RESNET = {"in_channels": 4, "groups": 2, "temb_channels": 6}
PLANE = {
    "as it is": {}, "wider": {"out_channels": 6, "groups_out": 3},
    "scale_shift": {"time_embedding_norm": "scale_shift"},
    "up": {"up": True}, "down": {"down": True}, "fir": {"down": True, "kernel": "fir"},
    "no time": {"temb_channels": None, "output_scale_factor": 2.0}, "time as given": {"skip_time_act": True},
}  # fmt: skip


@pytest.mark.parametrize("options", PLANE.values(), ids=PLANE)
def test_residual_block_of_slices(options: dict[str, Any]) -> None:
    block = ResnetBlock2D(**{**RESNET, **options}).double()
    timed = block.time_emb_proj is not None
    model, time = (Block(block), (randn(2, 6),)) if timed else (Block(block, temb=None), ())
    x = randn(2, 4, 4, 6)
    fused = require_same(model, (x, *time))
    last = x.contiguous(memory_format=torch.channels_last)
    assert torch.allclose(fused(last, *time), model(last, *time))
    assert restore(fused) == ["block"]


def test_scale_and_shift_are_part_of_the_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    block = ResnetBlock2D(**RESNET, time_embedding_norm="scale_shift").double()
    for norm in (block.norm1, block.norm2):
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    fused = require_same(Block(block), (randn(3, 4, 4, 6), randn(1, 6)))  # one time for all samples
    monkeypatch.setattr(nn.GroupNorm, "forward", None)  # not called
    fused(randn(3, 4, 4, 6), randn(3, 6))


VOLUME: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "time": (TemporalResnetBlock(32, 64, temb_channels=6), (2, 32, 3, 2, 2)),
    "magvit, by frames": (EasyAnimateResidualBlock3D(4, 6, norm_num_groups=2), (2, 4, 3, 4, 2)),
    "magvit": (
        EasyAnimateResidualBlock3D(4, 4, norm_num_groups=2, spatial_group_norm=False), (2, 4, 3, 4, 2),
    ),
    "hunyuan": (HunyuanVideoResnetBlockCausal3D(4, 6, groups=2), (2, 4, 3, 4, 2)),
    "cogvideox": (CogVideoXResnetBlock3D(4, 6, temb_channels=6, groups=2), (2, 4, 3, 4, 2)),
    "cogvideox, wide shortcut": (
        CogVideoXResnetBlock3D(4, 6, temb_channels=6, groups=2, conv_shortcut=True), (2, 4, 3, 4, 2),
    ),
    "mochi": (MochiResnetBlock3D(32), (2, 32, 10, 2, 2)),
    "convolutions along time": (TemporalConvLayer(4, 4, norm_num_groups=2), (6, 4, 4, 2)),
}  # fmt: skip


@pytest.mark.parametrize("name", VOLUME)
def test_residual_block_of_volumes(name: str) -> None:
    block, shape = VOLUME[name]
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.2)
    more = {"time": (randn(2, 3, 6),), "cogvideox": (randn(2, 6),)}.get(name.partition(",")[0], ())
    fixed = {"num_frames": 3} if isinstance(block, TemporalConvLayer) else {}
    model = Block(block.double(), **fixed)
    fused = require_same(model, (randn(*shape), *more))
    assert restore(fused)
    assert [type(module) for module in fused.modules()] == [type(module) for module in model.modules()]


def test_what_has_no_fused_form_is_left_alone() -> None:
    assert accelerate(ResnetBlock2D(**RESNET, non_linearity="gelu")) == []  # type: ignore[arg-type]
    assert accelerate(CogVideoXResnetBlock3D(4, groups=2, spatial_norm_dim=3)) == []


def test_hooks_within_a_block_are_called() -> None:
    block = MochiResnetBlock3D(32)
    accelerate(block)
    calls: list[str] = []
    block.norm1.norm_layer.register_forward_hook(lambda *_: calls.append("norm"))
    block(torch.randn(1, 32, 2, 2, 2))
    assert calls == ["norm"]


def test_unet_of_volumes() -> None:
    model = UNet3DConditionModel(
        sample_size=8, in_channels=2, out_channels=2, block_out_channels=(8, 16), layers_per_block=1,
        norm_num_groups=4, cross_attention_dim=8, attention_head_dim=4,
        down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
        up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
    )  # fmt: skip
    for parameter in model.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.1)

    sample = Block(model.double(), return_dict=False)
    fused = require_same(sample, (randn(1, 2, 3, 8, 8), torch.tensor([7]), randn(1, 3, 8)))
    names = {type(module).__name__ for module in fused.modules()}
    assert {"FusedResnetBlock2D", "FusedSequential"} <= names
    assert fused.block.config == model.config
