"""The Triton kernels of group normalisation; ``group_norm`` launches them and says what they compute.

A feature map is (B, C, S), S = X*Y*Z, with strides: a tile is some positions of some channels. Contiguous
maps have tiles of few channels and many positions, channels-last ones the reverse: both load whole lines.
weight_b and bias_b are strides from sample to sample; None where all samples share one row.
"""
# mypy: disallow-untyped-defs=False

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _tile(chunk, spatial, channels, stride_c, stride_s, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    rows = chunk * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (rows < spatial)[:, None] & (columns < channels)[None, :]
    offsets = rows.to(tl.int64)[:, None] * stride_s + columns.to(tl.int64)[None, :] * stride_c
    return columns, inside, offsets


@triton.jit
def _affine(weight, bias, weight_b, bias_b, batch, columns, channels, ACC: tl.constexpr):
    valid = columns < channels
    scale = tl.full(columns.shape, 1.0, ACC)
    shift = tl.zeros(columns.shape, ACC)
    if weight is not None:
        if weight_b is not None:
            weight += batch * weight_b
        scale = tl.load(weight + columns, mask=valid, other=0.0).to(ACC)
    if bias is not None:
        if bias_b is not None:
            bias += batch * bias_b
        shift = tl.load(bias + columns, mask=valid, other=0.0).to(ACC)
    return scale, shift


@triton.jit
def _normalised(x, mean, rstd, batch, columns, channels, width, groups):
    # width: channels of a group.
    at, valid = batch * groups + columns // width, columns < channels
    factor = tl.load(rstd + at, mask=valid, other=0.0)
    return (x - tl.load(mean + at, mask=valid, other=0.0)[None, :]) * factor[None, :], factor


@triton.jit
def _slope(value, ACTIVATION: tl.constexpr):
    # Derivative of SiLU.
    if ACTIVATION:
        gate = tl.sigmoid(value)
        return gate * (1.0 + value * (1.0 - gate))
    return tl.full(value.shape, 1.0, value.dtype)


@triton.jit
def group_norm_statistics_kernel(
    x, partial, spatial, channels, stride_b, stride_c, stride_s,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, STEPS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    # partial (B, chunks, 2, C): mean, and sum of squared differences from it, of a chunk of each channel.
    batch = tl.program_id(2).to(tl.int64)
    x += batch * stride_b
    mean = tl.zeros((COLUMNS,), ACC)
    squares = tl.zeros((COLUMNS,), ACC)
    for step in range(STEPS):
        chunk = tl.program_id(0) * STEPS + step
        columns, inside, offsets = _tile(chunk, spatial, channels, stride_c, stride_s, ROWS, COLUMNS)
        tile = tl.load(x + offsets, mask=inside, other=0.0).to(ACC)
        count = tl.minimum(tl.maximum(spatial - chunk * ROWS, 0), ROWS).to(ACC)
        own = tl.sum(tile, 0) / tl.maximum(count, 1.0)
        centred = tl.where(inside, tile - own[None, :], 0.0)
        # What the sum of the differences keeps of rounding goes back into the mean.
        rest = tl.sum(centred, 0) / tl.maximum(count, 1.0)
        own += rest
        delta = own - mean
        share = count / tl.maximum(step * ROWS + count, 1.0)
        squares += tl.sum(centred * centred, 0) - count * rest * rest
        squares += delta * delta * (step * ROWS * share)
        mean += delta * share
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    out = partial + (batch * tl.num_programs(0) + tl.program_id(0)) * 2 * channels + columns
    tl.store(out, mean, mask=columns < channels)
    tl.store(out + channels, squares, mask=columns < channels)


@triton.jit
def group_norm_combine_kernel(
    partial, mean, rstd, chunks, spatial, channels, width, chunk_size,
    BLOCK: tl.constexpr, EPS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    # One program for a group: its chunks' means, then the squares around the mean of all.
    group, batch = tl.program_id(0), tl.program_id(1).to(tl.int64)
    partial += batch * chunks * 2 * channels + group * width
    # Relative to the first chunk's mean, so that a large mean costs no digits.
    base = tl.load(partial)
    total = tl.zeros((BLOCK,), ACC)
    for start in range(0, chunks * width, BLOCK):
        item = start + tl.arange(0, BLOCK)
        chunk = item // width
        at = partial + chunk.to(tl.int64) * 2 * channels + item % width
        own = tl.load(at, mask=chunk < chunks, other=0.0)
        count = tl.minimum(spatial - chunk * chunk_size, chunk_size)
        total += tl.where(chunk < chunks, (own - base) * count, 0.0)
    elements = tl.full((), 1.0, ACC) * spatial * width
    offset = tl.sum(total, 0) / elements
    squares = tl.zeros((BLOCK,), ACC)
    for start in range(0, chunks * width, BLOCK):
        item = start + tl.arange(0, BLOCK)
        chunk = item // width
        at = partial + chunk.to(tl.int64) * 2 * channels + item % width
        delta = tl.load(at, mask=chunk < chunks, other=0.0) - base - offset
        count = tl.minimum(spatial - chunk * chunk_size, chunk_size)
        own = tl.load(at + channels, mask=chunk < chunks, other=0.0)
        squares += tl.where(chunk < chunks, own + delta * delta * count, 0.0)
    out = batch * tl.num_programs(0) + group
    tl.store(mean + out, base + offset)
    tl.store(
        rstd + out, 1.0 / tl.sqrt(tl.sum(squares, 0) / elements + EPS)
    )  # a constant: arguments are float32


@triton.jit
def group_norm_apply_kernel(
    x, weight, bias, weight_b, bias_b, mean, rstd, y, spatial, channels, width, groups,
    stride_b, stride_c, stride_s,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, ACTIVATION: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    batch = tl.program_id(2).to(tl.int64)
    columns, inside, offsets = _tile(tl.program_id(0), spatial, channels, stride_c, stride_s, ROWS, COLUMNS)
    offsets += batch * stride_b
    tile = tl.load(x + offsets, mask=inside, other=0.0).to(ACC)
    scale, shift = _affine(weight, bias, weight_b, bias_b, batch, columns, channels, ACC)
    tile, _ = _normalised(tile, mean, rstd, batch, columns, channels, width, groups)
    tile = tile * scale[None, :] + shift[None, :]
    if ACTIVATION:
        tile *= tl.sigmoid(tile)
    tl.store(y + offsets, tile.to(y.dtype.element_ty), mask=inside)


@triton.jit
def group_norm_sums_kernel(
    x, weight, bias, weight_b, bias_b, mean, rstd, grad_y, partial, spatial, channels, width, groups,
    stride_b, stride_c, stride_s,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, STEPS: tl.constexpr, ACTIVATION: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    # partial (B, chunks, 2, C): a chunk's share of each channel's gradient of bias and weight.
    batch = tl.program_id(2).to(tl.int64)
    of_bias = tl.zeros((COLUMNS,), ACC)
    of_weight = tl.zeros((COLUMNS,), ACC)
    for step in range(STEPS):
        chunk = tl.program_id(0) * STEPS + step
        columns, inside, offsets = _tile(chunk, spatial, channels, stride_c, stride_s, ROWS, COLUMNS)
        offsets += batch * stride_b
        unit = tl.load(x + offsets, mask=inside, other=0.0).to(ACC)
        outer = tl.load(grad_y + offsets, mask=inside, other=0.0).to(ACC)
        scale, shift = _affine(weight, bias, weight_b, bias_b, batch, columns, channels, ACC)
        unit, _ = _normalised(unit, mean, rstd, batch, columns, channels, width, groups)
        outer *= _slope(unit * scale[None, :] + shift[None, :], ACTIVATION)
        of_bias += tl.sum(outer, 0)
        of_weight += tl.sum(outer * unit, 0)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    out = partial + (batch * tl.num_programs(0) + tl.program_id(0)) * 2 * channels + columns
    tl.store(out, of_bias, mask=columns < channels)
    tl.store(out + channels, of_weight, mask=columns < channels)


@triton.jit
def group_norm_reduce_kernel(
    partial, weight, weight_b, grad_weight, grad_bias, means, chunks, spatial, channels, width,
    CHUNKS: tl.constexpr, COLUMNS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    # One program for a group adds the chunks in order. grad_weight, grad_bias (B, C): of each sample.
    # means (2, B, G): of the gradient that reaches the normalised values, and of its product with them.
    group, batch = tl.program_id(0), tl.program_id(1).to(tl.int64)
    samples, groups = tl.num_programs(1), tl.num_programs(0)
    partial += batch * chunks * 2 * channels
    if weight_b is not None:
        weight += batch * weight_b
    plain = tl.zeros((COLUMNS,), ACC)
    product = tl.zeros((COLUMNS,), ACC)
    for first in range(0, width, COLUMNS):
        within = first + tl.arange(0, COLUMNS)
        valid = within < width
        columns = group * width + within
        of_bias = tl.zeros((COLUMNS,), ACC)
        of_weight = tl.zeros((COLUMNS,), ACC)
        for start in range(0, chunks, CHUNKS):
            chunk = start + tl.arange(0, CHUNKS)
            at = partial + chunk.to(tl.int64)[:, None] * 2 * channels + columns[None, :]
            inside = (chunk < chunks)[:, None] & valid[None, :]
            of_bias += tl.sum(tl.load(at, mask=inside, other=0.0), 0)
            of_weight += tl.sum(tl.load(at + channels, mask=inside, other=0.0), 0)
        out = batch * channels + columns
        tl.store(grad_bias + out, of_bias, mask=valid)
        tl.store(grad_weight + out, of_weight, mask=valid)
        if weight is not None:
            scale = tl.load(weight + columns, mask=valid, other=0.0).to(ACC)
            of_bias *= scale
            of_weight *= scale
        plain += of_bias
        product += of_weight
    elements = tl.full((), 1.0, ACC) * spatial * width
    out = means + batch * groups + group
    tl.store(out, tl.sum(plain, 0) / elements)
    tl.store(out + samples * groups, tl.sum(product, 0) / elements)


@triton.jit
def group_norm_backward_kernel(
    x, weight, bias, weight_b, bias_b, mean, rstd, grad_y, means, grad_x, spatial, channels, width, groups,
    stride_b, stride_c, stride_s,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, ACTIVATION: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    batch, samples = tl.program_id(2).to(tl.int64), tl.num_programs(2)
    columns, inside, offsets = _tile(tl.program_id(0), spatial, channels, stride_c, stride_s, ROWS, COLUMNS)
    offsets += batch * stride_b
    unit = tl.load(x + offsets, mask=inside, other=0.0).to(ACC)
    outer = tl.load(grad_y + offsets, mask=inside, other=0.0).to(ACC)
    scale, shift = _affine(weight, bias, weight_b, bias_b, batch, columns, channels, ACC)
    unit, factor = _normalised(unit, mean, rstd, batch, columns, channels, width, groups)
    outer *= _slope(unit * scale[None, :] + shift[None, :], ACTIVATION) * scale[None, :]
    at, valid = means + batch * groups + columns // width, columns < channels
    plain = tl.load(at, mask=valid, other=0.0)
    product = tl.load(at + samples * groups, mask=valid, other=0.0)
    result = (outer - plain[None, :] - unit * product[None, :]) * factor[None, :]
    tl.store(grad_x + offsets, result.to(grad_x.dtype.element_ty), mask=inside)
