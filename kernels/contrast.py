"""Contrasts over large batches in O(N D) memory: three positives in closed form, or equal labels.

Source: MeDUET section "Losses", SiQC. The definition and the plain PyTorch path are in ``contrast_eager``,
the kernels in ``contrast_kernels``. Keys get no gradient, so the forward pass can compute that of the queries
beside the loss: with unit vectors q^ and K^, dL/dq^ = (s / N) (softmax K^ - mean of the positives K^).

Floating-point operations with a gradient: 4 N^2 D for three positives (logits once, softmax-weighted keys as
flash attention accumulates them), 6 N^2 D for labels, where a first pass over the keys counts each query's
positives (2 N^2 D); 2 N^2 D without a gradient. A program accumulates the configuration's COLUMNS columns;
wider rows are shared out over programs, each of which computes the logits again: 2 N^2 D more.

float32 inputs are multiplied in float32 ("ieee"), without tensor cores: in training they are the pooled means
of some hundred rows, where launches cost more than products, and TF32 would change the loss in the third
digit. For many thousand rows pass bfloat16 or float16, which are multiplied on tensor cores.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .backend import interpreted, triton, use_triton
from .contrast_eager import (
    EPSILON,
    MAX_SCALE,
    MIN_SCALE,
    Identity,
    check_identity,
    quadruplet_contrast_eager,
    supervised_contrast_eager,
)
from .dtypes import accumulator, at_least_float32
from .launch import config, launch
from .registration import register

if triton is not None:
    import triton.language as tl

    from .contrast_kernels import (
        contrast_backward_kernel,
        contrast_finish_kernel,
        contrast_lengths_kernel,
        contrast_rows_kernel,
    )

CONTENT, STYLE, LABELS = 0, 1, 2  # IDENTITY in the kernels
STATISTICS, ONE_PASS, WEIGHTS = 0, 1, 2  # PASS in the kernels
# Up to here every program computes the keys' lengths from the tiles that it multiplies, which saves a launch;
# beyond, a kernel of its own computes them once.
INLINE_LENGTHS = 4096
MAX_SLICES, MAX_SLICE = 3, 256  # a program has up to three accumulators of up to 256 columns

# 1. Reference: contrast_eager.py. 2. Kernels: contrast_kernels.py. 3. Registration


class _Contrast(NamedTuple):
    queries: Tensor  # (M, D)
    keys: Tensor  # (N, D)
    log_scale: Tensor  # ()
    query_labels: Tensor | None  # (M,) int64
    key_labels: Tensor | None  # (N,) int64
    self_index: Tensor | None  # (M,) int64
    identity: int
    key_offset: int
    gradient: bool


class _Gradients(NamedTuple):
    grad: Tensor  # ()
    slope: Tensor  # (M, D), or empty without a gradient
    stats: Tensor  # (2,)
    dtype: torch.dtype
    scale_dtype: torch.dtype


def _slices(width: int, limit: int) -> tuple[int, int, int]:
    """Return columns of an accumulator, accumulators of a program, programs that share the columns."""
    groups = triton.cdiv(width, limit)
    share = triton.cdiv(width, groups)
    choices = [(max(16, triton.next_power_of_2(triton.cdiv(share, n))), n) for n in range(1, MAX_SLICES + 1)]
    size, count = min((c for c in choices if c[0] <= MAX_SLICE), key=lambda c: (c[0] * c[1], c[1]))
    return size, count, groups


def _fake_contrast(x: _Contrast) -> tuple[Tensor, Tensor, Tensor]:
    loss = x.queries.new_empty((), dtype=torch.promote_types(x.queries.dtype, torch.float32))
    return loss, loss.new_empty(x.queries.shape if x.gradient else 0), loss.new_empty(2)


def _launch_contrast(x: _Contrast) -> tuple[Tensor, Tensor, Tensor]:
    (rows, width), key_rows = x.queries.shape, x.keys.shape[0]
    device, dtype, acc = x.queries.device, x.queries.dtype, accumulator(x.queries.dtype)
    labelled = x.identity == LABELS
    dot = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}.get(dtype, acc)
    if dtype == torch.bfloat16 and interpreted():
        dot = tl.float32  # the interpreter's bfloat16 products are wrong
    if dtype.itemsize != 2:
        name = "contrast_float32"
    elif rows <= INLINE_LENGTHS:
        name = "contrast_small"
    elif width % 64 != 0 or key_rows % 128 != 0 or (labelled and dtype == torch.float16):
        name = "contrast_large_ragged"  # masks take registers; labels and float16, which divides tiles, too
    elif labelled:
        name = "contrast_large_labels"
    else:
        name = "contrast_large_float16" if dtype == torch.float16 else "contrast_large"
    options = config(name, device)
    size, count, groups = _slices(width, options["COLUMNS"])
    loss, slope, stats = _fake_contrast(x)  # (), (M, D), (2,)
    limits = {"EPS": EPSILON, "MIN": MIN_SCALE, "MAX": MAX_SCALE}

    inverse = None
    if key_rows > INLINE_LENGTHS:
        inverse = loss.new_empty(key_rows)
        chosen = config("contrast_lengths", device)
        grid: tuple[int, ...] = (triton.cdiv(key_rows, chosen["ROWS"]),)
        constants = {"EPS": EPSILON, "ROWS": chosen["ROWS"], "CHUNK": chosen["CHUNK"], "ACC": acc}
        arguments: tuple[Any, ...] = (x.keys, inverse, key_rows, width, *x.keys.stride())
        launch(contrast_lengths_kernel, grid, arguments, constants, "contrast_lengths", chosen)

    # Few queries: the keys are shared out until every multiprocessor has a program.
    blocks = triton.cdiv(rows, options["BLOCK_M"])
    passes = groups if x.gradient else 1
    wanted = triton.cdiv(options["PROGRAMS"], blocks * passes)
    tiles = triton.cdiv(key_rows, options["BLOCK_N"])
    tiles_per_split = triton.cdiv(tiles, min(wanted, tiles))
    splits = triton.cdiv(tiles, tiles_per_split)
    statistics = loss.new_empty(5, splits, rows)  # of each row: peak, total, moment, agreement, count
    ticket = x.queries.new_empty((), dtype=torch.int32)
    weighted = None
    if x.gradient:
        weighted = slope if splits == 1 else loss.new_empty(splits, rows, width)

    quarters = (width, rows // 4, key_rows // 4, x.key_offset)
    strides = (*x.queries.stride(), *x.keys.stride())
    constants = {
        **limits, "LABELLED": labelled, "HELD": bool(options["HELD"]) and groups == 1,
        "EVEN": width == size * count * groups and width % options["CHUNK"] == 0,
        "WHOLE": key_rows % options["BLOCK_N"] == 0,
        "BLOCK_M": options["BLOCK_M"], "BLOCK_N": options["BLOCK_N"], "CHUNK": options["CHUNK"],
        "SLICE": size, "SLICES": count, "ACC": acc, "DOT": dot, "PRECISION": "ieee",
    }  # fmt: skip
    arguments = (*x[:6], inverse, *statistics, weighted, ticket, rows, key_rows, *quarters)
    arguments += (tiles_per_split * options["BLOCK_N"], splits, *strides)
    if labelled:
        stages = [STATISTICS, WEIGHTS] if x.gradient else [STATISTICS]
    else:
        stages = [ONE_PASS if x.gradient else STATISTICS]
    for stage in stages:
        grid = (blocks, splits, 1 if stage == STATISTICS else groups)
        launch(contrast_rows_kernel, grid, arguments, {**constants, "PASS": stage}, name, options)

    chosen = config("contrast_finish", device)
    block = triton.next_power_of_2(width)
    rows_each = max(min(chosen["ROWS"], 4096 // block), 1)  # whole rows must fit in a program
    programs = triton.cdiv(rows, rows_each)
    partial = loss.new_empty(3, programs)
    constants = {
        **limits, "IDENTITY": x.identity, "GRADIENT": x.gradient, "ROWS": rows_each,
        "BLOCK_D": block, "BLOCK_P": chosen["BLOCK_P"], "ACC": acc,
    }  # fmt: skip
    arguments = (*x[:3], *statistics, weighted, slope, partial, ticket, loss, stats)
    arguments += (rows, *quarters, splits, *strides)
    launch(contrast_finish_kernel, (programs,), arguments, constants, "contrast_finish", chosen)
    return loss, slope, stats


def _fake_gradients(x: _Gradients) -> tuple[Tensor, Tensor]:
    return x.slope.new_empty(x.slope.shape, dtype=x.dtype), x.slope.new_empty((), dtype=x.scale_dtype)


def _launch_gradients(x: _Gradients) -> tuple[Tensor, Tensor]:
    outputs, elements = _fake_gradients(x), x.slope.numel()  # (M, D), ()
    options = config("contrast_backward", x.slope.device)
    grid = (max(triton.cdiv(elements, options["BLOCK"]), 1),)  # there may be a slope of the scale alone
    constants, arguments = {"BLOCK": options["BLOCK"]}, (*x[:3], *outputs, elements)
    launch(contrast_backward_kernel, grid, arguments, constants, "contrast_backward", options)
    return outputs


def _setup_context(ctx: Any, x: _Contrast, output: tuple[Tensor, ...]) -> None:
    _, slope, stats = output
    ctx.save_for_backward(slope, stats)
    ctx.mark_non_differentiable(slope, stats)
    ctx.set_materialize_grads(False)  # else zeros of the size of slope are filled for nothing
    ctx.dtypes, ctx.scale_shape = (x.queries.dtype, x.log_scale.dtype), x.log_scale.shape


def _backward(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    gradients: list[Tensor | None] = [None] * len(_Contrast._fields)
    if grad is not None:
        grad_queries, grad_scale = _contrast_backward(grad, *ctx.saved_tensors, *ctx.dtypes)
        if ctx.needs_input_grad[0]:
            gradients[0] = grad_queries
        if ctx.needs_input_grad[2]:
            gradients[2] = grad_scale.reshape(ctx.scale_shape)
    return tuple(gradients)


_contrast = register(
    "contrast", _Contrast, "(Tensor, Tensor, Tensor)",
    _launch_contrast, _fake_contrast, _setup_context, _backward,
)  # fmt: skip
_contrast_backward = register(
    "contrast_backward", _Gradients, "(Tensor, Tensor)", _launch_gradients, _fake_gradients
)


# 4. Public functions


def _check(queries: Tensor, keys: Tensor, log_scale: Tensor) -> None:
    if queries.dim() != 2 or keys.dim() != 2 or queries.shape[1] != keys.shape[1]:
        raise ValueError(
            f"queries has shape {tuple(queries.shape)} and keys {tuple(keys.shape)}, "
            "expected both two-dimensional and equally wide"
        )
    if log_scale.device != queries.device:
        raise ValueError(f"log_scale is on {log_scale.device}, expected {queries.device} like the queries")
    if log_scale.numel() != 1:
        raise ValueError(f"log_scale has shape {tuple(log_scale.shape)}, expected a scalar")


def _alike(queries: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
    """Return both in one dtype, and the keys cut off from the graph."""
    if queries.dtype != keys.dtype:
        queries = at_least_float32(queries)
    return queries, keys.detach().to(queries.dtype)


def quadruplet_contrast(
    queries: Tensor, keys: Tensor, log_scale: Tensor, identity: Identity, key_offset: int = 0
) -> Tensor:
    """Average over rows minus the mean log-probability of a row's three positives.

    Logits are scale * cos(query, key), the row's own key left out; scale = exp(log_scale) clamped to
    [1e-3, 100], where the clamp acts without a gradient; a vector is divided by its length plus 1e-8.

    Args:
        queries: (4B, D), four blocks as in :func:`quadruplet_identities`; any float dtype and strides.
        keys: (4 B*, D), the same rows seen by the teacher, or four blocks of B* = ranks * B rows gathered
            from many ranks, each with its B rows together. They get no gradient.
        log_scale: scalar.
        identity: which rows are alike.
        key_offset: where in every block of keys the queries' own rank begins: rank * B. Query (block b, row
            i) is the same as key (block b, row key_offset + i); its partner is key_offset + B-1-i.

    Returns:
        Scalar, computed and returned in at least float32.

    Raises:
        ValueError: if shapes do not make four blocks, B* is no multiple of B, key_offset is none of 0, B,
            2B, .. below B*, or the identity is unknown.
    """
    _check(queries, keys, log_scale)
    rows, key_rows = queries.shape[0], keys.shape[0]
    if rows % 4 or (key_rows % rows if rows else key_rows):
        raise ValueError(
            f"queries has shape {tuple(queries.shape)} and keys {tuple(keys.shape)}, expected both "
            "(4B, D), or keys (4nB, D) from n ranks"
        )
    check_identity(identity)
    batch, key_batch = rows // 4, key_rows // 4
    if key_offset % max(batch, 1) or not 0 <= key_offset <= key_batch - batch:
        raise ValueError(
            f"key_offset is {key_offset}, expected a multiple of {batch} from 0 to {key_batch - batch}"
        )
    if not use_triton(queries) or queries.numel() == 0:
        return quadruplet_contrast_eager(queries, keys, log_scale, identity, key_offset)
    gradient = torch.is_grad_enabled() and queries.requires_grad
    code = CONTENT if identity == "content" else STYLE
    queries, keys = _alike(queries, keys)
    return _contrast(queries, keys, log_scale, None, None, None, code, key_offset, gradient)[0]


def supervised_contrast(
    queries: Tensor,
    keys: Tensor,
    query_labels: Tensor,
    key_labels: Tensor,
    log_scale: Tensor,
    self_index: Tensor | None = None,
) -> Tensor:
    """Average minus the mean log-probability of a query's positives, which are the keys with its label.

    Logits, scale and lengths are those of :func:`quadruplet_contrast`, which is the special case of labels
    that repeat four times and needs two thirds of the operations. A query without positives adds nothing and
    is not counted in the mean; where no query has any, the loss is 0.

    Args:
        queries: (M, D), any float dtype and strides.
        keys: (N, D); they get no gradient.
        query_labels: (M,) int64.
        key_labels: (N,) int64.
        log_scale: scalar.
        self_index: (M,) int64 or None: the key that is the query itself and takes no part in its row. Values
            outside 0 .. N-1 are not checked for, which would wait for the device.

    Returns:
        Scalar, computed and returned in at least float32.

    Raises:
        ValueError: if a shape or a label's dtype does not fit, or there is no key.
    """
    _check(queries, keys, log_scale)
    if keys.shape[0] == 0:
        raise ValueError("keys has no rows, expected at least one")
    for name, value, expected in (
        ("query_labels", query_labels, queries.shape[:1]),
        ("key_labels", key_labels, keys.shape[:1]),
        ("self_index", self_index, queries.shape[:1]),
    ):
        if value is not None and (value.shape != expected or value.dtype != torch.int64):
            raise ValueError(
                f"{name} is {value.dtype} of shape {tuple(value.shape)}, "
                f"expected int64 of shape {tuple(expected)}"
            )
    if not use_triton(queries) or queries.numel() == 0:
        return supervised_contrast_eager(queries, keys, query_labels, key_labels, log_scale, self_index)
    gradient = torch.is_grad_enabled() and queries.requires_grad
    queries, keys = _alike(queries, keys)
    query_labels, key_labels = query_labels.contiguous(), key_labels.contiguous()
    self_index = None if self_index is None else self_index.contiguous()
    arguments = (queries, keys, log_scale, query_labels, key_labels, self_index, LABELS, 0, gradient)
    return _contrast(*arguments)[0]
