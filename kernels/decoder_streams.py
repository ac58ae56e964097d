"""The decoder's input streams out of a mixed sequence, each source alone, styles kept or swapped: one pass.

Source: MeDUET section "Mixing and demixing". The published code compacts each source, fuses it, and puts it
back at its positions. Only the rank-paired swap depends on that, and it is a table on the full grid.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .backend import triton, use_triton
from .dtypes import accumulator
from .launch import launch
from .mix_index import MixIndex, check_index, packed, take_rows
from .registration import register
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
    """The definition of :func:`assemble_streams`, in plain PyTorch."""
    fused = []
    if straight:
        fused.append(content + style)
    if swapped:
        fused.append(content + take_rows(style, index.partner))
    second = index.mask.unsqueeze(-1)
    mask_token = mask_token.to(content.dtype)
    rows = [torch.where(hidden, mask_token, tokens) for tokens in fused for hidden in (second, ~second)]
    prefix = prefix.to(content.dtype)
    sequences = torch.cat([torch.cat([prefix, tokens], 1) for tokens in rows])
    return sequences + position.to(content.dtype)


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
        columns, valid = tile_columns(width, BLOCK_D)
        places = tile_rows(0, STEPS, ROWS)
        batch, batches = tl.program_id(2).to(tl.int64), tl.num_programs(2).to(tl.int64)
        rows = places - prefixes
        token = (rows >= 0) & (rows < length)
        source = tl.load(second + batch * length + rows, mask=token, other=0)
        content += batch * content_b + columns * content_d
        style += batch * style_b + columns * style_d
        prefix += batch * prefix_b + columns * prefix_d
        # Each of the two is zero where the other is not.
        fixed = load_rows(content, rows, length, valid, content_l, ACC)
        fixed += load_rows(prefix, places, prefixes, valid, prefix_l, ACC)
        positions = load_rows(position + columns, places, prefixes + length, valid, width, ACC)
        shadow = tl.load(mask_token + columns, mask=valid, other=0.0).to(ACC)
        inside = (places < prefixes + length) & valid
        stride = batches * (prefixes + length) * width
        out += (batch * (prefixes + length) + places) * width + columns
        if STRAIGHT:
            fused = fixed + load_rows(style, rows, length, valid, style_l, ACC)
            for stream in tl.static_range(2):
                result = tl.where(token & (source != stream), shadow, fused) + positions
                tl.store(out + stream * stride, result.to(out.dtype.element_ty), mask=inside)
            out += 2 * stride
        if SWAPPED:
            other = tl.load(partner + batch * length + rows, mask=token, other=-1)
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
        columns, valid = tile_columns(width, BLOCK_D)
        chunk = tl.program_id(1)
        batch, batches = tl.program_id(2).to(tl.int64), tl.num_programs(2).to(tl.int64)
        grad += batch * stride_b + columns * stride_d
        shadow = tl.zeros((ROWS, BLOCK_D), ACC)
        for step in range(STEPS):
            places = tile_rows(step, STEPS, ROWS)
            rows = places - prefixes
            token = (rows >= 0) & (rows < length)
            lead = (rows < 0) & valid
            inside = (rows < length) & valid
            second_source = tl.load(second + batch * length + rows, mask=token, other=0) != 0
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
                    other = tl.load(partner + batch * length + rows, mask=token, other=0)
                    lent = hidden + (other - rows) * stride_l
                    styles += tl.load(lent, mask=token & valid, other=0.0).to(ACC)
            out = (batch * length + rows) * width + columns
            if grad_content is not None:
                tl.store(grad_content + out, tokens.to(grad_content.dtype.element_ty), mask=token & valid)
            if grad_style is not None:
                tl.store(grad_style + out, styles.to(grad_style.dtype.element_ty), mask=token & valid)
            if grad_prefix is not None:
                out = batch * prefix_b + places * width + columns
                total = (tokens + others).to(grad_prefix.dtype.element_ty)
                tl.store(grad_prefix + out, total, mask=lead)
            if partial is not None:
                shadow += tl.where(token, others, 0.0)
        if partial is not None:
            at = (batch * tl.num_programs(1) + chunk) * width + columns
            tl.store(partial + at, tl.sum(shadow, 0)[None, :], mask=valid)


# 3. Registration


def _launch_streams(
    content: Tensor,
    style: Tensor,
    prefix: Tensor,
    mask_token: Tensor,
    position: Tensor,
    second: Tensor,
    partner: Tensor,
    straight: bool,
    swapped: bool,
) -> Tensor:
    batch, length, width = content.shape
    out = _fake_streams(content, style, prefix, mask_token, position, second, partner, straight, swapped)
    grid, constants, options = token_grid("assemble_streams_forward", content, batch, out.shape[1], width)
    launch(
        streams_forward_kernel,
        grid,
        (
            content, style, prefix, mask_token.contiguous(), position.contiguous(), second, partner, out,
            length, prefix.shape[1], width, *content.stride(), *style.stride(), *prefix.stride(),
        ),
        {"STRAIGHT": straight, "SWAPPED": swapped, **constants, "ACC": accumulator(content.dtype)},
        "assemble_streams_forward",
        options,
    )  # fmt: skip
    return out


def _fake_streams(
    content: Tensor,
    style: Tensor,
    prefix: Tensor,
    mask_token: Tensor,
    position: Tensor,
    second: Tensor,
    partner: Tensor,
    straight: bool,
    swapped: bool,
) -> Tensor:
    batch, _, width = content.shape
    return content.new_empty(2 * (straight + swapped) * batch, position.shape[0], width)


def _launch_streams_backward(
    grad: Tensor,
    prefix: Tensor,
    mask_token: Tensor,
    second: Tensor,
    partner: Tensor,
    straight: bool,
    swapped: bool,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    (batch, length), (prefixes, width) = second.shape, prefix.shape[1:]
    outputs = _fake_streams_backward(grad, prefix, mask_token, second, partner, straight, swapped, wanted)
    grid, constants, options = token_grid("assemble_streams_backward", grad, batch, prefixes + length, width)
    partial = None
    if wanted[3]:
        partial_dtype = torch.promote_types(grad.dtype, torch.float32)
        partial = grad.new_empty(batch * grid[1], width, dtype=partial_dtype)
    launch(
        streams_backward_kernel,
        grid,
        (
            grad, second, partner,
            *(output if want else None for output, want in zip(outputs[:3], wanted[:3], strict=True)),
            partial, length, prefixes, width, *grad.stride(), prefixes * width,
        ),
        {"STRAIGHT": straight, "SWAPPED": swapped, **constants, "ACC": accumulator(grad.dtype)},
        "assemble_streams_backward",
        options,
    )  # fmt: skip
    if partial is None:
        return outputs
    return (*outputs[:3], partial.sum(0).to(mask_token.dtype))


def _fake_streams_backward(
    grad: Tensor,
    prefix: Tensor,
    mask_token: Tensor,
    second: Tensor,
    partner: Tensor,
    straight: bool,
    swapped: bool,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grid = (*second.shape, prefix.shape[2])
    content, style = (grad.new_empty(grid if want else 0) for want in wanted[:2])
    lead, token = (
        like.new_empty(like.shape if want else 0)
        for like, want in zip((prefix, mask_token), wanted[2:], strict=True)
    )
    return content, style, lead, token


def _setup_streams(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, _, prefix, mask_token, position, second, partner, ctx.straight, ctx.swapped = inputs
    ctx.position_dtype = position.dtype
    ctx.save_for_backward(prefix, mask_token, second, partner)


def _backward_streams(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    gradients: list[Tensor | None] = [None] * 9
    wanted = list(ctx.needs_input_grad[:4])
    if any(wanted):
        outputs = _streams_backward(grad, *ctx.saved_tensors, ctx.straight, ctx.swapped, wanted)
        gradients[:4] = [output if want else None for output, want in zip(outputs, wanted, strict=True)]
    if ctx.needs_input_grad[4]:
        # Positions are fixed in every model here: no kernel for learned ones.
        precise = torch.promote_types(grad.dtype, torch.float32)
        gradients[4] = grad.sum(0, dtype=precise).to(ctx.position_dtype)
    return tuple(gradients)


_streams = register(
    "assemble_streams(Tensor content, Tensor style, Tensor prefix, Tensor mask_token, Tensor position, "
    "Tensor second, Tensor partner, bool straight, bool swapped) -> Tensor",
    _launch_streams,
    _fake_streams,
    _setup_streams,
    _backward_streams,
)
_streams_backward = register(
    "assemble_streams_backward(Tensor grad, Tensor prefix, Tensor mask_token, Tensor second, Tensor partner, "
    "bool straight, bool swapped, bool[] wanted) -> (Tensor, Tensor, Tensor, Tensor)",
    _launch_streams_backward,
    _fake_streams_backward,
)


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
    """The decoder's input sequences: each source alone, the other's places held by the mask token.

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
    batch, length, width = content.shape
    if style.shape != content.shape or style.dtype != content.dtype:
        raise ValueError(
            f"style is {style.dtype} {tuple(style.shape)}, expected {content.dtype} {tuple(content.shape)}"
        )
    if prefix.dim() != 3 or prefix.shape[::2] != (batch, width):
        raise ValueError(f"prefix has shape {tuple(prefix.shape)}, expected ({batch}, P, {width})")
    expected = {"mask_token": (width,), "position": (prefix.shape[1] + length, width)}
    for name, value in (("mask_token", mask_token), ("position", position)):
        if value.shape != expected[name]:
            raise ValueError(f"{name} has shape {tuple(value.shape)}, expected {expected[name]}")
    check_index(index, content)
    inputs = (content, style, prefix, mask_token, position)
    if not use_triton(content) or content.numel() == 0:
        return assemble_streams_reference(*inputs, index, straight, swapped)
    return _streams(*inputs, packed(index.mask), index.partner.contiguous(), straight, swapped)
