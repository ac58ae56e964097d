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
from .dtypes import accumulator, autocast_dtype
from .launch import config, launch
from .mix_index import packed
from .patchify import patch_grid, patchify_3d
from .registration import register

if triton is not None:
    import triton.language as tl

    from .patch_embed_kernels import (
        patch_embed_forward_kernel,
        patch_embed_grad_weight_kernel,
        patch_embed_grad_x_kernel,
    )

# 1. Reference


def _project(
    patches: Tensor, weight: Tensor, bias: Tensor | None, position: Tensor | None, num_prefix_tokens: int
) -> Tensor:
    """Linear projection, plus positions, behind ``num_prefix_tokens`` zero rows."""
    tokens = F.linear(patches, weight, bias)
    if position is not None:
        tokens = tokens + position.to(tokens.dtype)
    return F.pad(tokens, (0, 0, num_prefix_tokens, 0)) if num_prefix_tokens else tokens


def patch_embed_3d_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    position: Tensor | None = None,
    source_mask: Tensor | None = None,
    num_prefix_tokens: int = 0,
) -> Tensor:
    """The definition of :func:`patch_embed_3d`, in plain PyTorch."""
    patches = patchify_3d(x, (weight.shape[2], weight.shape[3], weight.shape[4]), "first")
    if source_mask is not None:
        patches = torch.where(source_mask.bool().unsqueeze(-1), patches.flip(0), patches)
    return _project(patches, weight.flatten(1), bias, position, num_prefix_tokens)


def patch_embed_tokens_reference(
    tokens: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    position: Tensor | None = None,
    num_prefix_tokens: int = 0,
) -> Tensor:
    """The definition of :func:`patch_embed_tokens`, in plain PyTorch."""
    flat = weight.permute(0, 2, 3, 4, 1).flatten(1)
    return _project(tokens, flat, bias, position, num_prefix_tokens)


# 2. Kernels: tokenize_kernels.py

# 3. Registration


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
    """The plan for these blocks, and the kernels' arguments and constants that follow from it."""
    plan = _plan(tuple(blocks.shape), blocks.stride(), blocks.element_size())
    b, _, x, _, y, _, z, _ = blocks.stride()
    constants = {f"EXTENT_{axis}": extent for axis, extent in enumerate(plan.extents)}
    return plan, (b, x, y, z, *plan.strides), {**constants, "WIDTH": width, "VECTOR": plan.vector}


_INTEGERS = {4: torch.int32, 8: torch.int64}


def _options(name: str, dtype: torch.dtype, device: torch.device) -> dict[str, int]:
    # Without 16-bit tensor cores a tile is held in twice or four times the registers.
    return config(name if dtype.itemsize == 2 else f"{name}_wide", device)


def _tile(options: dict[str, int], dtype: torch.dtype, *sizes: int) -> dict[str, Any]:
    """Block sizes, no larger than the product of these sizes (M, N, K) needs, and its types."""
    blocks = {
        name: min(options[name], max(16, triton.next_power_of_2(size)))
        for name, size in zip(("BLOCK_M", "BLOCK_N", "BLOCK_K"), sizes, strict=True)
    }
    acc = accumulator(dtype)
    # Triton's interpreter multiplies garbage in bfloat16.
    narrow = {torch.float16: tl.float16, torch.bfloat16: acc if interpreted() else tl.bfloat16}
    return {**blocks, "DOT": narrow.get(dtype, acc), "ACC": acc}


