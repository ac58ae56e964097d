"""Mixing, demixing and remixing on the CPU against loops; what the demixing functions refuse."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from meduet_fast.kernels import (
    MixIndex,
    assemble_streams,
    build_mix_index,
    demix_tokens,
    mix_tokens,
    remix_tokens,
    style_convolution,
)


def mask_with(batch: int, length: int, num_second: int) -> Tensor:
    values = torch.rand(batch, length, generator=torch.Generator().manual_seed(0))
    return values.argsort(1).argsort(1) < num_second


def randn(*shape: int) -> Tensor:
    return torch.randn(
        *shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64
    ).requires_grad_()


def test_mixing_takes_the_partners_tokens() -> None:
    x, mask = randn(5, 4, 3), mask_with(5, 4, 1)
    mixed = mix_tokens(x, mask.float())
    for row in range(5):
        for token in range(4):
            assert torch.equal(mixed[row, token], x[4 - row if mask[row, token] else row, token])


@pytest.mark.parametrize("num_second", [0, 1, 3, 7])
def test_demixing_keeps_raster_order_and_remixing_undoes_it(num_second: int) -> None:
    x, mask = randn(3, 7, 2), mask_with(3, 7, num_second)
    z1, z2 = demix_tokens(x, mask, num_second, check_values=True)
    assert (z1.shape, z2.shape) == ((3, 7 - num_second, 2), (3, num_second, 2))
    for row in range(3):
        assert torch.equal(z1[row], x[row, ~mask[row]])
        assert torch.equal(z2[row], x[row, mask[row]])
    assert torch.equal(remix_tokens(z1, z2, mask, check_values=True), x)


def test_half_is_the_default_and_values_are_the_callers() -> None:
    z1, z2 = demix_tokens(torch.randn(2, 7, 3), mask_with(2, 7, 5))
    assert (z1.shape[1], z2.shape[1]) == (4, 3)


def test_gradients() -> None:
    mask = mask_with(3, 5, 2)
    assert torch.autograd.gradcheck(lambda x: mix_tokens(x, mask), randn(3, 5, 2))
    assert torch.autograd.gradcheck(lambda x: demix_tokens(x, mask), randn(3, 5, 2))
    halves = (randn(3, 3, 2), randn(3, 2, 2))
    assert torch.autograd.gradcheck(lambda z1, z2: remix_tokens(z1, z2, mask), halves)


def test_compile_as_one_graph() -> None:
    def everything(x: Tensor, mask: Tensor) -> Tensor:
        return remix_tokens(*demix_tokens(mix_tokens(x, mask), mask), mask)

    x, mask = torch.randn(2, 6, 3), mask_with(2, 6, 3)
    assert torch.equal(torch.compile(everything, fullgraph=True)(x, mask), mix_tokens(x, mask))


def test_outputs_keep_the_tokens_dtype() -> None:
    index = build_mix_index(mask_with(2, 6, 3))
    x, parameter = torch.randn(2, 6, 4).bfloat16(), torch.randn(4)
    streams = assemble_streams(x, x, x[:, :1].float(), parameter, torch.randn(7, 4), index)
    assert streams.dtype == torch.bfloat16
    assert style_convolution(x, torch.randn(4, 1, 3), index).dtype == torch.bfloat16


def test_refusals_of_the_trio_name_the_argument() -> None:
    x, mask = torch.zeros(2, 6, 3), mask_with(2, 6, 2)
    for function in (mix_tokens, demix_tokens):
        with pytest.raises(ValueError, match=r"x has shape \(2, 6\), expected \(B, L, D\)"):
            function(x[..., 0], mask)
        with pytest.raises(ValueError, match=r"mask has shape \(2, 5\), expected \(2, 6\)"):
            function(x, mask[:, 1:])
    with pytest.raises(ValueError, match="num_second is 7, expected 0 to 6"):
        demix_tokens(x, mask, 7)
    with pytest.raises(ValueError, match="mask row 0 has 2 ones of 6, expected num_second = 3"):
        demix_tokens(x, mask, check_values=True)
    with pytest.raises(ValueError, match="mask has values other than 0 and 1"):
        demix_tokens(x, mask * 2, 2, check_values=True)
    with pytest.raises(ValueError, match=r"z1 has shape \(6, 3\), expected \(B, L1, D\)"):
        remix_tokens(x[0], x, mask)
    with pytest.raises(
        ValueError, match=r"z2 is torch.float64 \(2, 6, 3\), expected torch.float32 \(2, L2, 3\)"
    ):
        remix_tokens(x, x.double(), mask)
    with pytest.raises(ValueError, match=r"mask has shape \(2, 6\), expected \(2, 12\)"):
        remix_tokens(x, x, mask)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("content", torch.zeros(6, 4), r"content has shape \(6, 4\), expected \(B, L, E\)"),
        (
            "style",
            torch.zeros(2, 6, 5),
            r"style is torch.float32 \(2, 6, 5\), expected torch.float32 \(2, 6, 4\)",
        ),
        ("style", torch.zeros(2, 6, 4).half(), "style is torch.float16"),
        ("prefix", torch.zeros(1, 1, 4), r"prefix has shape \(1, 1, 4\), expected \(2, P, 4\)"),
        ("mask_token", torch.zeros(1, 4), r"mask_token has shape \(1, 4\), expected \(4,\)"),
        ("position", torch.zeros(6, 4), r"position has shape \(6, 4\), expected \(7, 4\)"),
        (
            "index",
            build_mix_index(torch.tensor([[0, 1]])),
            r"index.mask has shape \(1, 2\), expected \(2, 6\)",
        ),
    ],
)
def test_refusals_of_the_streams_name_the_argument(name: str, value: Tensor | MixIndex, message: str) -> None:
    inputs: dict[str, Any] = {
        "content": torch.zeros(2, 6, 4),
        "style": torch.zeros(2, 6, 4),
        "prefix": torch.zeros(2, 1, 4),
        "mask_token": torch.zeros(4),
        "position": torch.zeros(7, 4),
        "index": build_mix_index(mask_with(2, 6, 3)),
    }
    assemble_streams(**inputs)
    with pytest.raises(ValueError, match=message):
        assemble_streams(**{**inputs, name: value})


def test_refusals_of_the_style_convolution_name_the_argument() -> None:
    style, weight = torch.zeros(2, 6, 4), torch.zeros(4, 1, 3)
    with pytest.raises(ValueError, match=r"style has shape \(6, 4\), expected \(B, L, Ds\)"):
        style_convolution(style[0], weight)
    with pytest.raises(ValueError, match=r"weight has shape \(4, 3\), expected \(4, 1, 3\)"):
        style_convolution(style, weight[:, 0])
    index = build_mix_index(mask_with(2, 6, 3))
    with pytest.raises(ValueError, match=r"index.next has shape \(2, 5\), expected \(2, 6\)"):
        style_convolution(style, weight, index._replace(next=index.next[:, 1:]))
