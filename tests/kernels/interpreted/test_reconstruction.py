"""The reconstruction loss's kernels against their definition."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from meduet_fast.kernels import dual_reconstruction_loss, reconstruction
from meduet_fast.kernels.launch import override_config
from meduet_fast.kernels.verify import require

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
Triple = tuple[int, int, int]


def make(
    batch: int, channels: int, patch: Triple, grid: Triple, dtype: torch.dtype, pairing: str, seed: int = 0
) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    length = grid[0] * grid[1] * grid[2]
    width = channels * patch[0] * patch[1] * patch[2]
    size = [p * g for p, g in zip(patch, grid, strict=True)]
    prediction = torch.randn(length, 2 * batch, width, generator=generator, dtype=torch.float64)
    target = torch.randn(*size[::-1], channels, batch, generator=generator, dtype=torch.float64)
    return {
        "prediction": prediction.to(dtype).transpose(0, 1).requires_grad_(),  # neither is contiguous
        "target": target.to(dtype).permute(4, 3, 2, 1, 0),
        "mask": torch.rand(batch, length, generator=generator) < 0.5,
        "patch_size": patch,
        "pairing": pairing,
    }


def check(inputs: dict[str, Any], seed: int = 0) -> None:
    require(dual_reconstruction_loss, reconstruction.dual_reconstruction_loss_reference, inputs, seed)


edges = st.tuples(*[st.integers(1, 4)] * 3)


@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 4), st.integers(1, 3), edges, edges, st.sampled_from(DTYPES),
    st.sampled_from(["source", "reference"]), st.integers(0, 1000),
)  # fmt: skip
def test_any_shape(
    batch: int, channels: int, patch: Triple, grid: Triple, dtype: torch.dtype, pairing: str, seed: int
) -> None:
    check(make(batch, channels, patch, grid, dtype, pairing, seed), seed)


@pytest.mark.parametrize("columns", [1, 4, 64])
@pytest.mark.parametrize("tile", [1, 64, 512])
def test_block_sizes(tile: int, columns: int) -> None:
    inputs = make(2, 2, (3, 2, 1), (1, 3, 3), torch.float32, "source")
    values = {"TILE": tile, "COLUMNS": columns, "num_warps": 4, "num_stages": 1}
    with (
        override_config("reconstruction_forward", values),
        override_config("reconstruction_backward", values),
    ):
        check(inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bool, torch.int64])
def test_mask_and_target_of_other_dtypes(dtype: torch.dtype) -> None:
    inputs = make(2, 1, (2, 2, 2), (2, 2, 2), torch.bfloat16, "source")
    inputs["mask"] = inputs["mask"].to(dtype)
    if dtype == torch.bool:
        inputs["target"] = inputs["target"].double()
    # verify's float64 run would turn a float mask into float64: the same numbers.
    check(inputs)


def test_tokens_that_nobody_supervises_are_not_read() -> None:
    inputs = make(2, 2, (2, 2, 2), (2, 2, 2), torch.float32, "source")
    inputs["mask"] = torch.zeros(2, 8, dtype=torch.bool)  # stream 2 alone is supervised
    with torch.no_grad():
        inputs["prediction"][:2] = float("nan")
    loss = dual_reconstruction_loss(**inputs)
    assert loss.isfinite()
    (gradient,) = torch.autograd.grad(loss, inputs["prediction"])
    assert (gradient[:2] == 0).all()
    assert (gradient[2:] != 0).all()


def test_a_target_with_gradient_runs_the_definition() -> None:
    inputs = make(2, 1, (2, 2, 2), (2, 2, 2), torch.float32, "source")
    inputs["target"] = inputs["target"].detach().requires_grad_()
    check(inputs)


def test_empty_batch() -> None:
    loss = dual_reconstruction_loss(torch.zeros(0, 8, 8), torch.zeros(0, 1, 4, 4, 4), torch.zeros(0, 8), 2)
    assert loss.isnan()  # a mean over nothing, as PyTorch has it


def test_gradcheck_and_opcheck() -> None:
    for pairing in ("source", "reference"):
        inputs = make(2, 1, (2, 1, 1), (1, 2, 2), torch.float64, pairing)
        arguments = (
            inputs["target"].detach(), inputs["mask"].view(torch.uint8), [2, 1, 1], pairing == "reference"
        )  # fmt: skip
        operator, prediction = reconstruction._reconstruction, inputs["prediction"]
        assert torch.autograd.gradcheck(lambda x, o=operator, a=arguments: o(x, *a), prediction)
        torch.library.opcheck(operator, (prediction, *arguments))


def test_compiles_as_one_graph() -> None:
    compiled = torch.compile(dual_reconstruction_loss, fullgraph=True)
    inputs = make(2, 1, (2, 2, 2), (2, 2, 2), torch.float32, "source")
    require(compiled, reconstruction.dual_reconstruction_loss_reference, inputs)


def test_offsets_beyond_31_bits() -> None:
    # A view whose rows lie 2^29 elements apart touches little of the memory that it spans.
    storage = torch.UntypedStorage(2 * (5 * 2**29 + 8))
    base = torch.tensor([], dtype=torch.float16)
    prediction = base.set_(storage, 0, (2, 5, 8), (4, 2**29, 1))  # type: ignore[call-overload]
    prediction.copy_(torch.randn(2, 5, 8))
    inputs = {
        "prediction": prediction.requires_grad_(),
        "target": torch.randn(1, 1, 2, 2, 10).half(),
        "mask": torch.tensor([[1, 0, 1, 0, 1]]),
        "patch_size": 2,
    }
    check(inputs)
