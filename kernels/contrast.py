"""Contrasts over large batches in O(N D) memory: three positives in closed form, or equal labels.

Source: MeDUET section "Losses", SiQC. Keys get no gradient, so the forward pass can compute that of the
queries beside the loss: with unit vectors q^ and K^, dL/dq^ = (s / N) (softmax K^ - mean of the positives
K^), and dL/dlog s = sum of q^ . dL/dq^. Kernels do so, and so does plain PyTorch in chunks of rows.

Floating-point operations with a gradient: 4 N^2 D for three positives (logits once, softmax-weighted keys as
flash attention accumulates them), 6 N^2 D for labels, where a first pass over the keys counts each query's
positives (2 N^2 D); 2 N^2 D without a gradient. A program accumulates the configuration's COLUMNS columns;
wider rows are shared out over programs, each of which computes the logits again: 2 N^2 D more.

float32 inputs are multiplied in float32 ("ieee"), without tensor cores: in training they are the pooled means
of some hundred rows, where launches cost more than products, and TF32 would change the loss in the third
digit. For many thousand rows pass bfloat16 or float16, which are multiplied on tensor cores.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from .backend import interpreted, transformed, triton, use_triton
from .dtypes import accumulator, at_least_float32, check_float, without_autocast
from .launch import config, launch
from .registration import Derivatives, register

if triton is not None:
    import triton.language as tl

    from .contrast_kernels import (
        contrast_backward_kernel,
        contrast_finish_kernel,
        contrast_lengths_kernel,
        contrast_rows_kernel,
    )

Identity = Literal["content", "style"]
IDENTITIES: tuple[Identity, ...] = ("content", "style")
LABELS = 2  # IDENTITY in the kernels; 0 and 1 are those above
STATISTICS, ONE_PASS, WEIGHTS = 0, 1, 2  # PASS in the kernels
MIN_SCALE, MAX_SCALE = 1e-3, 100.0
EPSILON = 1e-8
# Logits that plain PyTorch may hold at once: beyond, rows go in chunks. A chunk of 16 MB stays near a CPU's
# caches; a GPU wants larger products.
CPU_LOGITS, GPU_LOGITS = 2**22, 2**26
# Up to here every program computes the keys' lengths from the tiles that it multiplies, which saves a launch;
# beyond, a kernel of its own computes them once.
INLINE_LENGTHS = 4096
MAX_SLICES, MAX_SLICE = 3, 256  # a program has up to three accumulators of up to 256 columns

# 1. Reference


def check_identity(identity: str) -> None:
    """Refuse an unknown identity with a ValueError."""
    if identity not in IDENTITIES:
        raise ValueError(f"identity is {identity!r}, expected 'content' or 'style'")


def quadruplet_identities(batch: int, identity: Identity, device: torch.device | None = None) -> Tensor:
    """Return the identity of each of the 4B rows: (4B,) int64.

    The four blocks are: source 1, source 2 (the batch-flip partner), the reconstruction with source 1's
    content and source 2's style, and the reverse. Rows are alike in content, or in style.

    In an odd batch the middle sample is its own partner, and its four rows are alike: three positives again.

    Raises:
        ValueError: for an unknown identity.
    """
    check_identity(identity)
    own = torch.arange(batch, device=device)
    partner = own.flip(0)
    blocks = [own, partner, own, partner] if identity == "content" else [own, partner, partner, own]
    return torch.cat(blocks)


def supervised_contrast_reference(
    queries: Tensor, keys: Tensor, query_labels: Tensor, key_labels: Tensor, log_scale: Tensor,
    self_index: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Compute :func:`supervised_contrast` in plain PyTorch: its definition, holds every logit."""
    query = at_least_float32(queries)  # (M, D)
    key = keys.detach().to(query.dtype)  # (N, D)
    query = query / (query.norm(dim=1, keepdim=True) + EPSILON)
    key = key / (key.norm(dim=1, keepdim=True) + EPSILON)
    scale = log_scale.to(query.dtype).exp().clamp(MIN_SCALE, MAX_SCALE)
    with without_autocast(queries.device):  # it would run the small, sensitive similarity in bf16
        logits = scale * (query @ key.T)  # (M, N)
    positive = query_labels[:, None] == key_labels[None, :]  # (M, N)
    if self_index is not None:
        itself = torch.zeros_like(positive).scatter(1, self_index[:, None], True)
        # Not -inf: a row without any other key would turn into NaN.
        logits = logits.masked_fill(itself, torch.finfo(logits.dtype).min)
        positive = positive & ~itself
    log_probability = logits.log_softmax(1).masked_fill(~positive, 0.0)  # (M, N)
    count = positive.sum(1)  # (M,)
    per_row = -log_probability.sum(1) / count.clamp(min=1)  # (M,)
    return per_row.sum() / (count > 0).sum().clamp(min=1)  # ()


