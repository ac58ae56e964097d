"""MONAI's models before and after ``accelerate``."""

from __future__ import annotations

import copy
import sys
from typing import Any

import pytest
import torch
from monai.apps.generation.maisi.networks.autoencoderkl_maisi import (
    AutoencoderKlMaisi,
    MaisiGroupNorm3D,
    MaisiResBlock,
)
from monai.data import MetaTensor
from monai.networks.blocks import PatchEmbeddingBlock
from monai.networks.nets.autoencoderkl import AEKLResBlock
from monai.networks.nets.diffusion_model_unet import DiffusionModelUNet, DiffusionUNetResnetBlock
from monai.networks.nets.swin_unetr import SwinTransformer, WindowAttention
from torch import nn

from meduet_fast.layers import accelerate, restore

from .test_accelerate import outputs, require_same

DOUBLE = torch.float64
VIT = {"in_channels": 2, "img_size": (4, 6, 4), "patch_size": 2, "hidden_size": 12, "num_heads": 2}


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=DOUBLE)


def fill_zeros(model: nn.Module) -> nn.Module:
    """Parameters that start as zeros would hide differences."""
    for parameter in model.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    return model


@pytest.mark.parametrize("proj_type", ["conv", "perceptron"])
@pytest.mark.parametrize("pos_embed_type", ["none", "learnable", "sincos"])
def test_patch_embedding(proj_type: str, pos_embed_type: str) -> None:
    if proj_type == "perceptron":
        pytest.importorskip("einops")
    options = {**VIT, "proj_type": proj_type, "pos_embed_type": pos_embed_type}
    block = PatchEmbeddingBlock(**options, dropout_rate=0.5).double().eval()  # type: ignore[arg-type]
    fused = require_same(block, (randn(2, 2, 4, 6, 4),))
    assert len(accelerate(copy.deepcopy(block))) == 1  # the convolution inside needs no swap of its own
    fused.train()
    assert (fused(randn(2, 2, 4, 6, 4)) == 0).any()
    x = torch.randn(2, 2, 4, 6, 4)
    with torch.autocast("cpu", torch.bfloat16):  # positions stay float32, and so does the sum
        assert fused.float()(x).dtype == block.float()(x).dtype == torch.float32


def test_patch_embedding_leaves_out_the_remainder_and_two_dimensions() -> None:
    block = PatchEmbeddingBlock(**{**VIT, "img_size": (5, 6, 5)}, proj_type="conv").double()  # type: ignore[arg-type]
    require_same(block, (randn(1, 2, 5, 6, 5),))
    flat = PatchEmbeddingBlock(2, 4, 2, 12, 2, proj_type="conv", spatial_dims=2)
    assert accelerate(flat) == []


@pytest.mark.parametrize("proj_type", ["conv", "perceptron"])
def test_vit(proj_type: str) -> None:
    pytest.importorskip("einops")
    from monai.networks.nets import ViT

    model = ViT(**VIT, mlp_dim=24, num_layers=2, proj_type=proj_type, classification=True)  # type: ignore[arg-type]
    fused = require_same(model.double(), (randn(2, 2, 4, 6, 4),))
    x = randn(2, 2, 4, 6, 4)
    compiled = torch.compile(fused.eval(), fullgraph=True)
    assert torch.allclose(compiled(x)[0], model.eval()(x)[0])


def test_unetr_and_masked_autoencoder() -> None:
    pytest.importorskip("einops")
    from monai.networks.nets import UNETR, MaskedAutoEncoderViT

    unetr = UNETR(1, 2, (16, 16, 16), feature_size=2, hidden_size=12, mlp_dim=24, num_heads=2)
    require_same(unetr.double(), (randn(1, 1, 16, 16, 16),))
    masked = MaskedAutoEncoderViT(
        1, 4, 2, hidden_size=12, mlp_dim=24, num_layers=1, num_heads=2, decoder_hidden_size=12,
        decoder_mlp_dim=24, decoder_num_layers=1, decoder_num_heads=2,
    )  # fmt: skip
    require_same(masked.double(), (randn(2, 1, 4, 4, 4),))


ATTENTION: list[dict[str, Any]] = [
    {}, {"qkv_bias": True, "dim_head": 8}, {"use_combined_linear": False}, {"include_fc": False},
    {"causal": True, "sequence_length": 7}, {"hidden_input_size": 6, "use_combined_linear": False},
]  # fmt: skip


