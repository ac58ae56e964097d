"""The style convolution: along the tokens of one source, wherever in the mixed sequence these stand.

Source: MeDUET sections "Network" (factorizer) and "Mixing and demixing". The published code compacts each
source into a half-length sequence first; here an index names the neighbours.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .backend import triton, use_triton
from .dtypes import accumulator, check_float
from .launch import launch
from .mix_index import MixIndex, check_index, take_rows
from .registration import Derivatives, register
from .tiles import token_grid

if triton is not None:
    import triton.language as tl

    from .tiles import load_rows, tile_columns, tile_rows

# 1. Reference


def style_convolution_reference(style: Tensor, weight: Tensor, index: MixIndex | None = None) -> Tensor:
    """Compute :func:`style_convolution` in plain PyTorch: its definition."""
    neighbours = (None, None) if index is None else (index.previous, index.next)
    return _define_style(_Style(style, weight, *neighbours))


def _define_style(x: _Style) -> Tensor:
    style = x.style
    before, here, after = x.weight.to(style.dtype).squeeze(1).unbind(1)  # (Ds,) each
    if x.previous is None or x.following is None:
        zero = torch.zeros_like(style[:, :1])  # (B, 1, Ds)
        left = torch.cat([zero, style[:, :-1]], 1)  # (B, L, Ds)
        right = torch.cat([style[:, 1:], zero], 1)  # (B, L, Ds)
    else:
        left, right = take_rows(style, x.previous), take_rows(style, x.following)
    return left * before + style * here + right * after  # (B, L, Ds)


# 2. Kernels

if triton is not None:

    @triton.jit
    def _neighbours(previous, following, batch, rows, length):
        # Of the same source, or in the plain sequence; -1 for none.
        if previous is None:
            before, after = rows - 1, rows + 1
        else:
            before = tl.load(previous + batch * length + rows, mask=rows < length, other=-1)
            after = tl.load(following + batch * length + rows, mask=rows < length, other=-1)
        return before, after

    @triton.jit
    def _taps(weight, valid, ACC: tl.constexpr):
        first = tl.load(weight, mask=valid, other=0.0).to(ACC)
        middle = tl.load(weight + 1, mask=valid, other=0.0).to(ACC)
        return first, middle, tl.load(weight + 2, mask=valid, other=0.0).to(ACC)

    @triton.jit
    def style_forward_kernel(
        style, weight, previous, following, out, length, width, stride_b, stride_l, stride_d,
        BLOCK_D: tl.constexpr, ROWS: tl.constexpr, STEPS: tl.constexpr, ACC: tl.constexpr,
    ):  # fmt: skip
        columns, valid = tile_columns(width, BLOCK_D)
        rows = tile_rows(0, STEPS, ROWS)
        batch = tl.program_id(2).to(tl.int64)
        before, after = _neighbours(previous, following, batch, rows, length)
        style += batch * stride_b + columns * stride_d
        first, middle, last = _taps(weight + columns * 3, valid, ACC)
        result = load_rows(style, before, length, valid, stride_l, ACC) * first
        result += load_rows(style, rows, length, valid, stride_l, ACC) * middle
        result += load_rows(style, after, length, valid, stride_l, ACC) * last
        at = (batch * length + rows) * width + columns
        tl.store(out + at, result.to(out.dtype.element_ty), mask=(rows < length) & valid)

    @triton.jit
    def style_backward_kernel(
        grad, style, weight, previous, following, grad_style, partial, length, width,
        grad_b, grad_l, grad_d, stride_b, stride_l, stride_d,
        BLOCK_D: tl.constexpr, ROWS: tl.constexpr, STEPS: tl.constexpr, ACC: tl.constexpr,
    ):  # fmt: skip
        # partial (B*chunks, Ds, 3): the weight's gradient over a chunk of rows. "Previous" and "next" are
        # inverse to each other, so both gradients need the incoming one at the row and its neighbours, and
        # style at the row alone.
        columns, valid = tile_columns(width, BLOCK_D)
        chunk = tl.program_id(1)
        batch = tl.program_id(2).to(tl.int64)
        grad += batch * grad_b + columns * grad_d
        style += batch * stride_b + columns * stride_d
        first_tap, middle_tap, last_tap = _taps(weight + columns * 3, valid, ACC)
        first = tl.zeros((ROWS, BLOCK_D), ACC)
        middle = tl.zeros((ROWS, BLOCK_D), ACC)
        last = tl.zeros((ROWS, BLOCK_D), ACC)
        for step in range(STEPS):
            rows = tile_rows(step, STEPS, ROWS)
            before, after = _neighbours(previous, following, batch, rows, length)
            here = load_rows(style, rows, length, valid, stride_l, ACC)
            from_here = load_rows(grad, rows, length, valid, grad_l, ACC)
            from_before = load_rows(grad, before, length, valid, grad_l, ACC)
            from_after = load_rows(grad, after, length, valid, grad_l, ACC)
            result = from_after * first_tap + from_here * middle_tap + from_before * last_tap
            at = (batch * length + rows) * width + columns
            tl.store(grad_style + at, result.to(grad_style.dtype.element_ty), mask=(rows < length) & valid)
            first += from_after * here
            middle += from_here * here
            last += from_before * here
        at = ((batch * tl.num_programs(1) + chunk) * width + columns) * 3
        tl.store(partial + at, tl.sum(first, 0)[None, :], mask=valid)
        tl.store(partial + at + 1, tl.sum(middle, 0)[None, :], mask=valid)
        tl.store(partial + at + 2, tl.sum(last, 0)[None, :], mask=valid)


# 3. Registration


class _Style(NamedTuple):
    style: Tensor  # (B, L, Ds)
    weight: Tensor  # (Ds, 1, 3)
    previous: Tensor | None  # (B, L) int64
    following: Tensor | None  # (B, L) int64


class _Gradients(NamedTuple):
    grad: Tensor  # (B, L, Ds)
    style: Tensor  # (B, L, Ds)
    weight: Tensor  # (Ds, 1, 3)
    previous: Tensor | None  # (B, L) int64
    following: Tensor | None  # (B, L) int64


def _fake_style(x: _Style | _Gradients) -> Tensor:
    return torch.empty_like(x.style, memory_format=torch.contiguous_format)


def _launch_style(x: _Style) -> Tensor:
    out = _fake_style(x)  # (B, L, Ds)
    grid, constants, options = token_grid("style_convolution_forward", x.style, *x.style.shape)
    tensors = (x.style, x.weight.contiguous(), x.previous, x.following, out)
    arguments = (*tensors, *x.style.shape[1:], *x.style.stride())
    launch(style_forward_kernel, grid, arguments, constants | {"ACC": accumulator(x.style.dtype)}, options)
    return out


def _fake_gradients(x: _Gradients) -> tuple[Tensor, Tensor]:
    return _fake_style(x), torch.empty_like(x.weight, memory_format=torch.contiguous_format)


def _launch_gradients(x: _Gradients) -> tuple[Tensor, Tensor]:
    batch, length, width = x.style.shape
    grad_style = _fake_style(x)  # (B, L, Ds)
    grid, constants, options = token_grid("style_convolution_backward", x.style, batch, length, width)
    precise = torch.promote_types(x.style.dtype, torch.float32)
    partial = x.style.new_empty(batch * grid[1], width, 3, dtype=precise)  # (B*chunks, Ds, 3)
    tensors = (x.grad, x.style, x.weight.contiguous(), x.previous, x.following, grad_style, partial)
    arguments = (*tensors, length, width, *x.grad.stride(), *x.style.stride())
    launch(style_backward_kernel, grid, arguments, constants | {"ACC": accumulator(x.style.dtype)}, options)
    return grad_style, partial.sum(0).to(x.weight.dtype).view(width, 1, 3)


def _setup_context(ctx: Any, x: _Style, output: Tensor) -> None:
    ctx.save_for_backward(*x)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
    return (*_style_backward(grad, *ctx.saved_tensors), None, None)


def _recall(ctx: Any, _: tuple[Tensor, ...]) -> _Style:
    return _Style(*ctx.saved_tensors)


_style = register(
    "style_convolution", _Style, "Tensor", _launch_style, _fake_style,
    Derivatives(_setup_context, _backward, _recall, _define_style),
)  # fmt: skip
_style_backward = register(
    "style_convolution_backward", _Gradients, "(Tensor, Tensor)", _launch_gradients, _fake_gradients
)


# 4. Public function


def style_convolution(style: Tensor, weight: Tensor, index: MixIndex | None = None) -> Tensor:
    """Convolve three taps along the token sequence, each channel for itself, zero-padded.

    Args:
        style: (B, L, Ds), any float dtype and strides.
        weight: (Ds, 1, 3), a depthwise Conv1d weight, in any float dtype.
        index: with it a token's neighbours are those of its own source; without, of the sequence.

    Returns:
        (B, L, Ds), in the dtype of ``style``.

    Raises:
        ValueError: if a shape does not fit, or style is not of a float dtype.
    """
    if style.dim() != 3:
        raise ValueError(f"style has shape {tuple(style.shape)}, expected (B, L, Ds)")
    check_float("style", style)
    if weight.shape != (style.shape[2], 1, 3):
        raise ValueError(f"weight has shape {tuple(weight.shape)}, expected {(style.shape[2], 1, 3)}")
    if index is not None:
        check_index(index, style, "previous", "next")
    if not use_triton(style) or style.numel() == 0:
        return style_convolution_reference(style, weight, index)
    if index is None:
        return _style(style, weight, None, None)
    return _style(style, weight, index.previous.contiguous(), index.next.contiguous())