def quadruplet_contrast_reference(
    queries: Tensor, keys: Tensor, log_scale: Tensor, identity: Identity, key_offset: int = 0
) -> Tensor:
    """Compute :func:`quadruplet_contrast` by its definition: labels for the supervised contrast."""
    batch, key_batch = queries.shape[0] // 4, keys.shape[0] // 4
    labels = quadruplet_identities(batch, identity, queries.device)  # (4B,)
    ranks = torch.arange(0, key_batch, max(batch, 1), device=queries.device)
    key_labels = (labels.view(4, 1, batch) + ranks[:, None]).flatten()  # (4 B*,)
    self_index, _ = quadruplet_indices(batch, key_batch, identity, key_offset, queries.device)
    return supervised_contrast_reference(
        queries, keys, labels + key_offset, key_labels, log_scale, self_index
    )


def quadruplet_indices(
    batch: int, key_batch: int, identity: Identity, key_offset: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return each query's own key (4B,) and its three positives (4B, 3), in closed form.

    Query i of block b finds key i in the blocks that carry what b carries, own or partner, and key B-1-i in
    the others; those of the block b itself is the query's own key.
    """
    sample = torch.arange(batch, device=device)
    block = torch.arange(4, device=device)
    kind = block % 2 if identity == "content" else (block + 1) // 2 % 2
    other = (block[:, None] + torch.arange(1, 4, device=device)) % 4  # (4, 3)
    alike = (kind[other] == kind[:, None])[:, None, :]
    index = torch.where(alike, sample[None, :, None], batch - 1 - sample[None, :, None])
    positives = other[:, None, :] * key_batch + key_offset + index
    itself = block[:, None] * key_batch + key_offset + sample
    return itself.flatten(), positives.reshape(4 * batch, 3)


# 2. Kernels: contrast_kernels.py

# 3. Registration


class _Contrast(NamedTuple):
    queries: Tensor  # (M, D)
    keys: Tensor  # (N, D)
    log_scale: Tensor  # ()
    query_labels: Tensor | None  # (M,) int64
    key_labels: Tensor | None  # (N,) int64
    self_index: Tensor | None  # (M,) int64
    identity: int  # position in IDENTITIES, or LABELS
    key_offset: int
    gradient: bool
    fast: bool  # by the kernels


class _Gradients(NamedTuple):
    grad: Tensor  # ()
    slope: Tensor  # (M, D), or empty without a gradient
    stats: Tensor  # (2,): slope of log_scale, what the queries' slopes are multiplied by
    dtype: torch.dtype
    scale_dtype: torch.dtype
    fast: bool


def _fake_contrast(x: _Contrast) -> tuple[Tensor, Tensor, Tensor]:
    loss = x.queries.new_empty((), dtype=torch.promote_types(x.queries.dtype, torch.float32))
    return loss, loss.new_empty(x.queries.shape if x.gradient else 0), loss.new_empty(2)


def _chunked_contrast(x: _Contrast) -> tuple[Tensor, Tensor, Tensor]:
    """Compute loss and derivatives in plain PyTorch; both products run on the same chunk of logits."""
    queries, keys, log_scale, query_labels, key_labels, self_index = x[:6]
    loss, slope, stats = _fake_contrast(x)  # (), (M, D), (2,)
    rows, columns = queries.shape[0], keys.shape[0]
    positives = None
    if x.identity != LABELS:
        self_index, positives = quadruplet_indices(
            rows // 4, columns // 4, IDENTITIES[x.identity], x.key_offset, queries.device
        )  # (M,), (M, 3)
    step = max((GPU_LOGITS if queries.is_cuda else CPU_LOGITS) // columns, 16)
    raw_scale = log_scale.to(loss.dtype).exp()
    scale = raw_scale.clamp(MIN_SCALE, MAX_SCALE)
    key = keys.to(loss.dtype)
    key = key / (key.norm(dim=1, keepdim=True) + EPSILON)  # (N, D)
    buffer = loss.new_empty(min(step, rows), columns)
    totals = loss.new_zeros(3)  # loss, slope of the scale, rows with positives
    with without_autocast(queries.device):
        for first in range(0, rows, step):
            part = slice(first, min(first + step, rows))
            query = queries[part].to(loss.dtype)  # (m, D), m rows of the chunk
            length = query.norm(dim=1, keepdim=True)  # (m, 1)
            query = query / (length + EPSILON)  # (m, D)
            logits = torch.mm(query * scale, key.T, out=buffer[: len(query)])  # (m, N)
            if self_index is not None:
                itself = self_index[part, None]  # (m, 1)
                logits.scatter_(1, itself, torch.finfo(loss.dtype).min)
            # Everything relative to the largest logit: differences of small numbers lose no digits.
            logits.sub_(logits.amax(1, keepdim=True))
            if positives is not None:
                positive = positives[part]  # (m, 3)
                count = torch.full_like(length, positive.shape[1])  # (m, 1)
                agreement = logits.gather(1, positive).mean(1, keepdim=True)  # (m, 1)
            else:
                assert query_labels is not None
                assert key_labels is not None
                positive = query_labels[part, None] == key_labels  # (m, N)
                if self_index is not None:
                    positive.scatter_(1, itself, False)
                count = positive.sum(1, keepdim=True)  # (m, 1)
                agreement = logits.masked_fill(~positive, 0.0).sum(1, keepdim=True) / count.clamp(min=1)
            total = logits.exp_().sum(1, keepdim=True)  # (m, 1)
            valid = count > 0
            totals[0] += torch.where(valid, total.log() - agreement, 0.0).sum()
            totals[2] += valid.sum()
            if not x.gradient:
                continue
            share = total / count.clamp(min=1)
            if positives is not None:
                logits.scatter_add_(1, positive, -share.expand(positive.shape))
            else:
                logits.addcmul_(positive.to(loss.dtype), share, value=-1.0)
            difference = torch.where(valid, torch.mm(logits, key) / total, 0.0).mul_(scale)  # (m, D)
            inner = (query * difference).sum(1, keepdim=True)  # (m, 1)
            totals[1] += inner.sum()
            # Through q / (|q| + eps); at zero PyTorch takes 0 for the slope of the length.
            along = inner / torch.where(length > 0, length, 1.0)
            torch.sub(difference / (length + EPSILON), query * along, out=slope[part])
    share = 1 / totals[2].clamp(min=1)
    loss.copy_(totals[0] * share)
    free = (raw_scale >= MIN_SCALE) & (raw_scale <= MAX_SCALE)
    stats.copy_(torch.stack([torch.where(free, totals[1] * share, 0.0), share]))
    return loss, slope, stats


def _slices(width: int, limit: int) -> tuple[int, int, int]:
    """Return columns of an accumulator, accumulators of a program, programs that share the columns."""
    groups = triton.cdiv(width, limit)
    share = triton.cdiv(width, groups)
    choices = [(max(16, triton.next_power_of_2(triton.cdiv(share, n))), n) for n in range(1, MAX_SLICES + 1)]
    size, count = min((c for c in choices if c[0] <= MAX_SLICE), key=lambda c: (c[0] * c[1], c[1]))
    return size, count, groups


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
        launch(contrast_lengths_kernel, grid, arguments, constants, chosen)

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
        launch(contrast_rows_kernel, grid, arguments, {**constants, "PASS": stage}, options)

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
    launch(contrast_finish_kernel, (programs,), arguments, constants, chosen)
    return loss, slope, stats


def _fake_gradients(x: _Gradients) -> tuple[Tensor, Tensor]:
    return x.slope.new_empty(x.slope.shape, dtype=x.dtype), x.slope.new_empty((), dtype=x.scale_dtype)


def _run_gradients(x: _Gradients) -> tuple[Tensor, Tensor]:
    if not x.fast:
        slopes = x.slope * (x.grad * x.stats[1])  # (M, D)
        return slopes.to(x.dtype), (x.grad * x.stats[0]).to(x.scale_dtype)
    outputs, elements = _fake_gradients(x), x.slope.numel()  # (M, D), ()
    options = config("contrast_backward", x.slope.device)
    grid = (max(triton.cdiv(elements, options["BLOCK"]), 1),)  # there may be a slope of the scale alone
    constants, arguments = {"BLOCK": options["BLOCK"]}, (*x[:3], *outputs, elements)
    launch(contrast_backward_kernel, grid, arguments, constants, options)
    return outputs


def _setup_context(ctx: Any, x: _Contrast, output: tuple[Tensor, ...]) -> None:
    _, slope, stats = output
    learnt = [name for name, need in zip(x._fields[:3], ctx.needs_input_grad[:3], strict=True) if need]
    ctx.save_for_backward(slope, stats, *(getattr(x, name) for name in learnt))
    ctx.mark_non_differentiable(slope, stats)
    ctx.set_materialize_grads(False)  # else zeros of the size of slope are filled for nothing
    ctx.known = x.queries.dtype, x.log_scale.dtype, x.fast
    # For second derivatives. Not saved, since they alone care if a memory of keys is changed in place.
    nothing: dict[str, Any] = dict.fromkeys(learnt)
    ctx.learnt, ctx.fixed = learnt, x._replace(**nothing)
    ctx.versions = _versions(ctx.fixed)


def _versions(values: Iterable[Any]) -> list[int]:
    """Count how often each tensor was changed in place."""
    return [item._version for item in values if isinstance(item, Tensor) and not item.is_inference()]


def _backward(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    gradients: list[Tensor | None] = [None] * len(_Contrast._fields)
    if grad is not None:
        slope, stats, *_ = ctx.saved_tensors  # (M, D), (2,)
        slope = slope if ctx.needs_input_grad[0] else slope[:0]
        grad_queries, grad_scale = _contrast_backward(grad, slope, stats, *ctx.known)
        if ctx.needs_input_grad[0]:
            gradients[0] = grad_queries
        if ctx.needs_input_grad[2]:
            gradients[2] = grad_scale
    return tuple(gradients)


def _recall(ctx: Any, _: tuple[Tensor | None, ...]) -> _Contrast:
    if ctx.versions != _versions(ctx.fixed):
        raise RuntimeError(
            "contrast: keys or labels were changed in place since the loss was computed, and derivatives of "
            "its gradient need them as they were; pass a copy, or choose set_kernel_backend('eager')"
        )
    return ctx.fixed._replace(**dict(zip(ctx.learnt, ctx.saved_tensors[2:], strict=True)))


def _define_contrast(x: _Contrast) -> Tensor:
    if x.query_labels is None or x.key_labels is None:
        identity = IDENTITIES[x.identity]
        return quadruplet_contrast_reference(x.queries, x.keys, x.log_scale, identity, x.key_offset)
    labels = (x.query_labels, x.key_labels)
    return supervised_contrast_reference(x.queries, x.keys, *labels, x.log_scale, x.self_index)


_contrast = register(
    "contrast", _Contrast, "(Tensor, Tensor, Tensor)",
    lambda x: (_launch_contrast if x.fast else _chunked_contrast)(x), _fake_contrast,
    Derivatives(_setup_context, _backward, _recall, _define_contrast),
)  # fmt: skip
_contrast_backward = register(
    "contrast_backward", _Gradients, "(Tensor, Tensor)", _run_gradients, _fake_gradients
)


# 4. Public functions


def _check(queries: Tensor, keys: Tensor, log_scale: Tensor) -> None:
    if queries.dim() != 2 or keys.dim() != 2 or queries.shape[1] != keys.shape[1]:
        raise ValueError(
            f"queries has shape {tuple(queries.shape)} and keys {tuple(keys.shape)}, "
            "expected both two-dimensional and equally wide"
        )
    check_float("queries", queries)
    check_float("keys", keys)
    if log_scale.device != queries.device:
        raise ValueError(f"log_scale is on {log_scale.device}, expected {queries.device} like the queries")
    if log_scale.numel() != 1:
        raise ValueError(f"log_scale has shape {tuple(log_scale.shape)}, expected a scalar")


def _run(
    queries: Tensor, keys: Tensor, log_scale: Tensor, identity: int, key_offset: int, fast: bool,
    labels: tuple[Tensor | None, ...] = (None, None, None),
) -> Tensor:  # fmt: skip
    """Contrast in one dtype, by kernels or in chunks; ``labels`` of queries, of keys, and ``self_index``."""
    if queries.dtype != keys.dtype:
        queries = at_least_float32(queries)
    # The kernels get the slope of log_scale for nothing, the chunks from that of the queries.
    differentiated = queries.requires_grad or (log_scale.requires_grad and not fast)
    gradient = torch.is_grad_enabled() and differentiated
    keys = keys.detach().to(queries.dtype)
    labels = tuple(None if item is None else item.contiguous() for item in labels)
    return _contrast(queries, keys, log_scale.reshape(()), *labels, identity, key_offset, gradient, fast)[0]


def _in_one_piece(queries: Tensor, keys: Tensor) -> bool:
    """Tell whether every logit may be held at once: few, or there is no other way within a transform."""
    return transformed() or queries.shape[0] * keys.shape[0] <= (
        GPU_LOGITS if queries.is_cuda else CPU_LOGITS
    )


def quadruplet_contrast_eager(
    queries: Tensor, keys: Tensor, log_scale: Tensor, identity: Identity, key_offset: int = 0
) -> Tensor:
    """Run the reference where all logits fit in one chunk, else chunk by chunk: O(N D) memory."""
    if _in_one_piece(queries, keys):
        return quadruplet_contrast_reference(queries, keys, log_scale, identity, key_offset)
    return _run(queries, keys, log_scale, IDENTITIES.index(identity), key_offset, False)


def supervised_contrast_eager(
    queries: Tensor, keys: Tensor, query_labels: Tensor, key_labels: Tensor, log_scale: Tensor,
    self_index: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Run the reference where all logits fit in one chunk, else chunk by chunk: O(N D) memory."""
    if _in_one_piece(queries, keys):
        return supervised_contrast_reference(queries, keys, query_labels, key_labels, log_scale, self_index)
    return _run(queries, keys, log_scale, LABELS, 0, False, (query_labels, key_labels, self_index))


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
            2B, .. below B*, queries or keys are not of a float dtype, or the identity is unknown.
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
    return _run(queries, keys, log_scale, IDENTITIES.index(identity), key_offset, True)


def supervised_contrast(
    queries: Tensor, keys: Tensor, query_labels: Tensor, key_labels: Tensor, log_scale: Tensor,
    self_index: Tensor | None = None,
) -> Tensor:  # fmt: skip
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
    return _run(queries, keys, log_scale, LABELS, 0, True, (query_labels, key_labels, self_index))
