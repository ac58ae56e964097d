"""Mixing two sources into one token sequence, and taking them apart by index tables, without compaction.

Source: MeDUET section "Mixing and demixing". The published code compacts the tokens of each source into a
half-length sequence. Only two things depend on that: the style convolution, which sees neighbours of the
same source, and the rank-paired swap. Both are index tables on the full grid.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class MixTables(NamedTuple):
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

    def complement(self) -> MixTables:
        """Tables of the inverted mask: the sources change names, everything else stays."""
        half = self.order.shape[1] // 2
        return MixTables(~self.mask, self.order.roll(half, 1), self.partner, self.previous, self.next)


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
    if not check_values:
        return
    if not bool(((mask == 0) | (mask == 1)).all()):
        raise ValueError("mask has values other than 0 and 1")
    ones = mask.bool().sum(1)
    uneven = (ones != mask.shape[1] // 2).nonzero().flatten().tolist()
    if uneven:
        raise ValueError(
            f"mask row {uneven[0]} has {int(ones[uneven[0]])} ones of {mask.shape[1]}, "
            "expected exactly half: swapping pairs the tokens of both sources by rank (mix ratio 0.5)"
        )


def mix_tables(mask: Tensor) -> MixTables:
    """Index tables of a mask, on its device, without waiting for it.

    Args:
        mask: (B, L) of 0 and 1 with exactly L/2 ones in each row (see :func:`check_mask`), any dtype.

    Raises:
        ValueError: if the shape is wrong. Values are the caller's: see :func:`check_mask`.
    """
    check_mask(mask, check_values=False)
    mask = mask.bool()
    half = mask.shape[1] // 2
    order = torch.argsort(mask.to(torch.uint8), dim=1, stable=True)
    # Neighbours within each half of `order`; the ends have none.
    halves = order.view(-1, 2, half)
    none = halves.new_full((halves.shape[0], 2, 1), -1)
    before = torch.cat([none, halves[:, :, :-1]], 2).flatten(1)
    after = torch.cat([halves[:, :, 1:], none], 2).flatten(1)

    def at_positions(by_rank: Tensor) -> Tensor:
        return torch.empty_like(order).scatter_(1, order, by_rank)

    return MixTables(
        mask, order, at_positions(order.roll(half, 1)), at_positions(before), at_positions(after)
    )


def _take(x: Tensor, index: Tensor) -> Tensor:
    """Rows of ``x`` (B, L, D) at ``index`` (B, L); zeros where the index is -1."""
    rows = torch.gather(x, 1, index.clamp(min=0).unsqueeze(-1).expand(-1, -1, x.shape[-1]))
    return torch.where((index >= 0).unsqueeze(-1), rows, rows.new_zeros(()))


def style_convolution(style: Tensor, weight: Tensor, tables: MixTables | None = None) -> Tensor:
    """Depthwise convolution of three taps along the token sequence, zero-padded.

    Args:
        style: (B, L, Ds).
        weight: (Ds, 1, 3), a depthwise Conv1d weight.
        tables: with them a token's neighbours are those of its own source; without, of the sequence.

    Returns:
        (B, L, Ds).
    """
    before, here, after = weight.to(style.dtype).squeeze(1).unbind(1)
    if tables is None:
        zero = torch.zeros_like(style[:, :1])
        left = torch.cat([zero, style[:, :-1]], 1)
        right = torch.cat([style[:, 1:], zero], 1)
    else:
        left, right = _take(style, tables.previous), _take(style, tables.next)
    return left * before + style * here + right * after


def assemble_streams(
    content: Tensor,
    style: Tensor,
    prefix: Tensor,
    mask_token: Tensor,
    position: Tensor,
    tables: MixTables,
    straight: bool = True,
    swapped: bool = True,
) -> Tensor:
    """The decoder's input sequences: each source alone, the other's places held by the mask token.

    Args:
        content, style: (B, L, E), the parts of a fused token that come from each factor, already projected
            to the decoder's width; a token is their sum.
        prefix: (B, P, E), in front of every sequence (CLS).
        mask_token: (E,).
        position: (P+L, E), added to every sequence.
        tables: of the mask that mixed the sources.
        straight: make the two streams whose tokens keep their own style.
        swapped: make the two streams whose tokens take the style of equal rank in the other source.

    Returns:
        (n*B, P+L, E), n = 2 or 4: straight source 1, straight source 2, swapped source 1, swapped source 2.

    Raises:
        ValueError: if neither kind is asked for.
    """
    fused = []
    if straight:
        fused.append(content + style)
    if swapped:
        fused.append(content + _take(style, tables.partner))
    if not fused:
        raise ValueError("assemble_streams: ask for straight or swapped streams")
    second = tables.mask.unsqueeze(-1)
    mask_token = mask_token.to(content.dtype)
    rows = [torch.where(hidden, mask_token, tokens) for tokens in fused for hidden in (second, ~second)]
    prefix = prefix.to(content.dtype)
    sequences = torch.cat([torch.cat([prefix, tokens], 1) for tokens in rows])
    return sequences + position.to(content.dtype)
