"""The style convolution: along the tokens of one source, wherever in the mixed sequence these stand.

Source: MeDUET sections "Network" (factorizer) and "Mixing and demixing". The published code compacts each
source into a half-length sequence first; here index name the neighbours.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .backend import triton, use_triton
from .dtypes import accumulator
from .launch import launch
from .mix_index import MixIndex, check_index, take_rows
from .registration import register
from .tiles import token_grid

if triton is not None:
    import triton.language as tl

    from .tiles import load_rows, tile_columns, tile_rows

# 1. Reference


def style_convolution_reference(style: Tensor, weight: Tensor, index: MixIndex | None = None) -> Tensor:
    """The definition of :func:`style_convolution`, in plain PyTorch."""
    before, here, after = weight.to(style.dtype).squeeze(1).unbind(1)
    if index is None:
        zero = torch.zeros_like(style[:, :1])
        left = torch.cat([zero, style[:, :-1]], 1)
        right = torch.cat([style[:, 1:], zero], 1)
    else:
        left, right = take_rows(style, index.previous), take_rows(style, index.next)
    return left * before + style * here + right * after


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


def _launch_style(style: Tensor, weight: Tensor, previous: Tensor | None, following: Tensor | None) -> Tensor:
    out = _fake_style(style, weight, previous, following)
    _, length, width = style.shape
    grid, constants, options = token_grid("style_convolution_forward", style, *style.shape)
    launch(
        style_forward_kernel,
        grid,
        (style, weight.contiguous(), previous, following, out, length, width, *style.stride()),
        {**constants, "ACC": accumulator(style.dtype)},
        "style_convolution_forward",
        options,
    )
    return out


def _fake_style(style: Tensor, weight: Tensor, previous: Tensor | None, following: Tensor | None) -> Tensor:
    return torch.empty_like(style, memory_format=torch.contiguous_format)


def _launch_style_backward(
    grad: Tensor, style: Tensor, weight: Tensor, previous: Tensor | None, following: Tensor | None
) -> tuple[Tensor, Tensor]:
    batch, length, width = style.shape
    grad_style = torch.empty_like(style, memory_format=torch.contiguous_format)
    grid, constants, options = token_grid("style_convolution_backward", style, *style.shape)
    partial_dtype = torch.promote_types(style.dtype, torch.float32)
    partial = style.new_empty(batch * grid[1], width, 3, dtype=partial_dtype)
    launch(
        style_backward_kernel,
        grid,
        (
            grad, style, weight.contiguous(), previous, following, grad_style, partial, length, width,
            *grad.stride(), *style.stride(),
        ),
        {**constants, "ACC": accumulator(style.dtype)},
        "style_convolution_backward",
        options,
    )  # fmt: skip
    return grad_style, partial.sum(0).to(weight.dtype).view(width, 1, 3)


def _fake_style_backward(
    grad: Tensor, style: Tensor, weight: Tensor, previous: Tensor | None, following: Tensor | None
) -> tuple[Tensor, Tensor]:
    grad_style = torch.empty_like(style, memory_format=torch.contiguous_format)
    return grad_style, torch.empty_like(weight, memory_format=torch.contiguous_format)


def _setup_style(ctx: Any, inputs: tuple[Tensor | None, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward_style(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
    return (*_style_backward(grad, *ctx.saved_tensors), None, None)


_style = register(
    "style_convolution(Tensor style, Tensor weight, Tensor? previous, Tensor? following) -> Tensor",
    _launch_style,
    _fake_style,
    _setup_style,
    _backward_style,
)
_style_backward = register(
    "style_convolution_backward(Tensor grad, Tensor style, Tensor weight, Tensor? previous, "
    "Tensor? following) -> (Tensor, Tensor)",
    _launch_style_backward,
    _fake_style_backward,
)


# 4. Public function


def style_convolution(style: Tensor, weight: Tensor, index: MixIndex | None = None) -> Tensor:
    """Depthwise convolution of three taps along the token sequence, zero-padded.

    Args:
        style: (B, L, Ds), any float dtype and strides.
        weight: (Ds, 1, 3), a depthwise Conv1d weight, in any float dtype.
        index: with them a token's neighbours are those of its own source; without, of the sequence.

    Returns:
        (B, L, Ds), in the dtype of ``style``.

    Raises:
        ValueError: if a shape does not fit.
    """
    if style.dim() != 3:
        raise ValueError(f"style has shape {tuple(style.shape)}, expected (B, L, Ds)")
    if weight.shape != (style.shape[2], 1, 3):
        raise ValueError(f"weight has shape {tuple(weight.shape)}, expected {(style.shape[2], 1, 3)}")
    if index is not None:
        check_index(index, style)
    if not use_triton(style) or style.numel() == 0:
        return style_convolution_reference(style, weight, index)
    if index is None:
        return _style(style, weight, None, None)
    return _style(style, weight, index.previous.contiguous(), index.next.contiguous())