@pytest.mark.parametrize("options", ATTENTION, ids=str)
def test_self_attention(options: dict[str, Any]) -> None:
    pytest.importorskip("einops")
    from monai.networks.blocks.selfattention import SABlock

    block = SABlock(12, 3, dropout_rate=0.5, **options).double().eval()
    x = randn(2, 5, options.get("hidden_input_size", 12))
    fused = require_same(block, (x,))
    mask = torch.tensor([[1, 1, 0, 1, 0], [1, 1, 1, 1, 1]])
    if options.get("causal"):
        with pytest.raises(ValueError, match="attention masks"):
            fused(x, mask)
    else:
        assert torch.allclose(fused(x, mask), block(x, mask))
    # With dropout the mean over many draws is the same.
    fused.train()
    torch.manual_seed(0)
    mean = torch.stack([fused(x) for _ in range(400)]).mean(0)
    assert torch.allclose(mean, block(x), atol=0.3)


@pytest.mark.parametrize(
    "options",
    [
        {"save_attn": True}, {"use_flash_attention": True}, {"attention_dtype": torch.float32},
        {"rel_pos_embedding": "decomposed", "input_size": (2, 2, 2)},
    ],
    ids=str,
)  # fmt: skip
def test_attention_with_more_to_it_is_left_alone(options: dict[str, Any]) -> None:
    pytest.importorskip("einops")
    from monai.networks.blocks.selfattention import SABlock

    assert accelerate(SABlock(12, 3, **options)) == []


def test_attention_that_is_to_be_saved_later_is_saved() -> None:
    pytest.importorskip("einops")
    from monai.networks.blocks.selfattention import SABlock

    block = SABlock(12, 3)
    accelerate(block)
    block.save_attn = True
    block(torch.randn(1, 5, 12))
    assert block.att_mat.shape == (1, 3, 5, 5)


def test_cross_attention() -> None:
    pytest.importorskip("einops")
    from monai.networks.blocks.crossattention import CrossAttentionBlock

    block = CrossAttentionBlock(12, 3, context_input_size=6).double().eval()
    require_same(block, (randn(2, 5, 12), randn(2, 4, 6)))
    assert accelerate(CrossAttentionBlock(12, 3, save_attn=True)) == []


@pytest.mark.parametrize("bias", [True, False])
def test_window_attention(bias: bool) -> None:
    block = WindowAttention(12, 3, (2, 3, 2), qkv_bias=bias, attn_drop=0.5).double().eval()
    nn.init.normal_(block.relative_position_bias_table)
    shifted = torch.where(torch.rand(2, 12, 12) < 0.3, -100.0, 0.0).double()
    assert any(shifted.flatten())
    fused = require_same(block, (randn(6, 12, 12), shifted))  # three samples of two windows
    x = randn(2, 8, 12)  # smaller than the window
    assert torch.allclose(fused(x, None), block(x, None))
    fused.train()
    torch.manual_seed(0)
    mean = torch.stack([fused(x, None) for _ in range(400)]).mean(0)
    assert torch.allclose(mean, block(x, None), atol=0.3)
    with torch.autocast("cpu", torch.bfloat16):
        narrow = fused.float().eval()(x.float(), None)
    assert narrow.dtype == torch.bfloat16
    assert torch.allclose(narrow.double(), block.double()(x, None), atol=0.05)
    assert len(restore(fused)) == 1
    assert type(fused) is WindowAttention


def test_swin_transformer() -> None:
    model = SwinTransformer(
        in_chans=1, embed_dim=4, window_size=(2, 2, 2), patch_size=(2, 2, 2), depths=(2, 1, 1, 1),
        num_heads=(2, 2, 2, 2), spatial_dims=3,
    )  # fmt: skip
    fused = require_same(model.double().eval(), (randn(2, 1, 16, 16, 16),))
    assert sum(type(module).__name__ == "FusedWindowAttention" for module in fused.modules()) == 5


@pytest.mark.parametrize("options", [{}, {"up": True}, {"down": True}, {"out_channels": 6}], ids=str)
def test_diffusion_residual_block(options: dict[str, Any]) -> None:
    block = DiffusionUNetResnetBlock(3, 4, 8, norm_num_groups=2, **options)
    require_same(fill_zeros(block).double(), (randn(2, 4, 2, 4, 2), randn(2, 8)))
    flat = DiffusionUNetResnetBlock(2, 4, 8, norm_num_groups=2)
    assert accelerate(flat) == []


