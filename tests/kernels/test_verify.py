"""The check that every kernel has to pass can fail."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from meduet_fast.kernels.verify import compare_to, expect, require


def reference(x: Tensor) -> Tensor:
    return x.square().sum(1)


def inputs(dtype: torch.dtype) -> dict[str, Tensor]:
    return {"x": torch.randn(4, 30, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_the_definition_passes(dtype: torch.dtype) -> None:
    require(reference, reference, inputs(dtype))
    found = compare_to(reference, expect(reference, inputs(dtype)), inputs(dtype))
    assert [item.name for item in found] == ["output 0", "grad x"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_wrong_outputs_gradients_and_unwritten_memory_do_not(dtype: torch.dtype) -> None:
    def scaled(x: Tensor) -> Tensor:
        return reference(x) * 1.05

    def detached(x: Tensor) -> Tensor:
        return reference(x.detach()) + 0 * x.sum()

    def unwritten(x: Tensor) -> Tensor:
        return torch.where(torch.arange(4) == 3, float("nan"), reference(x))

    with pytest.raises(AssertionError, match="output 0 is off by"):
        require(scaled, reference, inputs(dtype))
    with pytest.raises(AssertionError, match="grad x is off by"):
        require(detached, reference, inputs(dtype))
    with pytest.raises(AssertionError, match="output 0 is off by nan"):
        require(unwritten, reference, inputs(dtype))


def test_other_shapes_and_dtypes_do_not() -> None:
    with pytest.raises(AssertionError, match=r"output 0 is torch.float64 \(4,\), expected torch.float32"):
        require(lambda x: reference(x).double(), reference, inputs(torch.float32))
    with pytest.raises(AssertionError, match=r"expected torch\.float32"):
        require(lambda x: reference(x)[:3], reference, inputs(torch.float32))


def test_integers_must_be_equal() -> None:
    def positions(x: Tensor) -> Tensor:
        return x.argmax(1)

    require(positions, positions, inputs(torch.float32))
    with pytest.raises(AssertionError, match="output 0 is off by 1, allowed 0"):
        require(lambda x: positions(x) + 1, positions, inputs(torch.float32))