def _marks(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """The mask, no narrower than a wide product's values.

    Triton 3.7 lays a product out for the narrowest load behind its operands, addresses included. With a mask
    of bytes it multiplies float32 as TF32 on sm_100 although asked not to, and cannot compile float64.
    """
    return mask if mask is None or dtype.itemsize == 2 else mask.to(_INTEGERS[dtype.itemsize])


def _packed(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Contiguous and of this dtype, in at most one copy; ``to`` alone keeps strides if the dtype is right."""
    return x.contiguous() if x.dtype == dtype else x.to(dtype, memory_format=torch.contiguous_format)


def _flat(weight: Tensor, plan: _Plan, dtype: torch.dtype) -> Tensor:
    """The weight (D, K) in the order of a plan; a view where that is its own order and dtype."""
    flat = weight.permute(0, *(1 + axis for axis in plan.order))
    return _packed(flat, dtype).view(weight.shape[0], -1)


def _launch_forward(
    blocks: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    position: Tensor | None,
    mask: Tensor | None,
    prefix: int,
) -> Tensor:
    out = _fake_forward(blocks, weight, bias, position, mask, prefix)
    batch, rows, width = out.shape
    plan, strides, walk = _walk(blocks, width)
    factor = _flat(weight, plan, blocks.dtype)
    options = _options("patch_embed_forward", blocks.dtype, blocks.device)
    tile = _tile(options, blocks.dtype, batch * rows, width, factor.shape[1])
    launch(
        patch_embed_forward_kernel,
        (triton.cdiv(batch * rows, tile["BLOCK_M"]) * triton.cdiv(width, tile["BLOCK_N"]),),
        (
            blocks, factor, None if bias is None else bias.contiguous(), position, _marks(mask, blocks.dtype),
            out,
            batch, rows - prefix, prefix, factor.shape[1], blocks.shape[4], blocks.shape[6], *strides,
            *((0, 0) if position is None else position.stride()),
        ),
        {**walk, **tile},
        "patch_embed_forward",
        options,
    )  # fmt: skip
    return out


def _fake_forward(
    blocks: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    position: Tensor | None,
    mask: Tensor | None,
    prefix: int,
) -> Tensor:
    batch, _, x, _, y, _, z, _ = blocks.shape
    return blocks.new_empty((batch, prefix + x * y * z, weight.shape[0]))


def _launch_grad_x(grad: Tensor, blocks: Tensor, weight: Tensor, mask: Tensor | None, prefix: int) -> Tensor:
    grad_x = _fake_grad_x(grad, blocks, weight, mask, prefix)
    batch, rows, width = grad.shape
    length = rows - prefix
    plan, strides, walk = _walk(grad_x, width)
    factor = _flat(weight, plan, grad.dtype)
    options = _options("patch_embed_grad_x", grad.dtype, grad.device)
    tile = _tile(options, grad.dtype, batch * length, factor.shape[1], width)
    launch(
        patch_embed_grad_x_kernel,
        (triton.cdiv(batch * length, tile["BLOCK_M"]) * triton.cdiv(factor.shape[1], tile["BLOCK_N"]),),
        (
            grad, factor, _marks(mask, grad.dtype), grad_x, batch, length, prefix, width,
            blocks.shape[4], blocks.shape[6], *grad.stride(), *strides,
        ),
        {**walk, **tile},
        "patch_embed_grad_x",
        options,
    )  # fmt: skip
    return grad_x


def _fake_grad_x(grad: Tensor, blocks: Tensor, weight: Tensor, mask: Tensor | None, prefix: int) -> Tensor:
    return torch.empty_like(blocks)  # in the input's own layout, so that autograd reshapes it without a copy


def _launch_grad_weight(
    grad: Tensor, blocks: Tensor, weight: Tensor, mask: Tensor | None, prefix: int, with_bias: bool
) -> tuple[Tensor, Tensor]:
    batch, rows, width = grad.shape
    length, depth = rows - prefix, weight[0].numel()
    plan, strides, walk = _walk(blocks, width)
    options = _options("patch_embed_grad_weight", grad.dtype, grad.device)
    tile = _tile(options, grad.dtype, width, depth, length)
    tiles = triton.cdiv(width, tile["BLOCK_M"]) * triton.cdiv(depth, tile["BLOCK_N"])
    # Parts enough to keep the chip busy and no more: each is written and read in float32.
    parts = max(1, options["PROGRAMS"] // tiles)
    all_tokens = triton.cdiv(length, tile["BLOCK_K"])
    tokens = triton.cdiv(all_tokens, parts)
    token_parts = triton.cdiv(all_tokens, tokens)
    samples = triton.cdiv(batch, max(1, parts // token_parts))
    sample_parts = triton.cdiv(batch, samples)
    acc = torch.promote_types(grad.dtype, torch.float32)
    partial = grad.new_empty((sample_parts * token_parts, width, depth), dtype=acc)
    partial_bias = grad.new_empty((sample_parts * token_parts, width if with_bias else 0), dtype=acc)
    launch(
        patch_embed_grad_weight_kernel,
        (tiles, token_parts, sample_parts),
        (
            grad, blocks, _marks(mask, grad.dtype), partial, partial_bias if with_bias else None,
            batch, length, prefix, samples, tokens, blocks.shape[4], blocks.shape[6],
            *grad.stride(), *strides,
        ),
        {**walk, **tile},
        "patch_embed_grad_weight",
        options,
    )  # fmt: skip
    ordered = partial.sum(0).view(width, *(weight.shape[1 + axis] for axis in plan.order))
    grad_weight = ordered.permute(0, *(1 + plan.order.index(axis) for axis in range(4)))
    return _packed(grad_weight, weight.dtype), partial_bias.sum(0)


def _fake_grad_weight(
    grad: Tensor, blocks: Tensor, weight: Tensor, mask: Tensor | None, prefix: int, with_bias: bool
) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(grad.dtype, torch.float32)
    return weight.new_empty(weight.shape), grad.new_empty(grad.shape[2] if with_bias else 0, dtype=dtype)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    blocks, weight, bias, position, mask, ctx.prefix = inputs
    ctx.save_for_backward(blocks, weight, mask)
    ctx.dtypes = [None if item is None else item.dtype for item in (bias, position)]


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    blocks, weight, mask = ctx.saved_tensors
    for_x, for_weight, for_bias, for_position = ctx.needs_input_grad[:4]
    grad_x = grad_weight = bias = position = None
    if for_x:
        grad_x = _grad_x(grad, blocks, weight, mask, ctx.prefix)
    if for_position or (for_bias and not for_weight):
        position = grad[:, ctx.prefix :].sum(0, dtype=torch.promote_types(grad.dtype, torch.float32))
        bias = position.sum(0)
    if for_weight:
        with_bias = for_bias and bias is None
        grad_weight, sums = _grad_weight(grad, blocks, weight, mask, ctx.prefix, with_bias)
        bias = sums if with_bias else bias
    bias = bias.to(ctx.dtypes[0]) if for_bias and bias is not None else None
    position = position.to(ctx.dtypes[1]) if for_position and position is not None else None
    return grad_x, grad_weight, bias, position, None, None


_patch_embed = register(
    "patch_embed(Tensor blocks, Tensor weight, Tensor? bias, Tensor? position, Tensor? mask, int prefix) -> "
    "Tensor",
    _launch_forward,
    _fake_forward,
    _setup_context,
    _backward,
)
_grad_x = register(
    "patch_embed_grad_x(Tensor grad, Tensor blocks, Tensor weight, Tensor? mask, int prefix) -> Tensor",
    _launch_grad_x,
    _fake_grad_x,
)
_grad_weight = register(
    "patch_embed_grad_weight(Tensor grad, Tensor blocks, Tensor weight, Tensor? mask, int prefix, "
    "bool with_bias) -> (Tensor, Tensor)",
    _launch_grad_weight,
    _fake_grad_weight,
)


@register_flop_formula(_patch_embed.overloadpacket)
def _forward_flops(blocks_shape: list[int], weight_shape: list[int], *_: Any, **__: Any) -> int:
    """One matrix product, as :class:`torch.utils.flop_counter.FlopCounterMode` counts it."""
    return 2 * math.prod(blocks_shape) * weight_shape[0]


@register_flop_formula([_grad_x.overloadpacket, _grad_weight.overloadpacket])
def _backward_flops(_grad: Any, blocks_shape: list[int], weight_shape: list[int], *_: Any, **__: Any) -> int:
    return 2 * math.prod(blocks_shape) * weight_shape[0]


# 4. Public functions


def _volume_blocks(x: Tensor, weight: Tensor) -> Tensor:
    """(B, C, X, Y, Z) as blocks; splitting axes is a view whatever the strides."""
    batch, channels, p, q, r = x.shape[0], *weight.shape[1:]
    gx, gy, gz = patch_grid(x.shape, (p, q, r))
    return x.view(batch, channels, gx, p, gy, q, gz, r)


def _token_blocks(tokens: Tensor, weight: Tensor) -> Tensor:
    """(B, L, p^3*C) as blocks; any factors of L do as the grid, for a sequence has one stride."""
    batch, length, channels, p, q, r = *tokens.shape[:2], *weight.shape[1:]
    blocks = tokens.view(batch, length, 1, 1, p, q, r, channels)
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
    """The dtype in which F.linear would multiply: autocast's, else the inputs' common one."""
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
    blocks = _volume_blocks(x.to(dtype), weight)
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
    blocks = _token_blocks(tokens.to(dtype), weight)
    return _patch_embed(blocks, weight, bias, position, None, num_prefix_tokens)
