"""The patch embedding as a matrix product whose left factor is gathered from the volume.

Source: MeDUET section "Network" (patch embedding with kernel = stride = patch, raster token order).

The kernels see their input as *blocks* (B, C, gx, px, gy, py, gz, pz), which a volume of any strides and a
sequence of predicted tokens both are without a copy.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .backend import interpreted, triton, use_triton
from .dtypes import accumulator, autocast_dtype, check_float
from .launch import Options, config, launch
from .mix_index import packed
from .patchify import patch_grid, patchify_3d
from .registration import Derivatives, register

if triton is not None:
    import triton.language as tl

    from .patch_embed_kernels import (
        patch_embed_forward_kernel,
        patch_embed_grad_weight_kernel,
        patch_embed_grad_x_kernel,
    )

# 1. Reference


def _mixed(patches: Tensor, mask: Tensor | None) -> Tensor:
    """Take the partner's patch (B, L, K) where the mask is 1."""
    if mask is None:
        return patches
    return torch.where(mask.bool().unsqueeze(-1), patches.flip(0), patches)  # (B, L, K)


def _project(
    patches: Tensor, weight: Tensor, bias: Tensor | None, position: Tensor | None, num_prefix_tokens: int
) -> Tensor:
    """Project patches (B, L, K), add positions, put zero rows in front: (B, P+L, D)."""
    tokens = F.linear(patches, weight, bias)  # (B, L, D)
    if position is not None:
        tokens = tokens + position.to(tokens.dtype)  # (B, L, D)
    return F.pad(tokens, (0, 0, num_prefix_tokens, 0)) if num_prefix_tokens else tokens


def patch_embed_3d_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    position: Tensor | None = None,
    source_mask: Tensor | None = None,
    num_prefix_tokens: int = 0,
) -> Tensor:
    """Compute :func:`patch_embed_3d` in plain PyTorch: its definition."""
    patches = patchify_3d(x, (weight.shape[2], weight.shape[3], weight.shape[4]), "first")  # (B, L, K)
    return _project(_mixed(patches, source_mask), weight.flatten(1), bias, position, num_prefix_tokens)


def patch_embed_tokens_reference(
    tokens: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    position: Tensor | None = None,
    num_prefix_tokens: int = 0,
) -> Tensor:
    """Compute :func:`patch_embed_tokens` in plain PyTorch: its definition."""
    flat = weight.permute(0, 2, 3, 4, 1).flatten(1)  # (D, K)
    return _project(tokens, flat, bias, position, num_prefix_tokens)


# 2. Kernels: patch_embed_kernels.py

# 3. Registration


class _Embed(NamedTuple):
    blocks: Tensor  # (B, C, gx, px, gy, py, gz, pz)
    weight: Tensor  # (D, C, px, py, pz)
    bias: Tensor | None  # (D,)
    position: Tensor | None  # (L, D)
    mask: Tensor | None  # (B, L) uint8
    prefix: int


class _Gradient(NamedTuple):
    grad: Tensor  # (B, P+L, D)
    blocks: Tensor  # (B, C, gx, px, gy, py, gz, pz)
    weight: Tensor  # (D, C, px, py, pz)
    mask: Tensor | None  # (B, L) uint8
    prefix: int


class _WeightGradient(NamedTuple):
    grad: Tensor  # (B, P+L, D)
    blocks: Tensor  # (B, C, gx, px, gy, py, gz, pz)
    weight: Tensor  # (D, C, px, py, pz)
    mask: Tensor | None  # (B, L) uint8
    prefix: int
    with_bias: bool


class _Plan(NamedTuple):
    """How kernels walk over blocks of given sizes and strides.

    Attributes:
        order: the patch's axes (c, px, py, pz), slowest in memory first.
        extents, strides: of those axes, merged where one continues the next; four, slowest first.
        vector: neighbouring values that lie together, aligned: a power of two, 16 bytes at most.
    """

    order: tuple[int, ...]
    extents: tuple[int, ...]
    strides: tuple[int, ...]
    vector: int


