"""Where the tokens of two sources stand in the sequence into which a mask mixes them.

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
    """Where the tokens of two sources stand in a mixed sequence, (B, L) each; by :func:`build_mix_index`.

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
        """Return the index of the inverted mask: the sources change names, everything else stays."""
        half = self.order.shape[1] // 2
        return MixIndex(~self.mask, self.order.roll(half, 1), self.partner, self.previous, self.next)


# 1. Reference


def token_order_reference(mask: Tensor) -> Tensor:
    """Compute positions of the zeros of each row in raster order, then those of the ones: (B, L) int64."""
    return torch.argsort(mask.to(torch.uint8), dim=1, stable=True)


def build_mix_index_reference(mask: Tensor) -> MixIndex:
    """Compute :func:`build_mix_index` in plain PyTorch: its definition."""
    mask = mask.bool()  # (B, L)
    half = mask.shape[1] // 2
    order = token_order_reference(mask)  # (B, L)
    # Neighbours within each half of `order`; the ends have none.
    halves = order.view(-1, 2, half)  # (B, 2, L/2)
    none = halves.new_full((halves.shape[0], 2, 1), -1)
    before = torch.cat([none, halves[:, :, :-1]], 2).flatten(1)  # (B, L), by rank
    after = torch.cat([halves[:, :, 1:], none], 2).flatten(1)  # (B, L), by rank
    tables = (
        torch.empty_like(order).scatter_(1, order, by_rank)  # (B, L), by position
        for by_rank in (order.roll(half, 1), before, after)
    )
    return MixIndex(mask, order, *tables)


def take_rows(x: Tensor, index: Tensor) -> Tensor:
    """Take rows of ``x`` (B, L, D) at ``index`` (B, L), zeros where it is -1: (B, L, D)."""
    rows = torch.gather(x, 1, index.clamp(min=0).unsqueeze(-1).expand(-1, -1, x.shape[-1]))  # (B, L, D)
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


class _Mask(NamedTuple):
    second: Tensor  # (B, L) uint8, 1 where the token shows source 2


def _fake_order(x: _Mask) -> Tensor:
    return x.second.new_empty(x.second.shape, dtype=torch.int64)


def _launch_order(x: _Mask) -> Tensor:
    batch, length = x.second.shape
    order = _fake_order(x)  # (B, L)
    options = config("token_order", x.second.device)
    block = min(triton.next_power_of_2(length), options["BLOCK"])
    arguments = (x.second, order, length)
    launch(token_order_kernel, (batch,), arguments, {"BLOCK": block}, options)
    return order


def _fake_index(x: _Mask) -> tuple[Tensor, ...]:
    return tuple(_fake_order(x) for _ in MixIndex._fields[1:])


def _launch_index(x: _Mask) -> tuple[Tensor, ...]:
    batch, length = x.second.shape
    order = _launch_order(x)
    tables = (order, *(torch.empty_like(order) for _ in MixIndex._fields[2:]))  # (B, L) each
    options = config("mix_index", order.device)
    block = min(triton.next_power_of_2(length), options["BLOCK"])
    grid = (triton.cdiv(length, block), batch)
    launch(mix_index_kernel, grid, (*tables, length), {"BLOCK": block}, options)
    return tables


token_order = register("token_order", _Mask, "Tensor", _launch_order, _fake_order)
_index = register("mix_index", _Mask, "(Tensor, Tensor, Tensor, Tensor)", _launch_index, _fake_index)


# 4. Public functions


def packed(mask: Tensor) -> Tensor:
    """Pack a mask of 0 and 1, of any dtype, as the kernels read it: contiguous bytes (B, L)."""
    marks = mask.bool().contiguous()
    # Before torch 2.12 Inductor can't view bools as bytes: it casts them, in one pass.
    return marks.to(torch.uint8) if torch.compiler.is_compiling() else marks.view(torch.uint8)


def check_ones(mask: Tensor, num_second: int, expected: str) -> None:
    """Refuse values other than 0 and 1, and rows without ``num_second`` ones; waits for the device."""
    if not bool(((mask == 0) | (mask == 1)).all()):
        raise ValueError("mask has values other than 0 and 1")
    ones = mask.bool().sum(1)  # (B,)
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


def build_mix_index(mask: Tensor, check_values: bool = False) -> MixIndex:
    """Build the index of a mask, on its device: the one place where a training step checks its mask.

    Args:
        mask: (B, L) of 0 and 1 with exactly L/2 ones in each row, any dtype.
        check_values: refuse other rows and values, which waits for the device; else they are the caller's.

    Raises:
        ValueError: if the shape is wrong; with ``check_values`` also for the mask's values.
    """
    check_mask(mask, check_values)
    if not use_triton(mask) or mask.numel() == 0:
        return build_mix_index_reference(mask)
    return MixIndex(mask.bool(), *_index(packed(mask)))


def check_index(index: MixIndex, x: Tensor, *names: str) -> None:
    """Refuse an index whose tables of these names are not those of tokens (B, L, D)."""
    for name in names:
        shape = getattr(index, name).shape
        if shape != x.shape[:2]:
            raise ValueError(f"index.{name} has shape {tuple(shape)}, expected {tuple(x.shape[:2])}")


def random_mix_mask(
    batch: int, num_tokens: int, generator: torch.Generator | None = None, device: torch.device | str = "cpu"
) -> Tensor:
    """Draw mixing masks: (B, L) bool with exactly L/2 ones in each row, made without a host sync.

    Raises:
        ValueError: for an odd number of tokens.
    """
    if num_tokens % 2:
        raise ValueError(f"num_tokens is {num_tokens}, expected an even number: half of the tokens are mixed")
    noise = torch.rand(batch, num_tokens, generator=generator, device=device)
    return noise.argsort(1).argsort(1) < num_tokens // 2
