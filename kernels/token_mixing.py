"""Mixing two sources into one token sequence, taking them apart, putting them together: for any model.

Source: MeDUET section "Mixing and demixing". Its own model mixes on the load side of the patch embedding and
never compacts (see ``patch_embed.py`` and ``decoder_streams.py``).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .backend import triton, use_triton
from .dtypes import accumulator
from .launch import launch
from .mix_index import check_ones, packed, token_order, token_order_reference
from .registration import Derivatives, register
from .tiles import token_grid

if triton is not None:
    import triton.language as tl

    from .tiles import tile_columns, tile_rows

# 1. References


def mix_tokens_reference(x: Tensor, mask: Tensor) -> Tensor:
    """Compute :func:`mix_tokens` in plain PyTorch: its definition."""
    return torch.where(mask.bool().unsqueeze(-1), x.flip(0), x)  # (B, L, D)


def _define_mix(x: _Mixed) -> Tensor:
    if not x.adjoint:
        return mix_tokens_reference(x.x, x.second)  # (B, L, D)
    lent = torch.where(x.second.bool().unsqueeze(-1), x.x, 0.0)  # (B, L, D)
    return x.x - lent + lent.flip(0)  # (B, L, D)


def demix_tokens_reference(x: Tensor, mask: Tensor, num_second: int | None = None) -> tuple[Tensor, Tensor]:
    """Compute :func:`demix_tokens` in plain PyTorch: its definition."""
    num_second = x.shape[1] // 2 if num_second is None else num_second
    return _define_demix(_Whole(x, token_order_reference(mask.bool()), num_second))


def _define_demix(x: _Whole) -> tuple[Tensor, Tensor]:
    tokens = torch.gather(x.x, 1, x.order.unsqueeze(-1).expand_as(x.x))  # (B, L, D), source 1 first
    first = tokens.shape[1] - x.num_second
    return tokens[:, :first], tokens[:, first:]


def remix_tokens_reference(z1: Tensor, z2: Tensor, mask: Tensor) -> Tensor:
    """Compute :func:`remix_tokens` in plain PyTorch: its definition."""
    return _define_remix(_Halves(z1, z2, token_order_reference(mask.bool())))


def _define_remix(x: _Halves) -> Tensor:
    tokens = torch.cat([x.first, x.second], 1)  # (B, L, D), source 1 first
    index = x.order.unsqueeze(-1).expand_as(tokens)  # (B, L, D)
    return torch.empty_like(tokens).scatter(1, index, tokens)  # (B, L, D)


# 2. Kernels

if triton is not None:

    @triton.jit
    def mix_tokens_kernel(
        x, mask, out, length, width, stride_b, stride_l, stride_d,
        ADJOINT: tl.constexpr,
        BLOCK_D: tl.constexpr, ROWS: tl.constexpr, STEPS: tl.constexpr, ACC: tl.constexpr,
    ):  # fmt: skip
        columns, valid = tile_columns(width, BLOCK_D)
        rows = tile_rows(0, STEPS, ROWS)
        batch = tl.program_id(2).to(tl.int64)
        opposite = tl.num_programs(2) - 1 - batch
        inside = rows < length
        x += rows * stride_l + columns * stride_d
        swapped = tl.load(mask + batch * length + rows, mask=inside, other=0) != 0
        if ADJOINT:
            # A sample gets its own gradient where it showed itself, and its partner's where that showed it.
            lent = tl.load(mask + opposite * length + rows, mask=inside, other=0) != 0
            own = tl.load(x + batch * stride_b, mask=inside & (swapped == 0) & valid, other=0.0).to(ACC)
            result = own + tl.load(x + opposite * stride_b, mask=lent & valid, other=0.0).to(ACC)
        else:
            source = tl.where(swapped, opposite, batch)
            result = tl.load(x + source * stride_b, mask=inside & valid)
        at = (batch * length + rows) * width + columns
        tl.store(out + at, result.to(out.dtype.element_ty), mask=inside & valid)

    @triton.jit
    def token_halves_kernel(
        tokens, first, second, order, length, num_first, width,
        stride_b, stride_l, stride_d, first_b, first_l, first_d, second_b, second_l, second_d,
        SPLIT: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, STEPS: tl.constexpr,
    ):  # fmt: skip
        # Copies rows between the sequence and its two compact halves: a bijection, so either direction is
        # the gradient of the other.
        columns, valid = tile_columns(width, BLOCK_D)
        rank = tile_rows(0, STEPS, ROWS)
        batch = tl.program_id(2).to(tl.int64)
        position = tl.load(order + batch * length + rank, mask=rank < length, other=0)
        in_first = (rank < num_first) & valid
        in_second = (rank >= num_first) & (rank < length) & valid
        tokens += batch * stride_b + position * stride_l + columns * stride_d
        first += batch * first_b + rank * first_l + columns * first_d
        second += batch * second_b + (rank - num_first) * second_l + columns * second_d
        if SPLIT:
            row = tl.load(tokens, mask=(rank < length) & valid)
            tl.store(first, row, mask=in_first)
            tl.store(second, row, mask=in_second)
        else:
            row = tl.where(in_first, tl.load(first, mask=in_first), tl.load(second, mask=in_second))
            tl.store(tokens, row, mask=(rank < length) & valid)


# 3. Registration


class _Mixed(NamedTuple):
    x: Tensor  # (B, L, D)
    second: Tensor  # (B, L) uint8, 1 takes the partner's token
    adjoint: bool


class _Whole(NamedTuple):
    x: Tensor  # (B, L, D)
    order: Tensor  # (B, L) int64
    num_second: int | torch.SymInt


class _Halves(NamedTuple):
    first: Tensor  # (B, L1, D)
    second: Tensor  # (B, L2, D)
    order: Tensor  # (B, L) int64


def _fake_mix(x: _Mixed) -> Tensor:
    return torch.empty_like(x.x, memory_format=torch.contiguous_format)


def _launch_mix(x: _Mixed) -> Tensor:
    out = _fake_mix(x)  # (B, L, D)
    grid, constants, options = token_grid("mix_tokens", x.x, *x.x.shape)
    arguments = (x.x, x.second, out, *x.x.shape[1:], *x.x.stride())
    constants |= {"ADJOINT": x.adjoint, "ACC": accumulator(x.x.dtype)}
    launch(mix_tokens_kernel, grid, arguments, constants, options)
    return out


def _setup_mix(ctx: Any, x: _Mixed, output: Tensor) -> None:
    ctx.adjoint = x.adjoint
    ctx.save_for_backward(x.second)


def _backward_mix(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    return _mix(grad, ctx.saved_tensors[0], not ctx.adjoint), None, None


def _recall_mix(ctx: Any, grads: tuple[Tensor, ...]) -> _Mixed:
    return _Mixed(torch.zeros_like(grads[0]), ctx.saved_tensors[0], ctx.adjoint)  # linear: any x


def _launch_halves(tokens: Tensor, first: Tensor, second: Tensor, order: Tensor, split: bool) -> None:
    """Copy tokens (B, L, D) into both halves, or both halves into tokens."""
    grid, constants, options = token_grid("token_halves", tokens, *tokens.shape)
    sizes = (tokens.shape[1], first.shape[1], tokens.shape[2])
    strides = (*tokens.stride(), *first.stride(), *second.stride())
    arguments = (tokens, first, second, order, *sizes, *strides)
    launch(token_halves_kernel, grid, arguments, {"SPLIT": split, **constants}, options)


def _fake_demix(x: _Whole) -> tuple[Tensor, Tensor]:
    batch, length, width = x.x.shape
    return x.x.new_empty(batch, length - x.num_second, width), x.x.new_empty(batch, x.num_second, width)


def _launch_demix(x: _Whole) -> tuple[Tensor, Tensor]:
    first, second = _fake_demix(x)  # (B, L1, D), (B, L2, D)
    _launch_halves(x.x, first, second, x.order, split=True)
    return first, second


def _setup_demix(ctx: Any, x: _Whole, output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(x.order)


def _backward_demix(ctx: Any, grad_first: Tensor, grad_second: Tensor) -> tuple[Tensor, None, None]:
    return _remix(grad_first, grad_second, ctx.saved_tensors[0]), None, None


def _recall_demix(ctx: Any, grads: tuple[Tensor, ...]) -> _Whole:
    return _Whole(torch.cat(grads, 1), ctx.saved_tensors[0], grads[1].shape[1])  # linear: any x


def _fake_remix(x: _Halves) -> Tensor:
    batch, num_first, width = x.first.shape
    return x.first.new_empty(batch, num_first + x.second.shape[1], width)


def _launch_remix(x: _Halves) -> Tensor:
    tokens = _fake_remix(x)  # (B, L, D)
    _launch_halves(tokens, x.first, x.second, x.order, split=False)
    return tokens


def _setup_remix(ctx: Any, x: _Halves, output: Tensor) -> None:
    ctx.num_second = x.second.shape[1]
    ctx.save_for_backward(x.order)


def _backward_remix(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
    return (*_demix(grad, ctx.saved_tensors[0], ctx.num_second), None)


def _recall_remix(ctx: Any, grads: tuple[Tensor, ...]) -> _Halves:
    first = grads[0].shape[1] - ctx.num_second
    return _Halves(grads[0][:, :first], grads[0][:, first:], ctx.saved_tensors[0])  # linear: any halves


_mix = register(
    "mix_tokens", _Mixed, "Tensor", _launch_mix, _fake_mix,
    Derivatives(_setup_mix, _backward_mix, _recall_mix, _define_mix),
)  # fmt: skip
_demix = register(
    "demix_tokens", _Whole, "(Tensor, Tensor)", _launch_demix, _fake_demix,
    Derivatives(_setup_demix, _backward_demix, _recall_demix, _define_demix),
)  # fmt: skip
_remix = register(
    "remix_tokens", _Halves, "Tensor", _launch_remix, _fake_remix,
    Derivatives(_setup_remix, _backward_remix, _recall_remix, _define_remix),
)  # fmt: skip


# 4. Public functions


def _check_tokens(shape: tuple[int, ...], mask: Tensor, num_second: int, check_values: bool) -> None:
    if mask.shape != shape[:2]:
        raise ValueError(f"mask has shape {tuple(mask.shape)}, expected {tuple(shape[:2])}")
    if not 0 <= num_second <= shape[1]:
        raise ValueError(f"num_second is {num_second}, expected 0 to {shape[1]}, the number of tokens")
    if check_values:
        check_ones(mask, num_second, f"num_second = {num_second}")


def mix_tokens(x: Tensor, mask: Tensor) -> Tensor:
    """Mix every sample with its batch-flip partner, token by token.

    Args:
        x: (B, L, D), any float dtype and strides. Sample b's partner is sample B-1-b.
        mask: (B, L) of 0 and 1, any dtype and any number of ones: 1 takes the partner's token.

    Returns:
        (B, L, D).

    Raises:
        ValueError: if a shape does not fit.
    """
    if x.dim() != 3:
        raise ValueError(f"x has shape {tuple(x.shape)}, expected (B, L, D)")
    _check_tokens(x.shape, mask, 0, check_values=False)
    if not use_triton(x) or x.numel() == 0:
        return mix_tokens_reference(x, mask)
    return _mix(x, packed(mask), False)


def demix_tokens(
    x: Tensor, mask: Tensor, num_second: int | None = None, check_values: bool = False
) -> tuple[Tensor, Tensor]:
    """Take a mixed sequence apart into its two sources, each compact and in raster order.

    Args:
        x: (B, L, D), any float dtype and strides.
        mask: (B, L) of 0 and 1, any dtype, with the same number of ones in every row.
        num_second: that number, any from 0 to L; L//2 if None. It is an argument so that nothing waits for
            the device. In a row with another number of ones the halves hold tokens of the wrong source.
        check_values: refuse such rows, which waits for the device.

    Returns:
        Source 1 (B, L-num_second, D), where the mask is 0, and source 2 (B, num_second, D), where it is 1.

    Raises:
        ValueError: if a shape does not fit; with ``check_values`` also for the mask's values.
    """
    if x.dim() != 3:
        raise ValueError(f"x has shape {tuple(x.shape)}, expected (B, L, D)")
    num_second = x.shape[1] // 2 if num_second is None else num_second
    _check_tokens(x.shape, mask, num_second, check_values)
    if not use_triton(x) or x.numel() == 0:
        return demix_tokens_reference(x, mask, num_second)
    return _demix(x, token_order(packed(mask)), num_second)


def remix_tokens(z1: Tensor, z2: Tensor, mask: Tensor, check_values: bool = False) -> Tensor:
    """Put two compact sources back at their positions, the inverse of :func:`demix_tokens`.

    Args:
        z1: (B, L1, D), source 1, any float dtype and strides.
        z2: (B, L2, D), source 2, in the dtype of ``z1``.
        mask: (B, L1+L2) of 0 and 1, any dtype, with L2 ones in every row.
        check_values: refuse rows with another number of ones, which waits for the device.

    Returns:
        (B, L1+L2, D).

    Raises:
        ValueError: if a shape or dtype does not fit; with ``check_values`` also for the mask's values.
    """
    if z1.dim() != 3:
        raise ValueError(f"z1 has shape {tuple(z1.shape)}, expected (B, L1, D)")
    batch, num_first, width = z1.shape
    if z2.dim() != 3 or z2.shape[::2] != (batch, width) or z2.dtype != z1.dtype:
        raise ValueError(f"z2 is {z2.dtype} {tuple(z2.shape)}, expected {z1.dtype} ({batch}, L2, {width})")
    num_second = z2.shape[1]
    _check_tokens((batch, num_first + num_second), mask, num_second, check_values)
    if not use_triton(z1) or z1.numel() + z2.numel() == 0:
        return remix_tokens_reference(z1, z2, mask)
    return _remix(z1, z2, token_order(packed(mask)))
