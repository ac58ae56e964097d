"""The patch embedding's kernels against their definition."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from meduet_fast.kernels import patch_embed, patch_embed_3d, patch_embed_tokens, patchify_3d
from meduet_fast.kernels.launch import override_config
from meduet_fast.kernels.verify import outputs_and_gradients, require

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
NAMES = ("patch_embed_forward", "patch_embed_grad_x", "patch_embed_grad_weight")
Inputs = dict[str, Any]
small = st.integers(1, 3)
triples = st.tuples(small, small, small)


def parameters(
    channels: int, patch: tuple[int, ...], length: int, width: int, prefix: int, dtype: torch.dtype
) -> Inputs:
    """Weight, bias and positions that all require a gradient; only the bias is contiguous."""
    weight = torch.randn(channels, width, *patch).transpose(0, 1).to(dtype)
    return {
        "weight": weight.requires_grad_(),
        "bias": torch.randn(width).to(dtype).requires_grad_(),
        "position": torch.randn(width, length).to(dtype).T.requires_grad_(),
        "num_prefix_tokens": prefix,
    }


def volume(
    batch: int,
    channels: int,
    patch: tuple[int, ...],
    grid: tuple[int, ...],
    width: int,
    prefix: int = 1,
    dtype: torch.dtype = torch.float32,
    layout: tuple[int, ...] = (0, 1, 2, 3, 4),
    seed: int = 0,
) -> Inputs:
    """Inputs of ``patch_embed_3d``; ``layout`` is the order of x's axes in memory."""
    torch.manual_seed(seed)
    shape = (batch, channels, *(edge * count for edge, count in zip(patch, grid, strict=True)))
    x = torch.randn([shape[axis] for axis in layout]).to(dtype).permute([layout.index(a) for a in range(5)])
    length = grid[0] * grid[1] * grid[2]
    values = parameters(channels, patch, length, width, prefix, dtype)
    return {"x": x.requires_grad_(), "source_mask": torch.rand(batch, length) < 0.5, **values}


def check(inputs: Inputs, function: Callable[..., Tensor] = patch_embed_3d) -> None:
    name = "patch_embed_3d" if "x" in inputs else "patch_embed_tokens"
    require(function, getattr(patch_embed, f"{name}_reference"), inputs)


@settings(max_examples=25, deadline=None)
@given(
    small, small, triples, triples, st.integers(1, 70), st.integers(0, 2), st.sampled_from(DTYPES),
    st.permutations(range(5)), st.sets(st.sampled_from(["bias", "position", "source_mask"])),
    st.sets(st.sampled_from(["x", "weight", "bias", "position"])), st.integers(0, 1000),
)  # fmt: skip
def test_any_volume(
    batch: int,
    channels: int,
    patch: tuple[int, ...],
    grid: tuple[int, ...],
    width: int,
    prefix: int,
    dtype: torch.dtype,
    layout: list[int],
    absent: set[str],
    fixed: set[str],
    seed: int,
) -> None:
    inputs = volume(batch, channels, patch, grid, width, prefix, dtype, tuple(layout), seed)
    inputs = {name: None if name in absent else value for name, value in inputs.items()}
    inputs |= {name: inputs[name].detach() for name in fixed if inputs[name] is not None}
    check(inputs)


