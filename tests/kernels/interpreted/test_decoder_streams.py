"""The kernels of the style convolution and of the decoder's streams against their definitions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from meduet_fast.kernels import (
    assemble_streams,
    build_mix_index,
    decoder_streams,
    style_conv,
    style_convolution,
)
from meduet_fast.kernels.launch import override_config
from meduet_fast.kernels.mix_index import MixIndex, packed
from meduet_fast.kernels.verify import require

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
PARTS = ("content", "style", "prefix", "mask_token", "position")
dtypes = st.sampled_from(DTYPES)
seeds = st.integers(0, 1000)
KINDS = [(True, True), (True, False), (False, True)]


def make_index(batch: int, length: int, seed: int = 0) -> MixIndex:
    values = torch.rand(batch, length, generator=torch.Generator().manual_seed(seed))
    return build_mix_index(values.argsort(1).argsort(1) < length // 2)


def randn(*shape: int, dtype: torch.dtype, seed: int) -> Tensor:
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x.to(dtype).requires_grad_()


def tokens(batch: int, length: int, width: int, dtype: torch.dtype, seed: int) -> Tensor:
    x = randn(length, batch, width, dtype=dtype, seed=seed).detach()
    return x.transpose(0, 1).requires_grad_()  # not contiguous


def convolution(
    batch: int, half: int, width: int, mixed: bool, dtype: torch.dtype, seed: int = 0
) -> dict[str, Any]:
    return {
        "style": tokens(batch, 2 * half, width, dtype, seed),
        "weight": randn(width, 1, 3, dtype=dtype, seed=seed + 1),
        "index": make_index(batch, 2 * half, seed) if mixed else None,
    }


def streams(
    batch: int,
    half: int,
    width: int,
    prefixes: int,
    dtype: torch.dtype,
    kinds: tuple[bool, bool],
    seed: int = 0,
) -> dict[str, Any]:
    length = 2 * half
    return {
        "content": tokens(batch, length, width, dtype, seed),
        "style": tokens(batch, length, width, dtype, seed + 1),
        "prefix": tokens(batch, prefixes, width, dtype, seed + 2),
        "mask_token": randn(width, dtype=dtype, seed=seed + 3),
        "position": randn(prefixes + length, width, dtype=dtype, seed=seed + 4),
        "index": make_index(batch, length, seed),
        "straight": kinds[0],
        "swapped": kinds[1],
    }


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 3), st.integers(1, 40), st.integers(1, 70), st.booleans(), dtypes, seeds)
def test_style_of_any_shape(
    batch: int, half: int, width: int, mixed: bool, dtype: torch.dtype, seed: int
) -> None:
    inputs = convolution(batch, half, width, mixed, dtype, seed)
    require(style_convolution, style_conv.style_convolution_reference, inputs, seed)


@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 3), st.integers(1, 30), st.integers(1, 70), st.integers(0, 3), dtypes,
    st.sampled_from(KINDS), seeds,
)  # fmt: skip
def test_streams_of_any_shape(
    batch: int, half: int, width: int, prefixes: int, dtype: torch.dtype, kinds: tuple[bool, bool], seed: int
) -> None:
    inputs = streams(batch, half, width, prefixes, dtype, kinds, seed)
    require(assemble_streams, decoder_streams.assemble_streams_reference, inputs, seed)


@pytest.mark.parametrize("dtype", DTYPES[2:])
def test_float32_parameters_under_autocast(dtype: torch.dtype) -> None:
    inputs = convolution(2, 20, 64, True, dtype)
    inputs["weight"] = inputs["weight"].detach().float().requires_grad_()
    require(style_convolution, style_conv.style_convolution_reference, inputs)
    inputs = streams(2, 20, 64, 1, dtype, (True, True))
    for name in ("mask_token", "position"):
        inputs[name] = inputs[name].detach().float().requires_grad_()
    require(assemble_streams, decoder_streams.assemble_streams_reference, inputs)


@pytest.mark.parametrize(("rows", "steps"), [(1, 1), (4, 2), (64, 1)])
@pytest.mark.parametrize("block", [4, 16])
def test_block_sizes(rows: int, steps: int, block: int) -> None:
    options = {"BLOCK_D": block, "ROWS": rows, "num_warps": 4, "num_stages": 1}
    with (
        override_config("style_convolution_forward", options),
        override_config("style_convolution_backward", {**options, "STEPS": steps}),
        override_config("assemble_streams_forward", options),
        override_config("assemble_streams_backward", {**options, "STEPS": steps}),
    ):
        inputs = convolution(2, 5, 6, True, torch.float32)
        require(style_convolution, style_conv.style_convolution_reference, inputs)
        inputs = streams(2, 5, 6, 1, torch.float32, (True, True))
        require(assemble_streams, decoder_streams.assemble_streams_reference, inputs)


@pytest.mark.parametrize("kinds", KINDS)
@pytest.mark.parametrize(
    "wanted", [("content",), ("style",), ("prefix",), ("mask_token",), ("position",), PARTS[:3]]
)
def test_only_wanted_gradients(kinds: tuple[bool, bool], wanted: tuple[str, ...]) -> None:
    inputs = streams(2, 5, 6, 2, torch.float32, kinds)
    for name in PARTS:
        inputs[name] = inputs[name].detach().requires_grad_(name in wanted)
    require(assemble_streams, decoder_streams.assemble_streams_reference, inputs)


def test_single_row_tokens_without_width_or_samples() -> None:
    for batch, half, width in ((0, 2, 3), (2, 2, 0), (1, 1, 1)):
        inputs = convolution(batch, half, width, True, torch.float32)
        require(style_convolution, style_conv.style_convolution_reference, inputs)
        inputs = streams(batch, half, width, 1, torch.float32, (True, True))
        require(assemble_streams, decoder_streams.assemble_streams_reference, inputs)
    x = randn(2, 1, 3, dtype=torch.float32, seed=0)
    weight = randn(3, 1, 3, dtype=torch.float32, seed=1)
    require(style_convolution, style_conv.style_convolution_reference, {"style": x, "weight": weight})


def test_gradcheck_and_opcheck() -> None:
    for mixed in (True, False):
        inputs = convolution(1, 2, 2, mixed, torch.float64)
        index = inputs["index"]
        neighbours = (index.previous, index.next) if mixed else (None, None)
        x, weight = inputs["style"], inputs["weight"]
        assert torch.autograd.gradcheck(lambda x, w, n=neighbours: style_conv._style(x, w, *n), (x, weight))
        torch.library.opcheck(style_conv._style, (x, weight, *neighbours))
    for kinds in KINDS[1:]:
        inputs = streams(2, 2, 2, 1, torch.float64, kinds)
        parts, index = tuple(inputs[name] for name in PARTS), inputs["index"]
        rest = (packed(index.mask), index.partner, *kinds)
        assert torch.autograd.gradcheck(
            lambda *parts, rest=rest: decoder_streams._streams(*parts, *rest), parts, fast_mode=True
        )
        torch.library.opcheck(decoder_streams._streams, (*parts, *rest))


def test_compiles_as_one_graph() -> None:
    inputs = convolution(2, 4, 6, True, torch.float32)
    require(torch.compile(style_convolution, fullgraph=True), style_conv.style_convolution_reference, inputs)
    inputs = streams(2, 4, 6, 1, torch.float32, (True, True))
    inputs["position"] = inputs["position"].detach()
    require(
        torch.compile(assemble_streams, fullgraph=True), decoder_streams.assemble_streams_reference, inputs
    )


def test_gradients_with_odd_strides() -> None:
    # A sum's gradient has strides of zero, a transposition's is not contiguous.
    inputs = streams(2, 4, 6, 1, torch.float64, (True, True))

    def transposed(**inputs: Any) -> tuple[Tensor, Tensor]:
        sequences = assemble_streams(**inputs)
        return sequences.sum(), sequences.transpose(1, 2).contiguous()

    def reference(**inputs: Any) -> tuple[Tensor, Tensor]:
        sequences = decoder_streams.assemble_streams_reference(**inputs)
        return sequences.sum(), sequences.transpose(1, 2).contiguous()

    require(transposed, reference, inputs)


def test_offsets_beyond_31_bits() -> None:
    # A view whose rows lie 2^29 elements apart touches little of the memory that it spans.
    storage = torch.UntypedStorage(2 * (5 * 2**29 + 8))
    far = torch.tensor([], dtype=torch.float16).set_(storage, 0, (1, 6, 8), (1, 2**29, 1))  # type: ignore[call-overload]
    far.copy_(torch.randn(1, 6, 8))
    inputs = convolution(1, 3, 8, True, torch.float16) | {"style": far.requires_grad_()}
    require(style_convolution, style_conv.style_convolution_reference, inputs)
    inputs = streams(1, 3, 8, 1, torch.float16, (True, True)) | {"content": far, "style": far.detach()}
    require(assemble_streams, decoder_streams.assemble_streams_reference, inputs)
    # Nor do rows of the backward pass wrap.
    storage = torch.UntypedStorage(2 * (3 * 2**30 + 64))
    grad = torch.tensor([], dtype=torch.float16).set_(storage, 0, (4, 7, 8), (2**30, 8, 1))  # type: ignore[call-overload]
    grad.copy_(torch.randn(4, 7, 8))
    index = inputs["index"]
    rest = (
        inputs["prefix"],
        inputs["mask_token"],
        packed(index.mask),
        index.partner,
        True,
        True,
        [True] * 4,
    )
    for value, near in zip(
        decoder_streams._streams_backward(grad, *rest),
        decoder_streams._streams_backward(grad.clone(), *rest),
        strict=True,
    ):
        assert torch.equal(value, near)
