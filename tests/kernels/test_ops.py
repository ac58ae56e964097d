"""The eager references: against plain PyTorch modules and loops, fp64 gradients, refusals."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from meduet_fast.kernels import (
    assemble_streams,
    build_mix_index,
    check_mask,
    dual_reconstruction_loss,
    group_norm_silu,
    patch_embed_3d,
    patch_embed_tokens,
    patchify_3d,
    pooled_layer_norm,
    quadruplet_contrast,
    quadruplet_identities,
    style_convolution,
    token_mean,
    unpatchify_3d,
)
from meduet_fast.pretraining import random_mix_mask


def randn(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()


edges = st.integers(1, 3)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 3), st.integers(1, 3), st.tuples(edges, edges, edges), st.tuples(edges, edges, edges))
def test_patches_round_trip_and_equal_conv3d(
    batch: int, channels: int, patch: tuple[int, int, int], grid: tuple[int, int, int]
) -> None:
    size = [p * g for p, g in zip(patch, grid, strict=True)]
    x = randn(batch, channels, *size).detach().transpose(2, 4).contiguous().transpose(2, 4)  # odd strides
    for order in ("first", "last"):
        tokens = patchify_3d(x, patch, order)  # type: ignore[arg-type]
        assert torch.equal(unpatchify_3d(tokens, patch, grid, order), x)  # type: ignore[arg-type]
    weight, bias = randn(5, channels, *patch, seed=1).detach(), randn(5, seed=2).detach()
    expected = F.conv3d(x, weight, bias, stride=patch).flatten(2).transpose(1, 2)
    assert torch.allclose(patch_embed_3d(x, weight, bias), expected, atol=1e-12)
    again = patch_embed_tokens(patchify_3d(x, patch), weight, bias)
    assert torch.allclose(again, expected, atol=1e-12)


def test_patch_embedding_mixes_with_the_partner_and_leaves_room() -> None:
    x, weight, position = randn(4, 2, 4, 4, 4), randn(5, 2, 2, 2, 2, seed=1), randn(8, 5, seed=2)
    mask = random_mix_mask(4, 8, torch.Generator().manual_seed(0))
    own = patch_embed_3d(x, weight)
    tokens = patch_embed_3d(x, weight, None, position, mask, num_prefix_tokens=2)
    assert tokens.shape == (4, 10, 5)
    assert (tokens[:, :2] == 0).all()
    for row in range(4):
        for token in range(8):
            source = own[3 - row] if mask[row, token] else own[row]
            assert torch.allclose(tokens[row, 2 + token], source[token] + position[token])


def test_mix_index_against_loops() -> None:
    mask = random_mix_mask(5, 12, torch.Generator().manual_seed(1))
    index = build_mix_index(mask)
    opposite = index.complement()
    for name, expected in zip(index._fields, build_mix_index(~mask), strict=True):
        assert torch.equal(getattr(opposite, name), expected), name
    for row in range(5):
        sources = [[t for t in range(12) if bool(mask[row, t]) == second] for second in (False, True)]
        assert index.order[row].tolist() == sources[0] + sources[1]
        for tokens, others in (sources, sources[::-1]):
            for rank, token in enumerate(tokens):
                assert index.partner[row, token] == others[rank]
                assert index.previous[row, token] == (tokens[rank - 1] if rank else -1)
                assert index.next[row, token] == (tokens[rank + 1] if rank < 5 else -1)


def test_style_convolution_sees_its_own_source_only() -> None:
    style, weight = randn(3, 10, 4), randn(4, 1, 3, seed=1)
    sequence = F.conv1d(style.transpose(1, 2), weight, padding=1, groups=4).transpose(1, 2)
    assert torch.allclose(style_convolution(style, weight), sequence)
    mask = random_mix_mask(3, 10, torch.Generator().manual_seed(2))
    mixed = style_convolution(style, weight, build_mix_index(mask))
    for row in range(3):
        for chosen in (mask[row], ~mask[row]):
            alone = F.conv1d(style[row, chosen].T[None], weight, padding=1, groups=4)[0].T
            assert torch.allclose(mixed[row, chosen], alone)


def test_streams() -> None:
    content, style = randn(2, 6, 3), randn(2, 6, 3, seed=1)
    prefix, mask_token, position = randn(2, 1, 3, seed=2), randn(3, seed=3), randn(7, 3, seed=4)
    mask = random_mix_mask(2, 6, torch.Generator().manual_seed(3))
    index = build_mix_index(mask)
    arguments = (content, style, prefix, mask_token, position, index)
    streams = assemble_streams(*arguments)
    assert streams.shape == (8, 7, 3)
    assert torch.equal(streams[:4], assemble_streams(*arguments, swapped=False))
    assert torch.equal(streams[4:], assemble_streams(*arguments, straight=False))
    for row in range(8):
        sample, second, swapped = row % 2, row // 2 % 2 == 1, row >= 4
        assert torch.allclose(streams[row, 0], prefix[sample, 0] + position[0])
        for token in range(6):
            other = index.partner[sample, token] if swapped else token
            shown = bool(mask[sample, token]) == second
            expected = content[sample, token] + style[sample, other] if shown else mask_token
            assert torch.allclose(streams[row, 1 + token], expected + position[1 + token])
    with pytest.raises(ValueError, match="straight or swapped"):
        assemble_streams(*arguments, straight=False, swapped=False)


def test_pooling() -> None:
    x, mask = randn(3, 8, 5), random_mix_mask(3, 8, torch.Generator().manual_seed(4))
    normed, mean = pooled_layer_norm(x, mask)
    assert normed.shape == mean.shape == (2, 3, 5)
    for row in range(3):
        for source, chosen in enumerate((~mask[row], mask[row])):
            assert torch.allclose(mean[source, row], x[row, chosen].mean(0))
            assert torch.allclose(normed[source, row], F.layer_norm(x[row, chosen], (5,)).mean(0))
    assert torch.allclose(token_mean(x)[0], x.mean(1))
    assert (token_mean(x, torch.zeros(3, 8))[1] == 0).all()
    assert pooled_layer_norm(x.bfloat16())[0].dtype == torch.float32


@pytest.mark.parametrize("batch", [1, 2, 5, 8])
@pytest.mark.parametrize("identity", ["content", "style"])
def test_contrast_positives_are_always_three(batch: int, identity: str) -> None:
    rows = quadruplet_identities(batch, identity)  # type: ignore[arg-type]
    assert ((rows[:, None] == rows).sum(1) == 4).all()


def test_contrast_clamps_its_scale_and_survives_zero_vectors() -> None:
    queries, keys = randn(8, 3), randn(8, 3, seed=1)
    capped, huge = (quadruplet_contrast(queries, keys, torch.tensor(s), "content") for s in (4.60517, 50.0))
    assert huge.item() == pytest.approx(capped.item(), rel=1e-5)
    zero = quadruplet_contrast(torch.zeros(8, 3), keys.float(), torch.tensor(2.0), "style")
    assert zero.item() == pytest.approx(torch.tensor(7.0).log().item())
    with torch.autocast("cpu", torch.bfloat16):
        assert quadruplet_contrast(queries, keys, torch.tensor(2.0), "style").dtype == torch.float64


GRADCHECKS = {
    "patch_embed_3d": lambda: (
        lambda x, w, b, p: patch_embed_3d(x, w, b, p, torch.tensor([[1, 0] * 4, [0, 1] * 4]), 1),
        (randn(2, 2, 4, 4, 4), randn(3, 2, 2, 2, 2, seed=1), randn(3, seed=2), randn(8, 3, seed=3)),
    ),
    "patch_embed_tokens": lambda: (
        lambda t, w, b: patch_embed_tokens(t, w, b, None, 1),
        (randn(2, 8, 16), randn(3, 2, 2, 2, 2, seed=1), randn(3, seed=2)),
    ),
    "style_convolution": lambda: (
        lambda s, w: style_convolution(s, w, build_mix_index(torch.tensor([[1, 0, 0, 1, 1, 0]]))),
        (randn(1, 6, 3), randn(3, 1, 3, seed=1)),
    ),
    "assemble_streams": lambda: (
        lambda *tensors: assemble_streams(*tensors, build_mix_index(torch.tensor([[1, 0, 0, 1]]))),
        (
            randn(1, 4, 2),
            randn(1, 4, 2, seed=1),
            randn(1, 1, 2, seed=2),
            randn(2, seed=3),
            randn(5, 2, seed=4),
        ),
    ),
    "group_norm_silu": lambda: (
        lambda x, weight, bias: group_norm_silu(x, 1, weight, bias),
        (randn(2, 2, 1, 1, 2), randn(2, 2, seed=1), randn(2, 4, seed=2)[:, ::2].detach().requires_grad_()),
    ),
    "pooled_layer_norm": lambda: (
        lambda x: pooled_layer_norm(x, torch.tensor([[1, 0, 0, 1]])),
        (randn(1, 4, 3),),
    ),
    "quadruplet_contrast": lambda: (
        lambda q, s: quadruplet_contrast(q, randn(8, 3, seed=1), s, "style"),
        (randn(8, 3), randn(1, seed=2)[0].detach().requires_grad_()),
    ),
    "dual_reconstruction_loss": lambda: (
        lambda p: dual_reconstruction_loss(
            p, randn(2, 1, 2, 2, 2, seed=1), torch.tensor([[1] * 4 + [0] * 4] * 2), 1
        ),
        (randn(4, 8, 1),),
    ),
}


@pytest.mark.parametrize("name", GRADCHECKS)
def test_gradcheck(name: str) -> None:
    function, inputs = GRADCHECKS[name]()
    assert torch.autograd.gradcheck(function, inputs)


@pytest.mark.parametrize("activation", [True, False])
@pytest.mark.parametrize("bias_rows", [None, 1, 3])
@pytest.mark.parametrize("weight_rows", [None, 1, 3])
def test_group_norm_of_each_sample_is_a_module_of_its_own(
    weight_rows: int | None, bias_rows: int | None, activation: bool
) -> None:
    x = randn(3, 4, 2, 3, 2)
    weight, bias = (rows and randn(rows, 4, seed=rows + 1) for rows in (weight_rows, bias_rows))
    given = [item if item is None or len(item) > 1 else item[0] for item in (weight, bias)]  # (4,) or (3, 4)
    y = group_norm_silu(x, 2, *given, eps=1e-3, activation=activation)
    expected = []
    for row in range(3):
        module = nn.GroupNorm(2, 4, eps=1e-3).double()
        with torch.no_grad():
            for factors, parameter in ((weight, module.weight), (bias, module.bias)):
                if factors is not None:
                    parameter.copy_(factors[row % len(factors)])
        normal = module(x[row : row + 1])
        expected.append(normal * normal.sigmoid() if activation else normal)
    assert torch.allclose(y, torch.cat(expected), atol=1e-12)
    y.sum().backward()
    for factors in (weight, bias):
        assert factors is None or (factors.grad is not None and factors.grad.shape == factors.shape)


def test_refusals_name_the_argument() -> None:
    x, weight = torch.zeros(2, 1, 4, 4, 5), torch.zeros(3, 1, 2, 2, 2)
    with pytest.raises(
        ValueError, match="spatial axis 2 has size 5, expected a positive multiple of the patch edge 2"
    ):
        patch_embed_3d(x, weight)
    with pytest.raises(ValueError, match=r"x has shape \(2, 1, 4\)"):
        patchify_3d(torch.zeros(2, 1, 4), 2)
    with pytest.raises(ValueError, match=r"position has shape \(7, 3\), expected \(8, 3\)"):
        patch_embed_3d(x[..., :4], weight, position=torch.zeros(7, 3))
    with pytest.raises(ValueError, match=r"source_mask has shape \(2, 4\), expected \(2, 8\)"):
        patch_embed_3d(x[..., :4], weight, source_mask=torch.zeros(2, 4))
    with pytest.raises(ValueError, match="tokens has width 7, expected"):
        patch_embed_tokens(torch.zeros(1, 8, 7), weight)
    with pytest.raises(ValueError, match="tokens has 8 tokens"):
        unpatchify_3d(torch.zeros(1, 8, 8), 2, (2, 2, 3))
    with pytest.raises(ValueError, match="tokens has width 7"):
        unpatchify_3d(torch.zeros(1, 8, 7), 2, (2, 2, 2))
    for name, shape in (("weight", (2,)), ("bias", (1, 4)), ("weight", (4, 3)), ("bias", (3, 4, 1))):
        found = re.escape(f"{name} has shape {shape}, expected (4,) or (3, 4)")
        with pytest.raises(ValueError, match=found):
            group_norm_silu(torch.zeros(3, 4, 1, 1, 2), 2, **{name: torch.zeros(shape)})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="an even L > 0"):
        build_mix_index(torch.zeros(2, 3))
    with pytest.raises(ValueError, match="values other than 0 and 1"):
        check_mask(torch.full((1, 2), 0.5))
    with pytest.raises(ValueError, match="mask row 0 has 2 ones of 2"):
        build_mix_index(torch.ones(1, 2), check_values=True)
    with pytest.raises(ValueError, match=r"prediction has shape \(2, 8, 8\), expected \(4, 8, 8\)"):
        dual_reconstruction_loss(torch.zeros(2, 8, 8), x[..., :4], torch.zeros(2, 8), 2)
    with pytest.raises(ValueError, match="pairing is 'both'"):
        dual_reconstruction_loss(torch.zeros(4, 8, 8), x[..., :4], torch.zeros(2, 8), 2, "both")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="expected both"):
        quadruplet_contrast(torch.zeros(8, 3), torch.zeros(4, 3), torch.zeros(()), "style")
    with pytest.raises(ValueError, match="identity is 'organ'"):
        quadruplet_identities(2, "organ")  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.complex64, torch.int64])
def test_only_floats(dtype: torch.dtype) -> None:
    x, tokens = torch.ones(2, 2, 2, 2, 2).to(dtype), torch.ones(2, 4, 6).to(dtype)
    index, rows = build_mix_index(torch.eye(2).repeat(1, 2)), torch.ones(8, 6).to(dtype)
    prediction, target = torch.ones(4, 8, 2).to(dtype), torch.ones(2, 2, 2, 2, 2)
    calls: list[tuple[str, Callable[[], Any]]] = [
        ("x", lambda: group_norm_silu(x, 2)),
        ("x", lambda: patch_embed_3d(x, x)),
        ("x", lambda: pooled_layer_norm(tokens)),
        ("tokens", lambda: patch_embed_tokens(tokens, torch.ones(1, 6, 1, 1, 1))),
        ("style", lambda: style_convolution(tokens, torch.ones(6, 1, 3))),
        (
            "content",
            lambda: assemble_streams(tokens, tokens, tokens[:, :1], rows[0], torch.ones(5, 6), index),
        ),
        ("prediction", lambda: dual_reconstruction_loss(prediction, target, torch.ones(2, 8), 1)),
        ("queries", lambda: quadruplet_contrast(rows, rows, torch.zeros(()), "style")),
        ("keys", lambda: quadruplet_contrast(torch.ones(8, 6), rows, torch.zeros(()), "style")),
    ]
    for name, call in calls:
        with pytest.raises(ValueError, match=f"^{name} is {dtype}, expected a float dtype"):
            call()