@settings(max_examples=10, deadline=None)
@given(
    small, st.integers(1, 40), small, triples, st.integers(1, 70), st.integers(0, 2),
    st.sampled_from(DTYPES), st.booleans(), st.integers(0, 1000),
)  # fmt: skip
def test_any_tokens(
    batch: int,
    length: int,
    channels: int,
    patch: tuple[int, ...],
    width: int,
    prefix: int,
    dtype: torch.dtype,
    strided: bool,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    tokens = torch.randn(length, channels * patch[0] * patch[1] * patch[2], batch).to(dtype)
    tokens = tokens.permute(2, 0, 1)
    inputs = {"tokens": tokens if strided else tokens.contiguous()}
    inputs["tokens"].requires_grad_()
    check({**inputs, **parameters(channels, patch, length, width, prefix, dtype)}, patch_embed_tokens)


@pytest.mark.parametrize("blocks", [(32, 32, 16), (64, 16, 64)], ids=str)
@pytest.mark.parametrize("programs", [1, 30, 1000])
def test_block_sizes_and_parts(blocks: tuple[int, ...], programs: int) -> None:
    inputs = volume(5, 3, (2, 3, 4), (1, 3, 7), 50)
    sizes = dict(zip(("BLOCK_M", "BLOCK_N", "BLOCK_K"), blocks, strict=True))
    with ExitStack() as stack:
        for name in NAMES:
            values = {**sizes, "PROGRAMS": programs, "num_warps": 4, "num_stages": 2}
            stack.enter_context(override_config(f"{name}_wide", values))
        check(inputs)


def test_middle_sample_of_an_odd_batch_is_its_own_partner() -> None:
    inputs = volume(3, 2, (2, 2, 2), (2, 2, 2), 5, dtype=torch.float64)
    for mask in (torch.zeros(3, 8), torch.ones(3, 8), torch.tensor([[0.0] * 8, [1.0] * 8, [0.0] * 8])):
        check({**inputs, "source_mask": mask})
    inputs["source_mask"] = torch.ones(3, 8)
    mixed = outputs_and_gradients(patch_embed_3d, inputs)
    plain = outputs_and_gradients(patch_embed_3d, {**inputs, "source_mask": None})
    assert torch.equal(mixed["output 0"][1], plain["output 0"][1])
    assert torch.equal(mixed["grad x"][1], plain["grad x"][1])


def test_sizes_and_strides_at_the_edge() -> None:
    check(volume(1, 1, (1, 1, 1), (1, 1, 1), 1, 0))
    empty = volume(0, 2, (2, 2, 2), (2, 2, 2), 5)
    assert patch_embed_3d(**empty).shape == (0, 9, 5)
    assert patch_embed_3d(torch.randn(1, 1, 2, 2, 2), torch.randn(0, 1, 1, 1, 1)).shape == (1, 8, 0)
    whole = torch.randn(1, 2, 4, 7, 9)
    repeated = whole.expand(3, -1, -1, -1, -1)[:, :, :, 3:, ::2][..., :4]  # neither dense nor distinct
    inputs = volume(3, 2, (2, 2, 2), (2, 2, 2), 5)
    check({**inputs, "x": repeated.detach().requires_grad_()})


def test_prefix_rows_can_be_filled_in_place() -> None:
    inputs = volume(2, 2, (2, 2, 2), (2, 2, 2), 5, dtype=torch.float64)
    inputs["cls"] = torch.randn(1, 1, 5, dtype=torch.float64, requires_grad=True)

    def filled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(cls: Tensor, **values: Any) -> Tensor:
            tokens = function(**values)
            assert (tokens[:, :1] == 0).all()
            tokens[:, :1] = cls
            return tokens

        return call

    require(filled(patch_embed_3d), filled(patch_embed.patch_embed_3d_reference), inputs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_multiplies_narrow_and_keeps_wide_gradients(dtype: torch.dtype) -> None:
    def within(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(**values: Any) -> Tensor:
            with torch.autocast("cpu", dtype):
                return function(**values)

        return call

    inputs = volume(2, 2, (2, 2, 2), (2, 2, 2), 5)
    require(within(patch_embed_3d), within(patch_embed.patch_embed_3d_reference), inputs)
    found = outputs_and_gradients(within(patch_embed_3d), inputs)
    assert found["output 0"].dtype == dtype
    assert found["grad weight"].dtype == found["grad x"].dtype == torch.float32
    inputs["x"] = inputs["x"].detach().to(dtype).requires_grad_()
    require(within(patch_embed_3d), within(patch_embed.patch_embed_3d_reference), inputs)


def test_flops_are_counted_like_the_products_they_replace() -> None:
    for fixed in itertools.chain(itertools.combinations(("x", "weight"), 1), [(), ("x", "weight")]):
        inputs = volume(2, 2, (2, 2, 2), (2, 2, 3), 5)
        inputs |= {name: inputs[name].detach() for name in fixed}
        counts = []
        for function in (patch_embed_3d, patch_embed.patch_embed_3d_reference):
            with FlopCounterMode(display=False) as counter:
                outputs_and_gradients(function, inputs)
            counts.append(counter.get_total_flops())
        assert counts[0] == counts[1] == (3 - len(fixed)) * 2 * 24 * 16 * 5


def test_gradcheck_and_opcheck() -> None:
    inputs = volume(2, 2, (2, 1, 1), (1, 1, 2), 3, dtype=torch.float64, layout=(0, 4, 1, 3, 2))
    weight, bias, position = (inputs[name] for name in ("weight", "bias", "position"))
    blocks = patch_embed._volume_blocks(inputs["x"], weight).detach().requires_grad_()
    mask = torch.tensor([[0, 1], [1, 1]], dtype=torch.uint8)

    def run(blocks: Tensor, weight: Tensor, bias: Tensor, position: Tensor) -> Tensor:
        return patch_embed._patch_embed(blocks, weight, bias, position, mask, 1)

    assert torch.autograd.gradcheck(run, (blocks, weight, bias, position))
    torch.library.opcheck(patch_embed._patch_embed, (blocks, weight, bias, position, mask, 1))
    torch.library.opcheck(patch_embed._patch_embed, (blocks, weight, None, None, None, 0))
    plain = torch.randn(2, 3, 3, dtype=torch.float64), blocks.detach(), weight.detach()
    torch.library.opcheck(patch_embed._grad_x, (*plain, mask, 1))
    torch.library.opcheck(patch_embed._grad_weight, (*plain, mask, 1, True))


def test_compiles_as_one_graph() -> None:
    inputs = volume(2, 2, (2, 2, 2), (2, 2, 2), 5)
    check(inputs, torch.compile(patch_embed_3d, fullgraph=True))
    values = parameters(2, (2, 2, 2), 6, 5, 1, torch.float32)
    tokens = torch.randn(2, 6, 16, requires_grad=True)
    check({"tokens": tokens, **values}, torch.compile(patch_embed_tokens, fullgraph=True))

    @torch.compile(fullgraph=True)
    def within(x: Tensor, weight: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return patch_embed_3d(x, weight)

    assert within(inputs["x"], inputs["weight"]).dtype == torch.bfloat16


def test_offsets_beyond_31_bits() -> None:
    # Samples, channels and rows of voxels lie so far apart that the view touches little of what it spans.
    strides = (2**31 + 8, 2**30 + 4, 2**29, 4, 1)
    shape = (2, 2, 2, 4, 4)
    span = 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    storage = torch.UntypedStorage(2 * span)
    x = torch.tensor([], dtype=torch.float16).set_(storage, 0, shape, strides)  # type: ignore[call-overload]
    x.copy_(torch.randn(shape))
    inputs = volume(2, 2, (2, 2, 2), (1, 2, 2), 5, dtype=torch.float16)
    check({**inputs, "x": x.requires_grad_()})
    x = x.detach()[:, :, :, :2, :2].transpose(2, 4)
    inputs = volume(2, 2, (2, 2, 1), (1, 1, 2), 5, dtype=torch.float16)
    check({**inputs, "x": x})


def test_tokens_equal_the_volume_that_they_make() -> None:
    inputs = volume(2, 2, (2, 2, 2), (2, 2, 3), 5, dtype=torch.float64)
    x, weight = inputs["x"], inputs["weight"]
    assert torch.allclose(patch_embed_tokens(patchify_3d(x, 2), weight), patch_embed_3d(x, weight))
