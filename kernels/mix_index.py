"""Index tables of a mask that mixes two sources into one token sequence.

Source: MeDUET section "Mixing and demixing".
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .backend import triton, use_triton
from .launch import config, launch
from .registration import register

if triton is not None:
    import triton.language as tl


class MixIndex(NamedTuple):
    """Where the tokens of two sources stand in a mixed sequence; every table is (B, L).

    Attributes:
        mask: bool, True where the token shows the partner (source 2).
        order: int64, positions of source 1 in raster order, then those of source 2.
        partner: int64, position of the token of equal rank in the other source.
        previous: int64, position of the preceding token of the same source, -1 at its start.
        next: int64, position of the following token of the same source, -1 at its end.
    """

    mask: Tensor
    order: Tensor
    partner: Tensor
    previous: Tensor
    next: Tensor

    def complement(self) -> MixIndex:
        """Tables of the inverted mask: the sources change names, everything else stays."""
        half = self.order.shape[1] // 2
        return MixIndex(~self.mask, self.order.roll(half, 1), self.partner, self.previous, self.next)


# 1. Reference


def token_order_reference(mask: Tensor) -> Tensor:
    """Positions of the zeros of each row in raster order, then those of the ones: (B, L) int64."""
    return torch.argsort(mask.to(torch.uint8), dim=1, stable=True)


def build_mix_index_reference(mask: Tensor) -> MixIndex:
    """The definition of :func:`build_mix_index`, in plain PyTorch."""
    mask = mask.bool()
    half = mask.shape[1] // 2
    order = token_order_reference(mask)
    # Neighbours within each half of `order`; the ends have none.
    halves = order.view(-1, 2, half)
    none = halves.new_full((halves.shape[0], 2, 1), -1)
    before = torch.cat([none, halves[:, :, :-1]], 2).flatten(1)
    after = torch.cat([halves[:, :, 1:], none], 2).flatten(1)

    def at_positions(by_rank: Tensor) -> Tensor:
        return torch.empty_like(order).scatter_(1, order, by_rank)

    return MixIndex(mask, order, at_positions(order.roll(half, 1)), at_positions(before), at_positions(after))


def take_rows(x: Tensor, index: Tensor) -> Tensor:
    """Rows of ``x`` (B, L, D) at ``index`` (B, L); zeros where the index is -1."""
    rows = torch.gather(x, 1, index.clamp(min=0).unsqueeze(-1).expand(-1, -1, x.shape[-1]))
    return torch.where((index >= 0).unsqueeze(-1), rows, rows.new_zeros(()))


# 2. Kernels

if triton is not None:

    @triton.jit
    def token_order_kernel(mask, order, length, BLOCK: tl.constexpr):
        # One program for a row: ranks within each source are running counts, carried from block to block.
        row = tl.program_id(0).to(tl.int64)
        mask += row * length
        order += row * length
        counts = tl.zeros((BLOCK,), tl.int32)
        for start in range(0, length, BLOCK):
            at = start + tl.arange(0, BLOCK)
            counts += (tl.load(mask + at, mask=at < length, other=1) == 0).to(tl.int32)
        num_first = tl.sum(counts, 0)
        seen = num_first * 0
        for start in range(0, length, BLOCK):
            at = start + tl.arange(0, BLOCK)
            is_first = (tl.load(mask + at, mask=at < length, other=1) == 0).to(tl.int32)
            rank_first = seen + tl.cumsum(is_first, 0) - is_first
            rank = tl.where(is_first == 1, rank_first, num_first + at - rank_first)
            tl.store(order + rank, at.to(tl.int64), mask=at < length)
            seen += tl.sum(is_first, 0)

    @triton.jit
    def mix_index_kernel(order, partner, previous, following, length, BLOCK: tl.constexpr):
        # A launch of its own: it reads what other threads wrote to `order`.
        row = tl.program_id(1).to(tl.int64) * length
        order += row
        rank = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        half = length // 2
        inside = rank < length
        starts = (rank == 0) | (rank == half)
        ends = (rank == half - 1) | (rank == length - 1)
        at = row + tl.load(order + rank, mask=inside, other=0)
        other = tl.load(order + tl.where(rank < half, rank + half, rank - half), mask=inside, other=0)
        before = tl.load(order + rank - 1, mask=inside & (starts == 0), other=-1)
        after = tl.load(order + rank + 1, mask=inside & (ends == 0), other=-1)
        tl.store(partner + at, other, mask=inside)
        tl.store(previous + at, before, mask=inside)
        tl.store(following + at, after, mask=inside)


# 3. Registration


def launch_order(second: Tensor) -> Tensor:
    """Launcher of :func:`token_order_reference` for a packed mask."""
    batch, length = second.shape
    order = _fake_order(second)
    options = config("token_order", second.device)
    block = min(triton.next_power_of_2(length), options["BLOCK"])
    launch(token_order_kernel, (batch,), (second, order, length), {"BLOCK": block}, "token_order", options)
    return order


def _fake_order(second: Tensor) -> Tensor:
    return second.new_empty(second.shape, dtype=torch.int64)


def _launch_tables(second: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, length = second.shape
    order = launch_order(second)
    partner, previous, following = (torch.empty_like(order) for _ in range(3))
    options = config("mix_index", second.device)
    block = min(triton.next_power_of_2(length), options["BLOCK"])
    launch(
        mix_index_kernel,
        (triton.cdiv(length, block), batch),
        (order, partner, previous, following, length),
        {"BLOCK": block},
        "mix_index",
        options,
    )
    return order, partner, previous, following


def _fake_tables(second: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    order, partner, previous, following = (_fake_order(second) for _ in range(4))
    return order, partner, previous, following


token_order = register("token_order(Tensor second) -> Tensor", launch_order, _fake_order)
_tables = register(
    "mix_index(Tensor second) -> (Tensor, Tensor, Tensor, Tensor)", _launch_tables, _fake_tables
)

# 4. Public functions


def check_ones(mask: Tensor, num_second: int, expected: str) -> None:
    """Refuse values other than 0 and 1, and rows without ``num_second`` ones; waits for the device."""
    if not bool(((mask == 0) | (mask == 1)).all()):
        raise ValueError("mask has values other than 0 and 1")
    ones = mask.bool().sum(1)
    uneven = (ones != num_second).nonzero().flatten().tolist()
    if uneven:
        raise ValueError(
            f"mask row {uneven[0]} has {int(ones[uneven[0]])} ones of {mask.shape[1]}, expected {expected}"
        )


def check_mask(mask: Tensor, check_values: bool = True) -> None:
    """Refuse a mask that does not split every row into two equal halves.

    Args:
        mask: (B, L) of 0 and 1.
        check_values: also look at the values, which waits for the device.

    Raises:
        ValueError: naming what is wrong.
    """
    if mask.dim() != 2 or mask.shape[1] % 2 or mask.shape[1] == 0:
        raise ValueError(f"mask has shape {tuple(mask.shape)}, expected (B, L) with an even L > 0")
    if check_values:
        half = "exactly half: swapping pairs the tokens of both sources by rank (mix ratio 0.5)"
        check_ones(mask, mask.shape[1] // 2, half)


def packed(mask: Tensor) -> Tensor:
    """A mask of 0 and 1, of any dtype, as the kernels read it: contiguous bytes."""
    marks = mask.bool().contiguous()
    # Before torch 2.12 Inductor can't view bools as bytes: it casts them, in one pass.
    return marks.to(torch.uint8) if torch.compiler.is_compiling() else marks.view(torch.uint8)


def build_mix_index(mask: Tensor) -> MixIndex:
    """Index tables of a mask, on its device, without waiting for it.

    Args:
        mask: (B, L) of 0 and 1 with exactly L/2 ones in each row (see :func:`check_mask`), any dtype.

    Raises:
        ValueError: if the shape is wrong. Values are the caller's: see :func:`check_mask`.
    """
    check_mask(mask, check_values=False)
    if not use_triton(mask) or mask.numel() == 0:
        return build_mix_index_reference(mask)
    return MixIndex(mask.bool(), *_tables(packed(mask)))


def check_index(index: MixIndex, x: Tensor) -> None:
    """Refuse an index that is not that of tokens (B, L, D)."""
    for name, table in zip(index._fields, index, strict=True):
        if table.shape != x.shape[:2]:
            raise ValueError(f"index.{name} has shape {tuple(table.shape)}, expected {tuple(x.shape[:2])}")
