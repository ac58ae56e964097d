"""The Triton kernels of the patch embedding; ``patch_embed`` launches them.

All three multiply with an index k over a patch's values. The launcher orders the patch's four axes by the
input's strides, so that the fastest part of k is the contiguous one, and permutes the weight, which is small,
to match; EXTENT_0 .. EXTENT_3 and stride_0 .. stride_3 are those axes, slowest first.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _patch_starts(token, grid_y, grid_z, stride_x, stride_y, stride_z, VECTOR: tl.constexpr):
    starts = (token // (grid_y * grid_z)).to(tl.int64) * stride_x
    starts += (token // grid_z % grid_y).to(tl.int64) * stride_y
    starts += (token % grid_z).to(tl.int64) * stride_z
    return tl.multiple_of(starts, VECTOR)


@triton.jit
def _within_patch(
    k, stride_0, stride_1, stride_2, stride_3,
    EXTENT_1: tl.constexpr, EXTENT_2: tl.constexpr, EXTENT_3: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    # Constant divisors: shifts where the extents are powers of two.
    offsets = (k // (EXTENT_1 * EXTENT_2 * EXTENT_3)).to(tl.int64) * stride_0
    offsets += (k // (EXTENT_2 * EXTENT_3) % EXTENT_1).to(tl.int64) * stride_1
    offsets += (k // EXTENT_3 % EXTENT_2).to(tl.int64) * stride_2
    offsets += (k % EXTENT_3).to(tl.int64) * stride_3
    # The strides are runtime values of which the compiler knows only whether 16 divides them.
    return tl.max_contiguous(tl.multiple_of(offsets, VECTOR), VECTOR)


@triton.jit
def patch_embed_forward_kernel(
    x, weight, bias, position, mask, out, batch, length, prefix, depth, grid_y, grid_z,
    stride_b, stride_x, stride_y, stride_z, stride_0, stride_1, stride_2, stride_3,
    position_l, position_d,
    EXTENT_0: tl.constexpr, EXTENT_1: tl.constexpr, EXTENT_2: tl.constexpr, EXTENT_3: tl.constexpr,
    WIDTH: tl.constexpr, VECTOR: tl.constexpr, DOT: tl.constexpr, ACC: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    # A row of the product is a row of the output, prefix rows included: those load nothing.
    DEPTH: tl.constexpr = EXTENT_0 * EXTENT_1 * EXTENT_2 * EXTENT_3
    tiles = tl.cdiv(WIDTH, BLOCK_N)  # neighbours in the launch share their rows of x
    rows = tl.program_id(0) // tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.program_id(0) % tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    sample = rows // (prefix + length)
    token = rows % (prefix + length) - prefix
    real = (token >= 0) & (sample < batch)
    valid = columns < WIDTH
    if WIDTH % BLOCK_N == 0:
        valid = tl.full((BLOCK_N,), True, tl.int1)
    source = sample.to(tl.int64)
    if mask is not None:
        second = tl.load(mask + source * length + token, mask=real, other=0) != 0
        source = tl.where(second, batch - 1 - source, source)
    starts = _patch_starts(token, grid_y, grid_z, stride_x, stride_y, stride_z, VECTOR)
    starts = tl.multiple_of(starts + source * stride_b, VECTOR)
    weight += columns.to(tl.int64)[None, :] * DEPTH
    # The product is added to these: fewer registers than adding them to the product.
    sums = tl.zeros((BLOCK_M, BLOCK_N), ACC)
    inside = real[:, None] & valid[None, :]
    if position is not None:
        at = token.to(tl.int64)[:, None] * position_l + columns.to(tl.int64)[None, :] * position_d
        sums = tl.load(position + at, mask=inside, other=0.0).to(ACC)
    if bias is not None:
        shift = tl.load(bias + columns, mask=valid, other=0.0).to(ACC)
        sums += tl.where(real[:, None], shift[None, :], 0.0)
    for first in range(0, depth, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        offsets = _within_patch(
            k, stride_0, stride_1, stride_2, stride_3, EXTENT_1, EXTENT_2, EXTENT_3, VECTOR
        )
        left, right = real[:, None], valid[None, :]
        if DEPTH % BLOCK_K:
            left, right = left & (k < DEPTH)[None, :], right & (k < DEPTH)[:, None]
        patch = tl.load(x + (starts[:, None] + offsets[None, :]), mask=left, other=0.0).to(DOT)
        factor = tl.load(weight + k[:, None], mask=right, other=0.0).to(DOT)
        sums = tl.dot(patch, factor, sums, input_precision="ieee", out_dtype=ACC)
    at = rows.to(tl.int64)[:, None] * WIDTH + columns[None, :]
    tl.store(out + at, sums.to(out.dtype.element_ty), mask=(sample < batch)[:, None] & valid[None, :])


@triton.jit
def patch_embed_grad_x_kernel(
    grad, weight, mask, grad_x, batch, length, prefix, width, grid_y, grid_z, grad_b, grad_l, grad_d,
    stride_b, stride_x, stride_y, stride_z, stride_0, stride_1, stride_2, stride_3,
    EXTENT_0: tl.constexpr, EXTENT_1: tl.constexpr, EXTENT_2: tl.constexpr, EXTENT_3: tl.constexpr,
    WIDTH: tl.constexpr, VECTOR: tl.constexpr, DOT: tl.constexpr, ACC: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    # Who showed patch `token` of `sample`: the sample itself where its mask is 0, its partner where the
    # partner's mask is 1. Gathered, so nothing is added in memory.
    DEPTH: tl.constexpr = EXTENT_0 * EXTENT_1 * EXTENT_2 * EXTENT_3
    tiles = tl.cdiv(DEPTH, BLOCK_N)
    rows = tl.program_id(0) // tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    k = tl.program_id(0) % tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    sample = (rows // length).to(tl.int64)
    token = rows % length
    real = sample < batch
    own = real
    at = (prefix + token).to(tl.int64) * grad_l
    if mask is not None:
        partner = batch - 1 - sample
        own = real & (tl.load(mask + sample * length + token, mask=real, other=0) == 0)
        shown = real & (tl.load(mask + partner * length + token, mask=real, other=0) != 0)
        partner_at = at + partner * grad_b
    at += sample * grad_b
    weight += k[None, :]
    sums = tl.zeros((BLOCK_M, BLOCK_N), ACC)
    for first in range(0, width, BLOCK_K):
        d = first + tl.arange(0, BLOCK_K)
        valid, step = d < WIDTH, d.to(tl.int64) * grad_d
        inside = valid[:, None]
        if DEPTH % BLOCK_N:
            inside = inside & (k < DEPTH)[None, :]
        factor = tl.load(weight + d.to(tl.int64)[:, None] * DEPTH, mask=inside, other=0.0).to(DOT)
        tile = tl.load(grad + (at[:, None] + step[None, :]), mask=own[:, None] & valid[None, :], other=0.0)
        sums = tl.dot(tile.to(DOT), factor, sums, input_precision="ieee", out_dtype=ACC)
        if mask is not None:
            # A product of its own: a sum of both would be made in registers, and a product that reads its
            # left factor from registers must not overlap with the next one's (see inspect.py).
            inside = shown[:, None] & valid[None, :]
            other = tl.load(grad + (partner_at[:, None] + step[None, :]), mask=inside, other=0.0)
            sums = tl.dot(other.to(DOT), factor, sums, input_precision="ieee", out_dtype=ACC)
    starts = _patch_starts(token, grid_y, grid_z, stride_x, stride_y, stride_z, VECTOR)
    starts = tl.multiple_of(starts + sample * stride_b, VECTOR)
    offsets = _within_patch(k, stride_0, stride_1, stride_2, stride_3, EXTENT_1, EXTENT_2, EXTENT_3, VECTOR)
    inside = real[:, None] & (k < DEPTH)[None, :]
    tl.store(grad_x + (starts[:, None] + offsets[None, :]), sums.to(grad_x.dtype.element_ty), mask=inside)


@triton.jit
def patch_embed_grad_weight_kernel(
    grad, x, mask, partial, partial_bias, batch, length, prefix, samples, blocks, grid_y, grid_z,
    grad_b, grad_l, grad_d,
    stride_b, stride_x, stride_y, stride_z, stride_0, stride_1, stride_2, stride_3,
    EXTENT_0: tl.constexpr, EXTENT_1: tl.constexpr, EXTENT_2: tl.constexpr, EXTENT_3: tl.constexpr,
    WIDTH: tl.constexpr, VECTOR: tl.constexpr, DOT: tl.constexpr, ACC: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    # A program owns a tile of the gradient and a part of the rows: `blocks` blocks of BLOCK_K tokens, of
    # `samples` samples. Samples are the inner loop: it moves by strides and divides nothing.
    # partial (parts, D, K), partial_bias (parts, D).
    DEPTH: tl.constexpr = EXTENT_0 * EXTENT_1 * EXTENT_2 * EXTENT_3
    tiles = tl.cdiv(DEPTH, BLOCK_N)
    d = tl.program_id(0) // tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    k = tl.program_id(0) % tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    valid = d < WIDTH
    offsets = _within_patch(k, stride_0, stride_1, stride_2, stride_3, EXTENT_1, EXTENT_2, EXTENT_3, VECTOR)
    first_sample = tl.program_id(2) * samples
    last_sample = tl.minimum(first_sample + samples, batch)
    first_block = tl.program_id(1) * blocks
    last_block = tl.minimum(first_block + blocks, tl.cdiv(length, BLOCK_K))
    sums = tl.zeros((BLOCK_M, BLOCK_N), ACC)
    # The bias' gradient is one more product, for the tile lies where the matrix units read it.
    ones = tl.full((BLOCK_K, 16), 1.0, DOT)
    bias_sums = tl.zeros((BLOCK_M, 16), ACC)
    for block in range(first_block, last_block):
        token = block * BLOCK_K + tl.arange(0, BLOCK_K)
        real = token < length
        starts = _patch_starts(token, grid_y, grid_z, stride_x, stride_y, stride_z, VECTOR)
        at = d.to(tl.int64)[:, None] * grad_d + (prefix + token).to(tl.int64)[None, :] * grad_l
        inside, patch_inside = valid[:, None] & real[None, :], real[:, None]
        if DEPTH % BLOCK_N:
            patch_inside = patch_inside & (k < DEPTH)[None, :]
        for index in range(first_sample, last_sample):
            sample = tl.cast(index, tl.int64)
            tile = tl.load(grad + sample * grad_b + at, mask=inside, other=0.0)
            base = sample * stride_b
            if mask is not None:
                second = tl.load(mask + sample * length + token, mask=real, other=0) != 0
                base = tl.where(second, (batch - 1 - sample) * stride_b, base)
            here = tl.multiple_of(starts + base, VECTOR)
            patch = tl.load(x + (here[:, None] + offsets[None, :]), mask=patch_inside, other=0.0)
            sums = tl.dot(tile.to(DOT), patch.to(DOT), sums, input_precision="ieee", out_dtype=ACC)
            if partial_bias is not None:
                bias_sums = tl.dot(tile.to(DOT), ones, bias_sums, input_precision="ieee", out_dtype=ACC)
    part = (tl.program_id(2) * tl.num_programs(1) + tl.program_id(1)).to(tl.int64)
    at = partial + (part * WIDTH + d[:, None]) * DEPTH + k[None, :]
    tl.store(at, sums, mask=valid[:, None] & (k < DEPTH)[None, :])
    if partial_bias is not None:
        # All 16 columns are equal.
        once = valid & (tl.program_id(0) % tiles == 0)
        tl.store(partial_bias + part * WIDTH + d, tl.max(bias_sums, 1), mask=once)
