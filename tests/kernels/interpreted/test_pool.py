"""The pooling kernels against their definition."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from meduet_fast.kernels import pool, pooled_layer_norm
from meduet_fast.kernels.launch import override_config
from meduet_fast.kernels.verify import require

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


def make(
    batch: int, length: int, width: int, masked: bool, dtype: torch.dtype, seed: int = 0
) -> dict[str, torch.Tensor | None]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(length, batch, width, generator=generator, dtype=torch.float64) + 0.5
    mask = torch.rand(batch, length, generator=generator) < 0.5 if masked else None
    return {"x": x.to(dtype).transpose(0, 1).requires_grad_(), "mask": mask}  # not contiguous


@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 3), st.integers(1, 70), st.integers(1, 130), st.booleans(), st.sampled_from(DTYPES),
    st.integers(0, 1000),
)  # fmt: skip
def test_any_shape(batch: int, length: int, width: int, masked: bool, dtype: torch.dtype, seed: int) -> None:
    inputs = make(batch, length, width, masked, dtype, seed)
    require(pooled_layer_norm, pool.pooled_layer_norm_reference, inputs, seed)


@pytest.mark.parametrize("rows", [1, 2, 16])
def test_block_sizes(rows: int) -> None:
    inputs = make(2, 21, 20, True, torch.float32)
    with (
        override_config("pool_forward", {"ROWS": rows, "STEPS": 3, "num_warps": 4, "num_stages": 1}),
        override_config("pool_backward", {"ROWS": rows, "num_warps": 4, "num_stages": 1}),
    ):
        require(pooled_layer_norm, pool.pooled_layer_norm_reference, inputs)


def test_source_without_tokens_gives_zeros() -> None:
    x = torch.randn(2, 5, 6, dtype=torch.float64, requires_grad=True)
    mask = torch.zeros(2, 5, dtype=torch.bool)
    mask[1] = True
    require(pooled_layer_norm, pool.pooled_layer_norm_reference, {"x": x, "mask": mask})
    normed, _ = pooled_layer_norm(x, mask)
    assert (normed[1, 0] == 0).all()
    assert (normed[0, 1] == 0).all()


def test_without_eps_on_a_ragged_length() -> None:
    inputs = make(2, 27, 20, True, torch.float64)
    require(
        lambda x, mask: pooled_layer_norm(x, mask, eps=0.0),
        lambda x, mask: pool.pooled_layer_norm_reference(x, mask, eps=0.0),
        inputs,
    )


def test_gradcheck_and_opcheck() -> None:
    x = torch.randn(2, 3, 3, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[0, 1, 0], [1, 1, 0]], dtype=torch.uint8)
    for packed in (mask, None):
        assert torch.autograd.gradcheck(lambda x, m=packed: pool._pool(x, m, 1e-5)[:2], x)
        torch.library.opcheck(pool._pool, (x, packed, 1e-5))


def test_compiles_as_one_graph() -> None:
    x = torch.randn(2, 7, 6, requires_grad=True)
    mask = torch.rand(2, 7) < 0.5
    compiled = torch.compile(pooled_layer_norm, fullgraph=True)
    require(compiled, pool.pooled_layer_norm_reference, {"x": x, "mask": mask})


def test_monai_tensors_are_taken_as_they_are() -> None:
    from monai.data import MetaTensor

    x = MetaTensor(torch.randn(2, 5, 6)).requires_grad_()
    normed, _ = pooled_layer_norm(x)
    normed.sum().backward()
    expected, _ = pool.pooled_layer_norm_reference(x.as_tensor())
    torch.testing.assert_close(torch.as_tensor(normed), expected)
    assert x.grad is not None


def test_offsets_beyond_31_bits() -> None:
    # A view whose rows lie 2^29 elements apart touches little of the memory that it spans.
    base = torch.empty(1).new_empty(0)
    storage = torch.UntypedStorage(2 * (4 * 2**29 + 8))
    base = torch.tensor([], dtype=torch.float16).set_(storage, 0, (1, 5, 8), (1, 2**29, 1))  # type: ignore[call-overload]
    base.copy_(torch.randn(1, 5, 8))
    require(pooled_layer_norm, pool.pooled_layer_norm_reference, {"x": base.requires_grad_(), "mask": None})
