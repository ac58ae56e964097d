"""The group normalisation kernels against their definition."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from meduet_fast.kernels import group_norm, group_norm_silu
from meduet_fast.kernels.dtypes import accumulator
from meduet_fast.kernels.launch import override_config
from meduet_fast.kernels.verify import require

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
KERNELS = ("group_norm_statistics", "group_norm_apply", "group_norm_sums", "group_norm_backward")
LAST = torch.channels_last_3d
# One row for all samples; one for each, half of a projection, or every other value of one.
FACTORS = ["none", "shared", "half", "strided"]


def make(
    batch: int, groups: int, width: int, size: tuple[int, int, int], dtype: torch.dtype, layout: str,
    activation: bool = True, weight: str = "shared", bias: str = "shared", mean: float = 0.5, seed: int = 0,
) -> dict[str, Any]:  # fmt: skip
    """Make inputs; weight and bias are one of ``FACTORS`` each."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def factors(kind: str) -> Tensor | None:
        if kind == "none":
            return None
        rows = randn(groups * width) if kind == "shared" else randn(batch, 2 * groups * width)
        rows = rows.to(dtype)
        if kind == "half":
            rows = rows[:, groups * width :]
        elif kind == "strided":
            rows = rows[:, ::2]
        return rows.requires_grad_()

    x = (randn(batch, groups * width, *size) + mean).to(dtype)
    if layout == "last":
        x = x.contiguous(memory_format=LAST)
    elif layout == "turned":
        x = x.transpose(2, 4).contiguous().transpose(2, 4)
    return {
        "x": x.requires_grad_(),
        "num_groups": groups,
        "weight": factors(weight),
        "bias": factors(bias),
        "eps": 1e-6,
        "activation": activation,
    }


def check(inputs: dict[str, Any], seed: int = 0) -> None:
    require(group_norm_silu, group_norm.group_norm_silu_reference, inputs, seed)


edges = st.integers(1, 7)


@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 3), st.integers(1, 4), st.integers(1, 4), st.tuples(edges, edges, edges),
    st.sampled_from(DTYPES), st.sampled_from(["first", "last", "turned"]), st.booleans(),
    st.sampled_from(FACTORS), st.sampled_from(FACTORS), st.integers(0, 1000),
)  # fmt: skip
def test_any_shape(
    batch: int, groups: int, width: int, size: tuple[int, int, int], dtype: torch.dtype, layout: str,
    activation: bool, weight: str, bias: str, seed: int,
) -> None:  # fmt: skip
    if width * size[0] * size[1] * size[2] == 1:  # PyTorch refuses groups of one value
        size = (2, 1, 1)
    check(make(batch, groups, width, size, dtype, layout, activation, weight, bias, seed=seed), seed)


@pytest.mark.parametrize("layout", ["first", "last"])
@pytest.mark.parametrize(("tile", "columns", "steps"), [(8, 2, 1), (16, 4, 3), (64, 64, 2), (1024, 4, 5)])
def test_block_sizes(tile: int, columns: int, steps: int, layout: str) -> None:
    inputs = make(2, 2, 3, (3, 2, 5), torch.float32, layout, weight="half", bias="strided")
    values = {"TILE": tile, "COLUMNS": columns, "STEPS": steps, "num_warps": 4, "num_stages": 1}
    with (
        override_config(KERNELS[0], values), override_config(KERNELS[1], values),
        override_config(KERNELS[2], values), override_config(KERNELS[3], values),
        override_config("group_norm_combine", {"BLOCK": tile, "num_warps": 4, "num_stages": 1}),
        override_config("group_norm_reduce", {**values, "COLUMNS": 2}),
    ):  # fmt: skip
        check(inputs)


@pytest.mark.parametrize("layout", ["first", "last"])
def test_large_mean_costs_no_digits(layout: str) -> None:
    inputs = make(1, 2, 2, (16, 16, 16), torch.float32, layout, mean=1000.0)
    values = {"TILE": 512, "COLUMNS": 4, "STEPS": 2, "num_warps": 4, "num_stages": 1}
    with override_config("group_norm_statistics", values):
        check(inputs)
        _, mean, rstd = group_norm._group_norm(*inputs.values())
    exact = inputs["x"].detach().double().reshape(1, 2, -1)
    assert torch.allclose(mean.double(), exact.mean(-1), rtol=2e-7)
    assert torch.allclose(rstd.double(), (exact.var(-1, correction=0) + 1e-6).rsqrt(), rtol=2e-6)


@pytest.mark.parametrize("layout", ["first", "last", "turned"])
def test_keeps_dtype_and_memory_format(layout: str) -> None:
    inputs = make(2, 2, 2, (3, 4, 5), torch.bfloat16, layout)
    inputs["weight"] = inputs["weight"].detach().float().requires_grad_()  # as under autocast
    with torch.autocast("cpu", torch.bfloat16):
        y = group_norm_silu(**inputs)
    y.sum().backward()
    assert y.dtype == torch.bfloat16
    assert inputs["weight"].grad.dtype == torch.float32
    assert y.is_contiguous(memory_format=LAST) == (layout == "last")
    assert inputs["x"].grad.is_contiguous(memory_format=LAST) == (layout == "last")
    check(inputs)


def test_empty_batch() -> None:
    assert group_norm_silu(torch.zeros(0, 4, 2, 2, 2), 2).shape == (0, 4, 2, 2, 2)


def test_gradcheck_and_opcheck() -> None:
    for layout, activation, weight, bias in (
        ("last", True, "shared", "half"),
        ("first", False, "half", "none"),
    ):
        made = make(2, 1, 1, (1, 1, 3), torch.float64, layout, activation, weight, bias)
        arguments = tuple(made.values())
        assert torch.autograd.gradcheck(lambda *values: group_norm._group_norm(*values)[0], arguments)
    torch.library.opcheck(group_norm._group_norm, arguments)


@pytest.mark.parametrize("factors", ["shared", "half"])
def test_compiles_as_one_graph(factors: str) -> None:
    inputs = make(2, 2, 3, (2, 3, 2), torch.float32, "last", weight=factors, bias=factors)
    require(
        torch.compile(group_norm_silu, fullgraph=True), group_norm.group_norm_silu_reference, inputs
    )  # fmt: skip


def test_offsets_beyond_31_bits() -> None:
    # Positions 2^28 elements apart, which touch little of the memory that they span: no layout of a feature
    # map, so the kernel alone.
    storage = torch.UntypedStorage(2 * (9 * 2**28 + 8))
    x = torch.tensor([], dtype=torch.float16).set_(storage, 0, (9, 8), (2**28, 1))  # type: ignore[call-overload]
    x.copy_(torch.randn(9, 8))
    partial = torch.empty(1, 1, 2, 8)
    group_norm.group_norm_statistics_kernel[(1, 1, 1)](
        x, partial, 9, 8, 0, 1, 2**28, ROWS=16, COLUMNS=8, STEPS=1, ACC=accumulator(x.dtype)
    )
    assert torch.allclose(partial[0, 0, 0], x.float().mean(0), atol=1e-6)
    assert torch.allclose(partial[0, 0, 1], 9 * x.float().var(0, correction=0), rtol=1e-5)