def test_diffusion_unet() -> None:
    pytest.importorskip("einops")
    model = DiffusionModelUNet(
        spatial_dims=3, in_channels=2, out_channels=2, channels=(4, 8), attention_levels=(False, True),
        num_res_blocks=1, num_head_channels=4, norm_num_groups=4, with_conditioning=True,
        cross_attention_dim=6,
    )  # fmt: skip
    steps = torch.tensor([3, 700])
    fused = require_same(fill_zeros(model).double(), (randn(2, 2, 4, 4, 4), steps, randn(2, 3, 6)))
    names = {type(module).__name__ for module in fused.modules()}
    assert {"FusedSABlock", "FusedCrossAttentionBlock", "FusedDiffusionUNetResnetBlock"} <= names


def test_autoencoder_residual_block() -> None:
    require_same(AEKLResBlock(3, 4, 2, 1e-6, 6).double(), (randn(2, 4, 2, 3, 4),))
    require_same(AEKLResBlock(2, 4, 2, 1e-6, 4).double(), (randn(2, 4, 3, 4),))


def test_maisi_autoencoder() -> None:
    model = AutoencoderKlMaisi(
        spatial_dims=3, in_channels=1, out_channels=1, latent_channels=2, num_channels=(4, 8),
        num_res_blocks=(1, 1), norm_num_groups=2, norm_eps=1e-6, attention_levels=(False, False),
        with_encoder_nonlocal_attn=False, with_decoder_nonlocal_attn=False, use_checkpointing=False,
        use_convtranspose=False, norm_float16=False, num_splits=1, dim_split=1, save_mem=False,
    )  # fmt: skip
    x = torch.randn(1, 1, 8, 8, 8)
    fused = require_same(model, (x,), tolerance=1e-3)
    for before, after in zip(outputs(model, (x,)), outputs(fused, (x,)), strict=True):
        assert torch.allclose(before, after, atol=1e-5)
    with torch.no_grad():
        assert torch.allclose(fused.encode(MetaTensor(x))[0], model.encode(x)[0], atol=1e-5)


def test_maisi_options_that_are_left_alone() -> None:
    names = ("norm_float16", "print_info")
    for name in names:
        assert accelerate(MaisiGroupNorm3D(2, 4, **{name: True})) == []  # type: ignore[arg-type]
        assert accelerate(MaisiResBlock(3, 4, 2, 1e-6, 4, 1, 0, **{name: True})) == []  # type: ignore[arg-type]


def test_forward_mode_and_vmap_through_attention() -> None:
    options: dict[str, Any] = {
        "spatial_dims": 3, "in_channels": 1, "out_channels": 1, "channels": (4, 8), "num_res_blocks": 1,
        "attention_levels": (False, True), "num_head_channels": 4, "norm_num_groups": 4,
        "with_conditioning": True, "cross_attention_dim": 6, "transformer_num_layers": 1,
    }  # fmt: skip
    model = fill_zeros(DiffusionModelUNet(**options)).double().eval()
    faster = copy.deepcopy(model)
    accelerate(faster)
    x, tangent, context = randn(1, 1, 4, 4, 4), randn(1, 1, 4, 4, 4), randn(1, 2, 6)
    found = []
    for version in (model, faster):

        def run(x: torch.Tensor, version: nn.Module = version) -> torch.Tensor:
            return version(x, torch.tensor([5]), context)

        def energy(x: torch.Tensor) -> torch.Tensor:
            return run(x[None]).square().sum()

        along = torch.func.jvp(run, (x,), (tangent,))[1]
        found.append((along, torch.func.vmap(torch.func.grad(energy))(torch.cat([x, tangent]))))
    for before, after in zip(*found, strict=True):
        assert before.any()
        assert torch.allclose(before, after)
    restored = outputs(model, (x, torch.tensor([5]), context))
    assert len(restore(faster)) > 4
    assert all(map(torch.equal, restored, outputs(faster, (x, torch.tensor([5]), context))))


def test_a_library_that_is_too_old_is_named_and_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise ImportError(f"cannot import what {name} needs")

    monkeypatch.setattr(sys.modules["meduet_fast.layers.accelerate"], "import_module", missing)
    model = nn.Sequential(WindowAttention(24, 2, (2, 2, 2)), nn.Conv3d(2, 4, 2, 2))
    with pytest.warns(
        UserWarning, match=r"modules of monai [\d.]+ are left as they are: known are those of 1\.6"
    ):
        swaps = accelerate(model)
    assert [swap.before for swap in swaps] == ["torch.nn.modules.conv.Conv3d"]