@functools.lru_cache(maxsize=256)
def _plan(sizes: tuple[int, ...], strides: tuple[int, ...], itemsize: int) -> _Plan:
    axes = (1, 3, 5, 7)
    order = sorted(range(4), key=lambda axis: -strides[axes[axis]])
    merged: list[tuple[int, int]] = []
    for axis in order:
        extent, stride = sizes[axes[axis]], strides[axes[axis]]
        if extent == 1:
            continue
        if merged and merged[-1][1] == extent * stride:
            merged[-1] = (merged[-1][0] * extent, stride)
        else:
            merged.append((extent, stride))
    merged = [(1, 0)] * (4 - len(merged)) + merged
    extent, stride = merged[-1]
    vector = 1
    if stride == 1:
        others = [stride for _, stride in merged[:-1]]
        others += [strides[axis] for axis in (0, 2, 4, 6) if sizes[axis] > 1]
        vector = math.gcd(16 // itemsize, extent, *others)
    return _Plan(tuple(order), tuple(pair[0] for pair in merged), tuple(pair[1] for pair in merged), vector)


def _walk(blocks: Tensor, width: int) -> tuple[_Plan, tuple[int, ...], dict[str, int]]:
    """Return the plan for these blocks, and the kernels' arguments and constants that follow from it."""
    plan = _plan(tuple(blocks.shape), blocks.stride(), blocks.element_size())
    b, _, x, _, y, _, z, _ = blocks.stride()
    constants = {f"EXTENT_{axis}": extent for axis, extent in enumerate(plan.extents)}
    arguments = (blocks.shape[4], blocks.shape[6], b, x, y, z, *plan.strides)  # grid_y, grid_z, strides
    return plan, arguments, {**constants, "WIDTH": width, "VECTOR": plan.vector}


def _tile(
    name: str, x: Tensor, vector: int, rows: int, columns: int, depth: int
) -> tuple[Options, dict[str, Any]]:
    """Choose options, and the constants that follow: blocks as large as (rows, columns, depth) at most."""
    # Without 16-bit tensor cores a tile takes 2 or 4 times the registers; so does an address for every value.
    if x.dtype.itemsize != 2 or vector == 1:
        name = f"{name}_wide"
    options = config(name, x.device)
    blocks = {
        block: min(options[block], max(16, triton.next_power_of_2(size)))
        for block, size in zip(("BLOCK_M", "BLOCK_N", "BLOCK_K"), (rows, columns, depth), strict=True)
    }
    acc = accumulator(x.dtype)
    # Triton's interpreter multiplies garbage in bfloat16.
    narrow = {torch.float16: tl.float16, torch.bfloat16: acc if interpreted() else tl.bfloat16}
    return options, {**blocks, "DOT": narrow.get(x.dtype, acc), "ACC": acc}


def _marks(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Return the mask, no narrower than a wide product's values.

    Triton 3.7 lays a product out for the narrowest load behind its operands, addresses included. With a mask
    of bytes it multiplies float32 as TF32 on sm_100 although asked not to, and cannot compile float64.
    """
    integers = {4: torch.int32, 8: torch.int64}
    return mask if mask is None or dtype.itemsize == 2 else mask.to(integers[dtype.itemsize])


def _packed(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Make contiguous and of this dtype, in at most one copy; ``to`` alone keeps strides."""
    return x.contiguous() if x.dtype == dtype else x.to(dtype, memory_format=torch.contiguous_format)


def _flat(weight: Tensor, plan: _Plan, dtype: torch.dtype) -> Tensor:
    """Return the weight (D, K) in the order of a plan; a view where that is its own order and dtype."""
    flat = weight.permute(0, *(1 + axis for axis in plan.order))
    return _packed(flat, dtype).view(weight.shape[0], -1)


def _fake_embed(x: _Embed) -> Tensor:
    batch, _, gx, _, gy, _, gz, _ = x.blocks.shape
    return x.blocks.new_empty((batch, x.prefix + gx * gy * gz, x.weight.shape[0]))


def _launch_embed(x: _Embed) -> Tensor:
    out = _fake_embed(x)  # (B, P+L, D)
    batch, rows, width = out.shape
    plan, walk, constants = _walk(x.blocks, width)
    factor = _flat(x.weight, plan, x.blocks.dtype)  # (D, K)
    bias = None if x.bias is None else x.bias.contiguous()  # (D,)
    depth = factor.shape[1]
    options, tile = _tile("patch_embed_forward", x.blocks, plan.vector, batch * rows, width, depth)
    grid = (triton.cdiv(batch * rows, tile["BLOCK_M"]) * triton.cdiv(width, tile["BLOCK_N"]),)
    tensors = (x.blocks, factor, bias, x.position, _marks(x.mask, x.blocks.dtype), out)
    sizes = (batch, rows - x.prefix, x.prefix, depth, *walk)
    strides = (0, 0) if x.position is None else x.position.stride()
    arguments = (*tensors, *sizes, *strides)
    launch(patch_embed_forward_kernel, grid, arguments, constants | tile, options)
    return out


def _fake_grad_x(x: _Gradient) -> Tensor:
    return torch.empty_like(x.blocks)  # in the input's own layout: autograd reshapes it without a copy


def _launch_grad_x(x: _Gradient) -> Tensor:
    grad_x = _fake_grad_x(x)  # (B, C, gx, px, gy, py, gz, pz)
    batch, rows, width = x.grad.shape
    length = rows - x.prefix
    plan, walk, constants = _walk(grad_x, width)
    factor = _flat(x.weight, plan, x.grad.dtype)  # (D, K)
    depth = factor.shape[1]
    options, tile = _tile("patch_embed_grad_x", x.grad, plan.vector, batch * length, depth, width)
    grid = (triton.cdiv(batch * length, tile["BLOCK_M"]) * triton.cdiv(depth, tile["BLOCK_N"]),)
    grid_y, grid_z, *strides = walk
    sizes = (batch, length, x.prefix, width, grid_y, grid_z, *x.grad.stride(), *strides)
    arguments = (x.grad, factor, _marks(x.mask, x.grad.dtype), grad_x, *sizes)
    launch(patch_embed_grad_x_kernel, grid, arguments, constants | tile, options)
    return grad_x


def _fake_grad_weight(x: _WeightGradient) -> tuple[Tensor, Tensor]:
    precise = torch.promote_types(x.grad.dtype, torch.float32)
    grad_bias = x.grad.new_empty(x.grad.shape[2] if x.with_bias else 0, dtype=precise)
    return x.weight.new_empty(x.weight.shape), grad_bias


def _launch_grad_weight(x: _WeightGradient) -> tuple[Tensor, Tensor]:
    batch, rows, width = x.grad.shape
    length, depth = rows - x.prefix, x.weight[0].numel()
    plan, walk, constants = _walk(x.blocks, width)
    options, tile = _tile("patch_embed_grad_weight", x.grad, plan.vector, width, depth, length)
    tiles = triton.cdiv(width, tile["BLOCK_M"]) * triton.cdiv(depth, tile["BLOCK_N"])
    # Parts enough to keep the chip busy and no more: each is written and read in float32.
    parts = max(1, options["PROGRAMS"] // tiles)
    all_tokens = triton.cdiv(length, tile["BLOCK_K"])
    tokens = triton.cdiv(all_tokens, parts)
    token_parts = triton.cdiv(all_tokens, tokens)
    samples = triton.cdiv(batch, max(1, parts // token_parts))
    sample_parts = triton.cdiv(batch, samples)
    precise = torch.promote_types(x.grad.dtype, torch.float32)
    partial = x.grad.new_empty((sample_parts * token_parts, width, depth), dtype=precise)
    partial_bias = partial.new_empty((partial.shape[0], width if x.with_bias else 0))  # (parts, D)
    bias = partial_bias if x.with_bias else None
    grid_y, grid_z, *strides = walk
    sizes = (batch, length, x.prefix, samples, tokens, grid_y, grid_z, *x.grad.stride(), *strides)
    arguments = (x.grad, x.blocks, _marks(x.mask, x.grad.dtype), partial, bias, *sizes)
    grid = (tiles, token_parts, sample_parts)
    launch(patch_embed_grad_weight_kernel, grid, arguments, constants | tile, options)
    ordered = partial.sum(0).view(width, *(x.weight.shape[1 + axis] for axis in plan.order))
    grad_weight = ordered.permute(0, *(1 + plan.order.index(axis) for axis in range(4)))
    return _packed(grad_weight, x.weight.dtype), partial_bias.sum(0)  # (D, C, px, py, pz), (D,)


def _setup_context(ctx: Any, x: _Embed, output: Tensor) -> None:
    ctx.prefix = x.prefix
    ctx.save_for_backward(x.blocks, x.weight, x.mask)
    ctx.dtypes = [None if item is None else item.dtype for item in (x.bias, x.position)]


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    for_x, for_weight, for_bias, for_position = ctx.needs_input_grad[:4]
    known = (grad, *ctx.saved_tensors, ctx.prefix)
    grad_x = grad_weight = bias = position = None
    if for_x:
        grad_x = _grad_x(*known)
    if for_position or (for_bias and not for_weight):
        precise = torch.promote_types(grad.dtype, torch.float32)
        position = grad[:, ctx.prefix :].sum(0, dtype=precise)  # (L, D)
        bias = position.sum(0)  # (D,)
    if for_weight:
        with_bias = for_bias and bias is None
        grad_weight, sums = _grad_weight(*known, with_bias)
        bias = sums if with_bias else bias
    bias = bias.to(ctx.dtypes[0]) if for_bias and bias is not None else None
    position = position.to(ctx.dtypes[1]) if for_position and position is not None else None
    return grad_x, grad_weight, bias, position, None, None


def _recall(ctx: Any, grads: tuple[Tensor, ...]) -> _Embed:
    blocks, weight, mask = ctx.saved_tensors
    zero, rows, width = grads[0].new_zeros(()), *grads[0].shape[1:]  # linear in bias and position: any values
    shapes = ((width,), (rows - ctx.prefix, width))
    bias, position = (
        None if dtype is None else zero.to(dtype).expand(shape)
        for dtype, shape in zip(ctx.dtypes, shapes, strict=True)
    )  # (D,), (L, D)
    return _Embed(blocks, weight, bias, position, mask, ctx.prefix)


def _define_embed(x: _Embed) -> Tensor:
    patches = x.blocks.permute(0, 2, 4, 6, 1, 3, 5, 7).flatten(4).flatten(1, 3)  # (B, L, K)
    weight, bias = (
        None if item is None else item.to(patches.dtype) for item in (x.weight.flatten(1), x.bias)
    )
    assert weight is not None
    return _project(_mixed(patches, x.mask), weight, bias, x.position, x.prefix)  # (B, P+L, D)


_patch_embed = register(
    "patch_embed", _Embed, "Tensor", _launch_embed, _fake_embed,
    Derivatives(_setup_context, _backward, _recall, _define_embed),
)  # fmt: skip
_grad_x = register("patch_embed_grad_x", _Gradient, "Tensor", _launch_grad_x, _fake_grad_x)
_grad_weight = register(
    "patch_embed_grad_weight", _WeightGradient, "(Tensor, Tensor)", _launch_grad_weight, _fake_grad_weight
)


@register_flop_formula(_patch_embed.overloadpacket)
def _forward_flops(blocks_shape: list[int], weight_shape: list[int], *_: Any, **__: Any) -> int:
    """Count one matrix product, as :class:`torch.utils.flop_counter.FlopCounterMode` does."""
    return 2 * math.prod(blocks_shape) * weight_shape[0]


@register_flop_formula([_grad_x.overloadpacket, _grad_weight.overloadpacket])
def _backward_flops(_grad: Any, blocks_shape: list[int], weight_shape: list[int], *_: Any, **__: Any) -> int:
    return 2 * math.prod(blocks_shape) * weight_shape[0]


# 4. Public functions


def _volume_blocks(x: Tensor, weight: Tensor) -> Tensor:
    """View (B, C, X, Y, Z) as blocks; splitting axes is a view whatever the strides."""
    batch, channels, p, q, r = x.shape[0], *weight.shape[1:]
    gx, gy, gz = patch_grid(x.shape, (p, q, r))
    return x.view(batch, channels, gx, p, gy, q, gz, r)


def _token_blocks(tokens: Tensor, weight: Tensor) -> Tensor:
    """View (B, L, p^3*C) as blocks; any factors of L do as the grid, for a sequence has one stride."""
    blocks = tokens.view(*tokens.shape[:2], 1, 1, *weight.shape[2:], weight.shape[1])
    return blocks.permute(0, 7, 1, 4, 2, 5, 3, 6)


def _check(
    length: int, weight: Tensor, bias: Tensor | None, position: Tensor | None, num_prefix_tokens: int
) -> None:
    width = weight.shape[0]
    if bias is not None and bias.shape != (width,):
        raise ValueError(f"bias has shape {tuple(bias.shape)}, expected {(width,)}")
    if position is not None and position.shape != (length, width):
        raise ValueError(f"position has shape {tuple(position.shape)}, expected {(length, width)}")
    if num_prefix_tokens < 0:
        raise ValueError(f"num_prefix_tokens is {num_prefix_tokens}, expected 0 or more")


def _product_dtype(name: str, x: Tensor, weight: Tensor) -> torch.dtype:
    """Return the dtype in which F.linear would multiply: autocast's, else the inputs' common one."""
    check_float(name, x)
    narrow, dtypes = autocast_dtype(x), [x.dtype, weight.dtype]
    if narrow is not None:
        dtypes = [item if item == torch.float64 else narrow for item in dtypes]
    if dtypes[0] != dtypes[1]:
        raise ValueError(f"{name} is {x.dtype} and weight {weight.dtype}, expected one dtype")
    return dtypes[0]


def patch_embed_3d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    position: Tensor | None = None,
    source_mask: Tensor | None = None,
    num_prefix_tokens: int = 0,
) -> Tensor:
    """Embed the patches of a volume: what Conv3d with kernel = stride = patch does, as a matrix product.

    Args:
        x: (B, C, X, Y, Z), any float dtype and strides.
        weight: (D, C, px, py, pz), a Conv3d weight; it sets the patch edges.
        bias: (D,) or None.
        position: (L, D) added to every row of the batch, or None.
        source_mask: (B, L) of 0 and 1, or None. Where it is 1 a token shows the patch of the batch-flip
            partner, sample B-1-b, instead of sample b's own (MeDUET's mixing).
        num_prefix_tokens: P zero rows in front, for the caller to fill (CLS), in place if it likes.

    Returns:
        (B, P+L, D), in the dtype that F.linear would return, autocast included.

    Raises:
        ValueError: if a shape does not fit, or x and weight differ in dtype outside autocast.
    """
    if x.dim() != 5 or weight.dim() != 5 or x.shape[1] != weight.shape[1]:
        raise ValueError(
            f"x has shape {tuple(x.shape)} and weight {tuple(weight.shape)}, "
            "expected (B, C, X, Y, Z) and (D, C, px, py, pz)"
        )
    length = math.prod(patch_grid(x.shape, (weight.shape[2], weight.shape[3], weight.shape[4])))
    _check(length, weight, bias, position, num_prefix_tokens)
    if source_mask is not None and source_mask.shape != (x.shape[0], length):
        raise ValueError(f"source_mask has shape {tuple(source_mask.shape)}, expected {(x.shape[0], length)}")
    dtype = _product_dtype("x", x, weight)
    if not use_triton(x) or x.numel() == 0 or weight.numel() == 0:
        return patch_embed_3d_reference(x, weight, bias, position, source_mask, num_prefix_tokens)
    mask = None if source_mask is None else packed(source_mask)
    blocks = _volume_blocks(x.to(dtype), weight)  # (B, C, gx, px, gy, py, gz, pz)
    return _patch_embed(blocks, weight, bias, position, mask, num_prefix_tokens)


def patch_embed_tokens(
    tokens: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    position: Tensor | None = None,
    num_prefix_tokens: int = 0,
) -> Tensor:
    """Embed predicted tokens without building the volume between: the weight is permuted instead.

    Equal to ``patch_embed_3d(unpatchify_3d(tokens, ...), weight, ...)``.

    Args:
        tokens: (B, L, p^3*C) in (px, py, pz, c) order, any float dtype and strides.
        weight: (D, C, px, py, pz), a Conv3d weight.
        bias, position, num_prefix_tokens: as for :func:`patch_embed_3d`.

    Returns:
        (B, P+L, D), in the dtype that F.linear would return, autocast included.

    Raises:
        ValueError: if a shape does not fit, or tokens and weight differ in dtype outside autocast.
    """
    if tokens.dim() != 3 or weight.dim() != 5:
        raise ValueError(
            f"tokens has shape {tuple(tokens.shape)} and weight {tuple(weight.shape)}, "
            "expected (B, L, p^3*C) and (D, C, px, py, pz)"
        )
    _, length, width = tokens.shape
    if width != math.prod(weight.shape[1:]):
        raise ValueError(f"tokens has width {width}, expected p^3*C = {math.prod(weight.shape[1:])}")
    _check(length, weight, bias, position, num_prefix_tokens)
    dtype = _product_dtype("tokens", tokens, weight)
    if not use_triton(tokens) or tokens.numel() == 0 or weight.numel() == 0:
        return patch_embed_tokens_reference(tokens, weight, bias, position, num_prefix_tokens)
    blocks = _token_blocks(tokens.to(dtype), weight)  # (B, C, L, px, 1, py, 1, pz)
    return _patch_embed(blocks, weight, bias, position, None, num_prefix_tokens)
