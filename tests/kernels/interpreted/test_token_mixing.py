"""The kernels of index tables, mixing, demixing and remixing against their definitions."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from meduet_fast.kernels import (
    build_mix_index,
    demix_tokens,
    mix_index,
    mix_tokens,
    remix_tokens,
    token_mixing,
)
from meduet_fast.kernels.launch import override_config
from meduet_fast.kernels.verify import require

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
dtypes = st.sampled_from(DTYPES)
seeds = st.integers(0, 1000)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def mask_with(batch: int, length: int, num_second: int, seed: int = 0) -> Tensor:
    return torch.rand(batch, length, generator=generator(seed)).argsort(1).argsort(1) < num_second


def tokens(batch: int, length: int, width: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    x = torch.randn(length, batch, width, generator=generator(seed), dtype=torch.float64)
    return x.to(dtype).transpose(0, 1).requires_grad_()  # not contiguous


def require_index(mask: Tensor) -> None:
    made, expected = build_mix_index(mask), mix_index.build_mix_index_reference(mask)
    for name, table, value in zip(made._fields, made, expected, strict=True):
        assert table.dtype == value.dtype
        assert torch.equal(table, value), name


@settings(max_examples=30, deadline=None)
@given(
    st.integers(1, 4), st.integers(1, 100), st.sampled_from([torch.bool, torch.int64, torch.float32]), seeds
)
def test_tables_of_any_shape(batch: int, half: int, dtype: torch.dtype, seed: int) -> None:
    require_index(mask_with(batch, 2 * half, half, seed).to(dtype))


@pytest.mark.parametrize("block", [1, 16, 4096])
def test_tables_with_carried_counts(block: int) -> None:
    options = {"BLOCK": block, "num_warps": 4, "num_stages": 1}
    with override_config("token_order", options), override_config("mix_index", options):
        require_index(mask_with(2, 42, 21))


def test_tables_of_a_long_sequence_and_of_edges() -> None:
    require_index(mask_with(2, 13824, 6912))
    require_index(mask_with(3, 16, 8).t().contiguous().t())
    require_index(torch.zeros(0, 4))
    opposite = build_mix_index(mask_with(2, 14, 7)).complement()
    for table, value in zip(opposite, build_mix_index(~mask_with(2, 14, 7)), strict=True):
        assert torch.equal(table, value)


def test_rows_with_another_number_of_ones_stay_within_memory() -> None:
    mask = torch.rand(4, 40, generator=generator(3)) < 0.3
    mask[0], mask[1] = False, True
    require_index(mask)
    x = tokens(4, 40, 5, torch.float32)
    require(demix_tokens, token_mixing.demix_tokens_reference, {"x": x, "mask": mask})


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 5), st.integers(1, 40), st.integers(1, 70), dtypes, seeds)
def test_mixing_any_shape(batch: int, length: int, width: int, dtype: torch.dtype, seed: int) -> None:
    mask = torch.rand(batch, length, generator=generator(seed)) < 0.5
    x = tokens(batch, length, width, dtype, seed)
    require(mix_tokens, token_mixing.mix_tokens_reference, {"x": x, "mask": mask.to(dtype)}, seed)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 4), st.integers(1, 40), st.integers(1, 70), st.data(), dtypes, seeds)
def test_demixing_and_remixing_any_shape_and_ratio(
    batch: int, length: int, width: int, data: st.DataObject, dtype: torch.dtype, seed: int
) -> None:
    num_second = data.draw(st.integers(0, length))
    mask = mask_with(batch, length, num_second, seed)
    x = tokens(batch, length, width, dtype, seed)
    inputs = {"x": x, "mask": mask, "num_second": num_second}
    require(demix_tokens, token_mixing.demix_tokens_reference, inputs, seed)
    z1, z2 = demix_tokens(**inputs, check_values=True)
    for row in range(batch):
        assert torch.equal(z1[row], x[row, ~mask[row]])
        assert torch.equal(z2[row], x[row, mask[row]])
    assert torch.equal(remix_tokens(z1, z2, mask, check_values=True), x)
    z1, z2 = (tokens(batch, count, width, dtype, seed + 1) for count in (length - num_second, num_second))
    require(remix_tokens, token_mixing.remix_tokens_reference, {"z1": z1, "z2": z2, "mask": mask}, seed)


@pytest.mark.parametrize("rows", [1, 4, 32])
@pytest.mark.parametrize("block", [2, 16])
def test_block_sizes(rows: int, block: int) -> None:
    options = {"BLOCK_D": block, "ROWS": rows, "num_warps": 4, "num_stages": 1}
    mask, x = mask_with(2, 11, 5), tokens(2, 11, 9, torch.float32)
    with override_config("mix_tokens", options), override_config("token_halves", options):
        require(mix_tokens, token_mixing.mix_tokens_reference, {"x": x, "mask": mask})
        require(demix_tokens, token_mixing.demix_tokens_reference, {"x": x, "mask": mask})
        halves = dict(
            zip(("z1", "z2"), (z.detach().requires_grad_() for z in demix_tokens(x, mask)), strict=True)
        )
        require(remix_tokens, token_mixing.remix_tokens_reference, {**halves, "mask": mask})


def test_empty() -> None:
    for shape in ((0, 4, 3), (2, 0, 3), (2, 4, 0)):
        x, mask = torch.randn(shape, requires_grad=True), torch.zeros(shape[:2])
        require(mix_tokens, token_mixing.mix_tokens_reference, {"x": x, "mask": mask})
        require(demix_tokens, token_mixing.demix_tokens_reference, {"x": x, "mask": mask})
        assert remix_tokens(*demix_tokens(x, mask), mask).shape == shape


def test_gradgradcheck_and_opcheck() -> None:
    x, mask = tokens(3, 6, 2, torch.float64), mask_with(3, 6, 2)
    second = mix_index.packed(mask)
    order = mix_index.token_order(second)
    z1, z2 = (z.detach().requires_grad_() for z in token_mixing._demix(x, order, 2))
    for function, inputs in (
        (lambda x: token_mixing._mix(x, second, False), (x,)),
        (lambda x: token_mixing._demix(x, order, 2), (x,)),
        (lambda z1, z2: token_mixing._remix(z1, z2, order), (z1, z2)),
    ):
        assert torch.autograd.gradcheck(function, inputs, fast_mode=True)
        assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True)
    torch.library.opcheck(mix_index.token_order, (second,))
    torch.library.opcheck(mix_index._index, (second,))
    torch.library.opcheck(token_mixing._mix, (x, second, False))
    torch.library.opcheck(token_mixing._demix, (x, order, 2))
    torch.library.opcheck(token_mixing._remix, (z1, z2, order))


def test_compiles_as_one_graph() -> None:
    def everything(x: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
        z1, z2 = demix_tokens(mix_tokens(x, mask), mask)
        return z1, z2, remix_tokens(z2, z1, ~mask), build_mix_index(mask).partner.to(x.dtype)

    x, mask = tokens(2, 8, 6, torch.float32), mask_with(2, 8, 4)
    require(torch.compile(everything, fullgraph=True), everything, {"x": x, "mask": mask})


def test_offsets_beyond_31_bits() -> None:
    # A view whose rows lie 2^29 elements apart touches little of the memory that it spans.
    storage = torch.UntypedStorage(2 * (5 * 2**29 + 8))
    x = torch.tensor([], dtype=torch.float16).set_(storage, 0, (1, 6, 8), (1, 2**29, 1))  # type: ignore[call-overload]
    x.copy_(torch.randn(1, 6, 8))
    mask = mask_with(1, 6, 3)
    for run, reference in (
        (mix_tokens, token_mixing.mix_tokens_reference),
        (demix_tokens, token_mixing.demix_tokens_reference),
    ):
        require(run, reference, {"x": x.requires_grad_(), "mask": mask})
    assert torch.equal(
        remix_tokens(x[:, :3], x[:, 3:], mask), token_mixing.remix_tokens_reference(x[:, :3], x[:, 3:], mask)
    )
