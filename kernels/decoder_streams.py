"""The decoder's input streams out of a mixed sequence, each source alone, styles kept or swapped: one pass.

A row of six tokens; 23 is the content of place 2 with the style of place 3, m the mask token:

    place                 0   1   2   3   4   5
    mask                  0   1   1   0   1   0     0 shows source 1, 1 shows source 2
    partner               1   0   3   2   5   4     the place of equal rank in the other source
    straight, source 1   00   m   m  33   m  55
    straight, source 2    m  11  22   m  44   m
    swapped, source 1    01   m   m  32   m  54
    swapped, source 2     m  10  23   m  45   m

Source: MeDUET section "Mixing and demixing". The published code compacts each source, fuses it, and puts it
back at its positions. Only the rank-paired swap depends on that, and it is a table on the full grid.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .backend import triton, use_triton
from .dtypes import accumulator, check_float
from .launch import launch
from .mix_index import MixIndex, check_index, packed, take_rows
from .registration import Derivatives, register
from .tiles import token_grid

if triton is not None:
    import triton.language as tl

    from .tiles import load_rows, tile_columns, tile_rows

# 1. Reference


def assemble_streams_reference(
    content: Tensor,
    style: Tensor,
    prefix: Tensor,
    mask_token: Tensor,
    position: Tensor,
    index: MixIndex,
    straight: bool = True,
    swapped: bool = True,
) -> Tensor:
    """Compute :func:`assemble_streams` in plain PyTorch: its definition."""
    parts = (content, style, prefix, mask_token, position)
    return _define_streams(_Streams(*parts, index.mask, index.partner, straight, swapped))


def _define_streams(x: _Streams) -> Tensor:
    content = x.content
    fused = [content + x.style] if x.straight else []  # (B, L, E)
    if x.swapped:
        fused.append(content + take_rows(x.style, x.partner))  # (B, L, E)
    second = x.second.bool().unsqueeze(-1)  # (B, L, 1)
    mask_token, prefix = x.mask_token.to(content.dtype), x.prefix.to(content.dtype)  # (E,), (B, P, E)
    streams = [torch.where(hidden, mask_token, tokens) for tokens in fused for hidden in (second, ~second)]
    sequences = torch.cat([torch.cat([prefix, tokens], 1) for tokens in streams])  # (n*B, P+L, E)
    return sequences + x.position.to(content.dtype)  # (n*B, P+L, E)


# 2. Kernels

if triton is not None:

    @triton.jit
    def streams_forward_kernel(
        content, style, prefix, mask_token, position, second, partner, out, length, prefixes, width,
        content_b, content_l, content_d, style_b, style_l, style_d, prefix_b, prefix_l, prefix_d,
        STRAIGHT: tl.constexpr, SWAPPED: tl.constexpr,
        BLOCK_D: tl.constexpr, ROWS: tl.constexpr, STEPS: tl.constexpr, ACC: tl.constexpr,
    ):  # fmt: skip
        # `places` count from the first prefix row, `rows` from the first token.
        columns, valid = tile_columns(width, BLOCK_D)  # (1, BLOCK_D)
        places = tile_rows(0, STEPS, ROWS)  # (ROWS, 1)
        batch, batches = tl.program_id(2).to(tl.int64), tl.num_programs(2).to(tl.int64)
        rows = places - prefixes
        token = (rows >= 0) & (rows < length)
        source = tl.load(second + batch * length + rows, mask=token, other=0)  # of (B, L)
        content += batch * content_b + columns * content_d  # (B, L, E)
        style += batch * style_b + columns * style_d  # (B, L, E)
        prefix += batch * prefix_b + columns * prefix_d  # (B, P, E)
        # Each of the two is zero where the other is not.
        fixed = load_rows(content, rows, length, valid, content_l, ACC)  # (ROWS, BLOCK_D), as all below
        fixed += load_rows(prefix, places, prefixes, valid, prefix_l, ACC)
        positions = load_rows(position + columns, places, prefixes + length, valid, width, ACC)  # of (P+L, E)
        shadow = tl.load(mask_token + columns, mask=valid, other=0.0).to(ACC)  # of (E,)
        inside = (places < prefixes + length) & valid
        stride = batches * (prefixes + length) * width  # of a stream
        out += (batch * (prefixes + length) + places) * width + columns  # (n*B, P+L, E)
        if STRAIGHT:
            fused = fixed + load_rows(style, rows, length, valid, style_l, ACC)
            for stream in tl.static_range(2):
                result = tl.where(token & (source != stream), shadow, fused) + positions
                tl.store(out + stream * stride, result.to(out.dtype.element_ty), mask=inside)
            out += 2 * stride
        if SWAPPED:
            other = tl.load(partner + batch * length + rows, mask=token, other=-1)  # of (B, L)
            fused = fixed + load_rows(style, other, length, valid, style_l, ACC)
            for stream in tl.static_range(2):
                result = tl.where(token & (source != stream), shadow, fused) + positions
                tl.store(out + stream * stride, result.to(out.dtype.element_ty), mask=inside)

    @triton.jit
    def streams_backward_kernel(
        grad, second, partner, grad_content, grad_style, grad_prefix, partial, length, prefixes, width,
        stride_b, stride_l, stride_d, prefix_b,
        STRAIGHT: tl.constexpr, SWAPPED: tl.constexpr,
        BLOCK_D: tl.constexpr, ROWS: tl.constexpr, STEPS: tl.constexpr, ACC: tl.constexpr,
    ):  # fmt: skip
        # partial (B*chunks, E): the mask token's gradient over a chunk of rows. Gradients that are None are
        # not wanted. Prefix rows count as source 1: shown and hidden streams together are all streams.
        columns, valid = tile_columns(width, BLOCK_D)  # (1, BLOCK_D)
        chunk = tl.program_id(1)
        batch, batches = tl.program_id(2).to(tl.int64), tl.num_programs(2).to(tl.int64)
        grad += batch * stride_b + columns * stride_d  # (n*B, P+L, E)
        shadow = tl.zeros((ROWS, BLOCK_D), ACC)
        for step in range(STEPS):
            places = tile_rows(step, STEPS, ROWS)  # (ROWS, 1)
            rows = places - prefixes
            token = (rows >= 0) & (rows < length)
            lead = (rows < 0) & valid
            inside = (rows < length) & valid
            second_source = tl.load(second + batch * length + rows, mask=token, other=0) != 0  # of (B, L)
            at = grad + places * stride_l
            shown = at + tl.where(second_source, batches, 0) * stride_b
            hidden = at + tl.where(second_source, 0, batches) * stride_b
            # Where the mask token needs no gradient hidden rows are not read.
            wanted = lead if partial is None else inside
            tokens = tl.zeros((ROWS, BLOCK_D), ACC)
            styles = tl.zeros((ROWS, BLOCK_D), ACC)
            others = tl.zeros((ROWS, BLOCK_D), ACC)
            if STRAIGHT:
                tokens += tl.load(shown, mask=inside, other=0.0).to(ACC)
                styles += tokens
                others += tl.load(hidden, mask=wanted, other=0.0).to(ACC)
                shown += 2 * batches * stride_b
                hidden += 2 * batches * stride_b
            if SWAPPED:
                tokens += tl.load(shown, mask=inside, other=0.0).to(ACC)
                others += tl.load(hidden, mask=wanted, other=0.0).to(ACC)
                if grad_style is not None:
                    # This token's style went to its partner, in the other source's stream.
                    other = tl.load(partner + batch * length + rows, mask=token, other=0)  # of (B, L)
                    lent = hidden + (other - rows) * stride_l
                    styles += tl.load(lent, mask=token & valid, other=0.0).to(ACC)
            out = (batch * length + rows) * width + columns  # (B, L, E)
            if grad_content is not None:
                tl.store(grad_content + out, tokens.to(grad_content.dtype.element_ty), mask=token & valid)
            if grad_style is not None:
                tl.store(grad_style + out, styles.to(grad_style.dtype.element_ty), mask=token & valid)
            if grad_prefix is not None:
                out = batch * prefix_b + places * width + columns  # (B, P, E)
                total = (tokens + others).to(grad_prefix.dtype.element_ty)
                tl.store(grad_prefix + out, total, mask=lead)
            if partial is not None:
                shadow += tl.where(token, others, 0.0)
        if partial is not None:
            at = (batch * tl.num_programs(1) + chunk) * width + columns
            tl.store(partial + at, tl.sum(shadow, 0)[None, :], mask=valid)


# 3. Registration


class _Streams(NamedTuple):
    content: Tensor  # (B, L, E)
    style: Tensor  # (B, L, E)
    prefix: Tensor  # (B, P, E)
    mask_token: Tensor  # (E,)
    position: Tensor  # (P+L, E)
    second: Tensor  # (B, L) uint8, 1 where the token shows source 2
    partner: Tensor  # (B, L) int64
    straight: bool
    swapped: bool


class _Gradients(NamedTuple):
    grad: Tensor  # (n*B, P+L, E)
    prefix: Tensor  # (B, P, E)
    mask_token: Tensor  # (E,)
    second: Tensor  # (B, L) uint8
    partner: Tensor  # (B, L) int64
    straight: bool
    swapped: bool
    wanted: list[bool]  # of content, style, prefix, mask token


def _fake_streams(x: _Streams) -> Tensor:
    batch, _, width = x.content.shape
    return x.content.new_empty(2 * (x.straight + x.swapped) * batch, x.position.shape[0], width)


def _launch_streams(x: _Streams) -> Tensor:
    (batch, length, width), prefixes = x.content.shape, x.prefix.shape[1]
    out = _fake_streams(x)  # (n*B, P+L, E)
    rows = prefixes + length
    grid, constants, options = token_grid("assemble_streams_forward", x.content, batch, rows, width)
    tensors = (*x[:3], x.mask_token.contiguous(), x.position.contiguous(), x.second, x.partner, out)
    strides = (*x.content.stride(), *x.style.stride(), *x.prefix.stride())
    arguments = (*tensors, length, prefixes, width, *strides)
    constants |= {"STRAIGHT": x.straight, "SWAPPED": x.swapped, "ACC": accumulator(x.content.dtype)}
    launch(streams_forward_kernel, grid, arguments, constants, options)
    return out


def _fake_gradients(x: _Gradients) -> tuple[Tensor, ...]:
    tokens = (*x.second.shape, x.prefix.shape[2])
    content, style = (x.grad.new_empty(tokens if want else 0) for want in x.wanted[:2])
    prefix = x.prefix.new_empty(x.prefix.shape if x.wanted[2] else 0)
    return content, style, prefix, x.mask_token.new_empty(x.mask_token.shape if x.wanted[3] else 0)


def _launch_gradients(x: _Gradients) -> tuple[Tensor, ...]:
    (batch, length), (prefixes, width) = x.second.shape, x.prefix.shape[1:]
    *outputs, grad_token = _fake_gradients(x)  # (B, L, E), (B, L, E), (B, P, E), (E,)
    rows = prefixes + length
    grid, constants, options = token_grid("assemble_streams_backward", x.grad, batch, rows, width)
    partial = None
    if x.wanted[3]:
        precise = torch.promote_types(x.grad.dtype, torch.float32)
        partial = x.grad.new_empty(batch * grid[1], width, dtype=precise)
    stored = (output if want else None for output, want in zip(outputs, x.wanted[:3], strict=True))
    sizes = (length, prefixes, width, *x.grad.stride(), prefixes * width)
    constants |= {"STRAIGHT": x.straight, "SWAPPED": x.swapped, "ACC": accumulator(x.grad.dtype)}
    arguments = (x.grad, x.second, x.partner, *stored, partial, *sizes)
    launch(streams_backward_kernel, grid, arguments, constants, options)
    return *outputs, grad_token if partial is None else partial.sum(0).to(grad_token.dtype)


def _setup_context(ctx: Any, x: _Streams, output: Tensor) -> None:
    ctx.kinds, ctx.position_dtype = (x.straight, x.swapped), x.position.dtype
    ctx.save_for_backward(x.prefix, x.mask_token, x.second, x.partner)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    gradients: list[Tensor | None] = [None] * len(_Streams._fields)
    wanted = list(ctx.needs_input_grad[:4])
    if any(wanted):
        found = _streams_backward(grad, *ctx.saved_tensors, *ctx.kinds, wanted)
        gradients[:4] = [value if want else None for value, want in zip(found, wanted, strict=True)]
    if ctx.needs_input_grad[4]:
        # Positions are fixed in every model here: no kernel for learned ones.
        precise = torch.promote_types(grad.dtype, torch.float32)
        gradients[4] = grad.sum(0, dtype=precise).to(ctx.position_dtype)
    return tuple(gradients)


def _recall(ctx: Any, grads: tuple[Tensor, ...]) -> _Streams:
    prefix, mask_token, *tables = ctx.saved_tensors
    zero, rows, width = grads[0].new_zeros(()), *grads[0].shape[1:]  # linear: all is zero
    tokens = zero.expand(*tables[0].shape, width)  # (B, L, E)
    position = zero.to(ctx.position_dtype).expand(rows, width)  # (P+L, E)
    return _Streams(tokens, tokens, prefix, mask_token, position, *tables, *ctx.kinds)


_streams = register(
    "assemble_streams", _Streams, "Tensor", _launch_streams, _fake_streams,
    Derivatives(_setup_context, _backward, _recall, _define_streams),
)  # fmt: skip
_streams_backward = register(
    "assemble_streams_backward", _Gradients, "(Tensor, Tensor, Tensor, Tensor)",
    _launch_gradients, _fake_gradients,
)  # fmt: skip


# 4. Public function


def assemble_streams(
    content: Tensor,
    style: Tensor,
    prefix: Tensor,
    mask_token: Tensor,
    position: Tensor,
    index: MixIndex,
    straight: bool = True,
    swapped: bool = True,
) -> Tensor:
    """Assemble the decoder's input sequences: each source alone, the mask token in the other's places.

    Args:
        content, style: (B, L, E), the parts of a fused token that come from each factor, already projected
            to the decoder's width, in the same float dtype; a token is their sum.
        prefix: (B, P, E), in front of every sequence (CLS).
        mask_token: (E,).
        position: (P+L, E), added to every sequence.
        index: of the mask that mixed the sources.
        straight: make the two streams whose tokens keep their own style.
        swapped: make the two streams whose tokens take the style of equal rank in the other source.

    Returns:
        (n*B, P+L, E), n = 2 or 4, in the dtype of ``content``: straight source 1, straight source 2, swapped
        source 1, swapped source 2.

    Raises:
        ValueError: if neither kind is asked for, or a shape or dtype does not fit.
    """
    if not (straight or swapped):
        raise ValueError("assemble_streams: ask for straight or swapped streams")
    if content.dim() != 3:
        raise ValueError(f"content has shape {tuple(content.shape)}, expected (B, L, E)")
    check_float("content", content)
    batch, length, width = content.shape
    if style.shape != content.shape or style.dtype != content.dtype:
        raise ValueError(
            f"style is {style.dtype} {tuple(style.shape)}, expected {content.dtype} {tuple(content.shape)}"
        )
    if prefix.dim() != 3 or prefix.shape[::2] != (batch, width):
        raise ValueError(f"prefix has shape {tuple(prefix.shape)}, expected ({batch}, P, {width})")
    for name, value, expected in (
        ("mask_token", mask_token, (width,)),
        ("position", position, (prefix.shape[1] + length, width)),
    ):
        if value.shape != expected:
            raise ValueError(f"{name} has shape {tuple(value.shape)}, expected {expected}")
    check_index(index, content, "mask", "partner")
    parts = (content, style, prefix, mask_token, position)
    if not use_triton(content) or content.numel() == 0:
        return assemble_streams_reference(*parts, index, straight, swapped)
    return _streams(*parts, packed(index.mask), index.partner.contiguous(), straight, swapped)
