"""The U-Net that makes latents: its blocks beside their formulas, its context, its levels."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("diffusers", reason="diffusers is not installed")

from meduet_fast.layers import sincos_positions_3d
from meduet_fast.models.conditioning import Prediction
from meduet_fast.models.unet3d import ContextBlock, MeDUETUNet3D, ResidualBlock, Upsample
from meduet_fast.synthesis.diffusion import network_time, noisy, target

from .latent_networks import NETWORKS, SIZES, UNET, inputs, network


def started(block: torch.nn.Module) -> torch.nn.Module:
    torch.manual_seed(0)
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return block.double()


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


@pytest.mark.parametrize("name", [name for name in NETWORKS if name.startswith("U-Net")])
def test_blocks_start_as_what_they_skip(name: str) -> None:
    for block in network(name, started=False).transformer_blocks():
        if isinstance(block, ResidualBlock):
            x, time = torch.randn(2, block.conv1.in_channels, 2, 3, 4), torch.randn(2, 32)
            assert torch.equal(block(x, time, torch.randn(2, 32)), block.skip(x))
            assert not torch.equal(block.time(time), torch.zeros(2, sum(block.sizes)))
        else:
            x = torch.randn(2, block.norm1.normalized_shape[0], 2, 3, 4)
            assert torch.equal(block(x, torch.randn(2, 5, 32), None), x)


def test_a_residual_block_is_its_formula() -> None:
    block = started(ResidualBlock(8, 12, 6, 4))
    x, time, style = randn(3, 8, 2, 3, 4), randn(3, 6), randn(3, 6)

    def linear(name: str, value: Tensor) -> Tensor:
        layer = getattr(block, name)
        return value @ layer.weight.T + layer.bias

    def normed(h: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        groups = h.reshape(3, 4, -1)
        centred = groups - groups.mean(-1, keepdim=True)
        h = (centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()).reshape(h.shape)
        h = h * (1 + scale)[:, :, None, None, None] + shift[:, :, None, None, None]
        return h / (1 + torch.exp(-h))

    ab = linear("time", time / (1 + torch.exp(-time))) + linear("style", style)
    h = F.conv3d(normed(x, ab[:, :8], ab[:, 8:16]), block.conv1.weight, block.conv1.bias, padding=1)
    h = F.conv3d(normed(h, ab[:, 16:28], ab[:, 28:]), block.conv2.weight, block.conv2.bias, padding=1)
    skip = torch.einsum("bkxyz,ok->boxyz", x, block.skip.weight.flatten(1)) + block.skip.bias.view(
        -1, 1, 1, 1
    )
    torch.testing.assert_close(block(x, time, style), skip + h)


@pytest.mark.parametrize("size", [(3, 4, 2), (1, 1, 1)])
def test_upsampling_repeats_voxels_and_convolves(size: tuple[int, int, int]) -> None:
    block, x = started(Upsample(6)), randn(2, 6, *size).requires_grad_()
    repeated = F.interpolate(x, scale_factor=2.0, mode="nearest")
    inputs = [x, *block.parameters()]
    outputs = [block.conv(repeated), block(x)]
    torch.testing.assert_close(outputs[1], outputs[0])
    weight = torch.randn_like(outputs[0])
    expected, found = (torch.autograd.grad((out * weight).sum(), inputs) for out in outputs)
    torch.testing.assert_close(found, expected)


def test_cross_attention_is_its_formula() -> None:
    block = started(ContextBlock(8, 6, 2))
    x, context = randn(3, 5, 8), randn(3, 4, 6)
    cross = block.cross
    q, kv = cross.to_q(x), cross.to_kv(context)
    heads = []
    for head in (slice(0, 4), slice(4, 8)):
        key, value = kv[..., :8][..., head], kv[..., 8:][..., head]
        weights = torch.exp(q[..., head] @ key.transpose(1, 2) / math.sqrt(4))
        heads.append(weights / weights.sum(-1, keepdim=True) @ value)
    torch.testing.assert_close(cross(x, context), cross.proj(torch.cat(heads, -1)))


def test_dropped_tokens_are_one_null_token() -> None:
    """No mask: tokens that are all the same give attention one value, whatever their number."""
    model = network("U-Net tokens")
    tokens, dropped = inputs("U-Net tokens")[2], torch.tensor([True, True, False])
    context = model.embed_content(tokens, dropped)
    null = model.content_tokens(model.content_map.null)
    torch.testing.assert_close(context[:2], null.expand(2, 6, 32))
    block = model.mid_block[0].attention
    x, alone = torch.randn(2, 16, 2, 3, 1), null.expand(2, 1, 32)
    torch.testing.assert_close(block(x, context[:2], None), block(x, alone, None))


def test_tokens_know_their_places() -> None:
    """The same tokens at other places are another content; voxels and tokens count places alike."""
    model, (sample, *others) = network("U-Net tokens"), inputs("U-Net tokens")
    others[3:] = [torch.zeros(3, dtype=torch.bool)] * 2
    out = model(sample, *others)
    others[1] = others[1].flip(2)
    assert not torch.allclose(model(sample, *others), out, atol=1e-3)
    fine = sincos_positions_3d(12, (4, 6, 2), extent=(2, 3, 1)).unflatten(0, (4, 6, 2))
    assert torch.equal(fine[:, 0, 0, 4:], fine[:1, 0, 0, 4:].expand(4, 8))  # y and z do not vary along x
    assert fine[:, 0, 0, 0].tolist() == pytest.approx(
        [math.sin(place) for place in (-0.25, 0.25, 0.75, 1.25)]
    )
    assert torch.equal(
        sincos_positions_3d(12, (2, 3, 1), extent=(2, 3, 1)), sincos_positions_3d(12, (2, 3, 1))
    )


@pytest.mark.parametrize(
    ("patch", "encoder", "level"), [(1, 1, 0), (1, 2, 1), (1, 4, 2), (1, 3, 1), (2, 4, 1), (4, 2, 0)]
)
def test_features_have_as_many_voxels_as_the_encoder_has_tokens(patch: int, encoder: int, level: int) -> None:
    sizes = {**SIZES, **NETWORKS["U-Net pooled"][1], "sample_size": (16, 16, 16), "features_patch": encoder}
    sizes |= {"patch_size": patch, "num_channels": (8, 16, 24), "attention_levels": (False, False, True)}
    with torch.device("meta"):
        model = MeDUETUNet3D(**sizes)
        factors = torch.empty(1, 12), torch.empty(1, 5)
        _, features = model(torch.empty(1, 3, 16, 16, 16), torch.empty(1), *factors, features=True)
    edge = 16 // (patch * 2**level)
    assert features.shape == (1, edge, edge, edge, (8, 16, 24)[level])
    assert model.feature_width == (8, 16, 24)[level]


@pytest.mark.parametrize("prediction", ["flow", "epsilon"])
def test_it_starts_from_the_best_multiple_of_the_sample(prediction: Prediction) -> None:
    """Before training; of normal latents no other multiple predicts better, at any noise level."""
    torch.manual_seed(0)
    latents, noise = randn(4, 3, 12, 12, 12), randn(4, 3, 12, 12, 12)
    times = torch.tensor([0.04, 0.3, 0.6, 1.0]) if prediction == "flow" else torch.tensor([0, 200, 500, 999])
    sample, goal = noisy(latents, noise, times, prediction), target(latents, noise, prediction)
    model = MeDUETUNet3D(**SIZES, **UNET, prediction=prediction).double()
    found = model(sample, network_time(times, prediction).double(), randn(4, 12), randn(4, 5))
    best = (goal * sample).flatten(1).sum(1) / sample.square().flatten(1).sum(1)  # (4,)
    torch.testing.assert_close(found, best.reshape(-1, 1, 1, 1, 1) * sample, rtol=0, atol=0.2)
    assert (found - goal).square().mean() < 1.01 * (
        best.reshape(-1, 1, 1, 1, 1) * sample - goal
    ).square().mean()


def test_unfit_sizes_get_one_line() -> None:
    model, arguments = network("U-Net pooled"), inputs("U-Net pooled")
    with pytest.raises(ValueError, match=r"^spatial axis 0 has size 5, expected a positive multiple of 2: "):
        model(torch.zeros(3, 3, 5, 4, 2), *arguments[1:])
    for change, message in (
        ({"attention_levels": (True,)}, "attention_levels: found 1 levels, expected 2 as in num_channels"),
        ({"num_channels": (8, 18)}, "num_channels: found 18, expected a multiple of norm_num_groups 4"),
        ({"num_heads": 3}, "num_channels: found 8, expected a multiple of num_heads 3"),
        ({"sample_size": (4, 5, 2)}, "spatial axis 1 has size 5"),
    ):
        with pytest.raises(ValueError, match=message):
            MeDUETUNet3D(**{**SIZES, **NETWORKS["U-Net pooled"][1], **change})
