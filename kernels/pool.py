"""Token means for the contrast and the domain heads. Source: MeDUET section "Losses", SiQC and dom."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .backend import triton, use_triton
from .dtypes import accumulator, at_least_float32, check_float
from .launch import config, launch
from .mix_index import packed
from .registration import Derivatives, register

if triton is not None:
    import triton.language as tl

# 1. Reference


def token_mean(x: Tensor, mask: Tensor | None = None) -> Tensor:
    """Average tokens, of the whole sequence or of each source.

    Args:
        x: (B, L, D).
        mask: (B, L) of 0 and 1, or None. With it the first mean is over its zeros (source 1), the second over
            its ones (source 2); a source without tokens gives zeros.

    Returns:
        (S, B, D) with S = 2 with a mask, else 1.

    Raises:
        ValueError: if the mask's shape does not fit.
    """
    if mask is None:
        return x.mean(1).unsqueeze(0)  # (1, B, D)
    _check(x, mask)
    second = mask.to(x.dtype).unsqueeze(-1)  # (B, L, 1)
    sums = torch.stack([(x * (1 - second)).sum(1), (x * second).sum(1)])  # (2, B, D)
    counts = torch.stack([(1 - second).sum(1), second.sum(1)])  # (2, B, 1)
    return sums / counts.clamp(min=1)  # (2, B, D)


def pooled_layer_norm_reference(
    x: Tensor, mask: Tensor | None = None, eps: float = 1e-5
) -> tuple[Tensor, Tensor]:
    """Compute :func:`pooled_layer_norm` in plain PyTorch: its definition."""
    x = at_least_float32(x)  # (B, L, D)
    return token_mean(F.layer_norm(x, x.shape[-1:], eps=eps), mask), token_mean(x, mask)


# 2. Kernels

if triton is not None:

    @triton.jit
    def _load_rows(
        x, rows, columns, length, width, stride_l, stride_d, ACC: tl.constexpr
    ):  # fmt: skip
        inside = (rows < length)[:, None] & (columns < width)[None, :]
        offsets = rows.to(tl.int64)[:, None] * stride_l + columns.to(tl.int64)[None, :] * stride_d
        return tl.load(x + offsets, mask=inside, other=0.0).to(ACC), inside

    @triton.jit
    def _statistics(tile, inside, width, EPS: tl.constexpr):
        # EPS is a constant, because arguments are float32, too coarse for float64 input.
        mean = tl.sum(tile, 1) / width
        centred = tl.where(inside, tile - mean[:, None], 0.0)
        rstd = 1.0 / tl.sqrt(tl.sum(centred * centred, 1) / width + EPS)
        return centred, rstd

    @triton.jit
    def pool_forward_kernel(
        x, mask, partial, length, width, stride_b, stride_l, stride_d,
        SOURCES: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, STEPS: tl.constexpr,
        EPS: tl.constexpr, ACC: tl.constexpr,
    ):  # fmt: skip
        # partial (B, chunks, S, 2, D): sums over a chunk of tokens, normalised and plain.
        chunk, batch = tl.program_id(0), tl.program_id(1).to(tl.int64)
        columns = tl.arange(0, BLOCK_D)
        x += batch * stride_b
        normed = tl.zeros((BLOCK_D,), ACC)
        plain = tl.zeros((BLOCK_D,), ACC)
        normed_second = tl.zeros((BLOCK_D,), ACC)
        plain_second = tl.zeros((BLOCK_D,), ACC)
        for step in range(STEPS):
            rows = (chunk * STEPS + step) * ROWS + tl.arange(0, ROWS)
            tile, inside = _load_rows(x, rows, columns, length, width, stride_l, stride_d, ACC)
            centred, rstd = _statistics(tile, inside, width, EPS)
            # Rows behind the end have no variance: without eps theirs would be 0 times infinity.
            unit = tl.where(inside, centred * rstd[:, None], 0.0)
            normed += tl.sum(unit, 0)
            plain += tl.sum(tile, 0)
            if SOURCES == 2:
                second = tl.load(mask + batch * length + rows, mask=rows < length, other=0).to(ACC)[:, None]
                normed_second += tl.sum(unit * second, 0)
                plain_second += tl.sum(tile * second, 0)
        out = partial + (batch * tl.num_programs(0) + chunk) * SOURCES * 2 * width + columns
        valid = columns < width
        tl.store(out, normed - normed_second, mask=valid)
        tl.store(out + width, plain - plain_second, mask=valid)
        if SOURCES == 2:
            tl.store(out + 2 * width, normed_second, mask=valid)
            tl.store(out + 3 * width, plain_second, mask=valid)

    @triton.jit
    def pool_reduce_kernel(
        partial, mask, normed, plain, count, chunks, length, width,
        SOURCES: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_L: tl.constexpr, ACC: tl.constexpr,
    ):  # fmt: skip
        # One program for a sample and a source: adds the chunks in order, divides by the source's tokens.
        batch, source = tl.program_id(0).to(tl.int64), tl.program_id(1)
        columns = tl.arange(0, BLOCK_D)
        valid = columns < width
        tokens = tl.full((), 0, ACC) + length  # a length of 1 is a plain constant, without .to
        if SOURCES == 2:
            second = tl.zeros((BLOCK_L,), tl.int32)
            for first in range(0, length, BLOCK_L):
                rows = first + tl.arange(0, BLOCK_L)
                second += tl.load(mask + batch * length + rows, mask=rows < length, other=0).to(tl.int32)
            ones = tl.sum(second, 0)
            tokens = tl.where(source == 1, ones, length - ones).to(ACC)
        divisor = tl.maximum(tokens, 1.0)
        total_normed = tl.zeros((BLOCK_D,), ACC)
        total_plain = tl.zeros((BLOCK_D,), ACC)
        for chunk in range(chunks):
            at = partial + ((batch * chunks + chunk) * SOURCES + source) * 2 * width + columns
            total_normed += tl.load(at, mask=valid, other=0.0)
            total_plain += tl.load(at + width, mask=valid, other=0.0)
        out = (source * tl.num_programs(0) + batch) * width + columns
        tl.store(normed + out, total_normed / divisor, mask=valid)
        tl.store(plain + out, total_plain / divisor, mask=valid)
        tl.store(count + source * tl.num_programs(0) + batch, divisor)

    @triton.jit
    def pool_backward_kernel(
        x, mask, count, grad_normed, grad_plain, grad_x, length, width, stride_b, stride_l, stride_d,
        SOURCES: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr,
        EPS: tl.constexpr, ACC: tl.constexpr,
    ):  # fmt: skip
        # LayerNorm's statistics are computed again: one read of x, one write of its gradient.
        batch = tl.program_id(1).to(tl.int64)
        batches = tl.num_programs(1)
        rows, columns = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, BLOCK_D)
        tile, inside = _load_rows(x + batch * stride_b, rows, columns, length, width, stride_l, stride_d, ACC)
        centred, rstd = _statistics(tile, inside, width, EPS)
        unit = tl.where(inside, centred * rstd[:, None], 0.0)
        at = batch * width + columns
        valid = columns < width
        share = 1.0 / tl.load(count + batch)
        outer = tl.load(grad_normed + at, mask=valid, other=0.0)[None, :] * share
        plain = tl.load(grad_plain + at, mask=valid, other=0.0)[None, :] * share
        if SOURCES == 2:
            at += batches * width
            share = 1.0 / tl.load(count + batches + batch)
            second = tl.load(mask + batch * length + rows, mask=rows < length, other=0)[:, None] != 0
            outer = tl.where(second, tl.load(grad_normed + at, mask=valid, other=0.0)[None, :] * share, outer)
            plain = tl.where(second, tl.load(grad_plain + at, mask=valid, other=0.0)[None, :] * share, plain)
        outer = tl.where(inside, outer, 0.0)
        slope = tl.sum(outer * unit, 1) / width
        offset = tl.sum(outer, 1) / width
        result = rstd[:, None] * (outer - offset[:, None] - unit * slope[:, None]) + plain
        out = grad_x + (batch * length + rows.to(tl.int64)[:, None]) * width + columns[None, :]
        tl.store(out, result.to(grad_x.dtype.element_ty), mask=inside)


# 3. Registration


class _Pool(NamedTuple):
    x: Tensor  # (B, L, D)
    mask: Tensor | None  # (B, L) uint8
    eps: float


class _Gradients(NamedTuple):
    grad_normed: Tensor  # (S, B, D)
    grad_plain: Tensor  # (S, B, D)
    x: Tensor  # (B, L, D)
    mask: Tensor | None  # (B, L) uint8
    counts: Tensor  # (S, B)
    eps: float


def _fake_pool(x: _Pool) -> tuple[Tensor, Tensor, Tensor]:
    batch, _, width = x.x.shape
    count = x.x.new_empty(_sources(x), batch, dtype=torch.promote_types(x.x.dtype, torch.float32))
    normed, plain = (count.new_empty(*count.shape, width) for _ in range(2))
    return normed, plain, count


def _sources(x: _Pool | _Gradients) -> int:
    return 1 if x.mask is None else 2


def _constants(x: _Pool | _Gradients) -> dict[str, Any]:
    """Return the constants that the kernels share."""
    block = triton.next_power_of_2(x.x.shape[2])
    return {"SOURCES": _sources(x), "BLOCK_D": block, "ACC": accumulator(x.x.dtype)}


def _launch_pool(x: _Pool) -> tuple[Tensor, Tensor, Tensor]:
    (batch, length, width), sources = x.x.shape, _sources(x)
    options = config("pool_forward", x.x.device)
    rows, steps = options["ROWS"], options["STEPS"]
    chunks = triton.cdiv(length, rows * steps)
    normed, plain, count = _fake_pool(x)  # (S, B, D), (S, B, D), (S, B)
    partial = normed.new_empty(batch, chunks, sources, 2, width)
    arguments = (x.x, x.mask, partial, length, width, *x.x.stride())
    constants = {**_constants(x), "ROWS": rows, "STEPS": steps, "EPS": x.eps}
    launch(pool_forward_kernel, (chunks, batch), arguments, constants, options)
    options = config("pool_reduce", x.x.device)
    arguments = (partial, x.mask, normed, plain, count, chunks, length, width)
    constants = {**_constants(x), "BLOCK_L": options["BLOCK_L"]}
    launch(pool_reduce_kernel, (batch, sources), arguments, constants, options)
    return normed, plain, count


def _fake_gradient(x: _Gradients) -> Tensor:
    return torch.empty_like(x.x, memory_format=torch.contiguous_format)


def _launch_gradient(x: _Gradients) -> Tensor:
    batch, length, width = x.x.shape
    grad_x = _fake_gradient(x)  # (B, L, D)
    options = config("pool_backward", x.x.device)
    grid = (triton.cdiv(length, options["ROWS"]), batch)
    tensors = (x.x, x.mask, x.counts, x.grad_normed.contiguous(), x.grad_plain.contiguous(), grad_x)
    constants = {**_constants(x), "ROWS": options["ROWS"], "EPS": x.eps}
    arguments = (*tensors, length, width, *x.x.stride())
    launch(pool_backward_kernel, grid, arguments, constants, options)
    return grad_x


def _setup_context(ctx: Any, x: _Pool, output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.eps = x.eps
    ctx.save_for_backward(x.x, x.mask, output[2])
    ctx.mark_non_differentiable(output[2])


def _backward(ctx: Any, grad_normed: Tensor, grad_plain: Tensor, _: Tensor) -> tuple[Tensor, None, None]:
    return _pool_backward(grad_normed, grad_plain, *ctx.saved_tensors, ctx.eps), None, None


def _recall(ctx: Any, _: tuple[Tensor, ...]) -> _Pool:
    x, mask, _ = ctx.saved_tensors
    return _Pool(x, mask, ctx.eps)


_pool = register(
    "pooled_layer_norm", _Pool, "(Tensor, Tensor, Tensor)", _launch_pool, _fake_pool,
    Derivatives(_setup_context, _backward, _recall, lambda x: pooled_layer_norm_reference(*x)),
)  # fmt: skip
_pool_backward = register(
    "pooled_layer_norm_backward", _Gradients, "Tensor", _launch_gradient, _fake_gradient
)


# 4. Public function


def _check(x: Tensor, mask: Tensor | None) -> None:
    if x.dim() != 3:
        raise ValueError(f"x has shape {tuple(x.shape)}, expected (B, L, D)")
    if mask is not None and mask.shape != x.shape[:2]:
        raise ValueError(f"mask has shape {tuple(mask.shape)}, expected {tuple(x.shape[:2])}")


def pooled_layer_norm(x: Tensor, mask: Tensor | None = None, eps: float = 1e-5) -> tuple[Tensor, Tensor]:
    """Compute the token mean of LayerNorm without affine, and the plain token mean, in one read of ``x``.

    Args:
        x: (B, L, D), any float dtype and strides.
        mask: as in :func:`token_mean`.
        eps: LayerNorm's.

    Returns:
        The pooled LayerNorm and the plain mean, both (S, B, D), computed and returned in at least float32.

    Raises:
        ValueError: if a shape does not fit, or x is not of a float dtype.
    """
    _check(x, mask)
    check_float("x", x)
    if not use_triton(x) or x.numel() == 0:
        return pooled_layer_norm_reference(x, mask, eps)
    normed, plain, _ = _pool(x, None if mask is None else packed(mask), eps)
    return normed, plain
