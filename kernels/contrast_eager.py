"""The contrasts in plain PyTorch: the definition, and the same in chunks of rows when N x N would be large.

Source: MeDUET section "Losses", SiQC; the gradient's closed form is in :func:`_chunked`.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from .dtypes import at_least_float32, without_autocast
from .registration import register

Identity = Literal["content", "style"]
IDENTITIES: tuple[Identity, ...] = ("content", "style")
MIN_SCALE, MAX_SCALE = 1e-3, 100.0
EPSILON = 1e-8
# Logits that may exist at once: beyond, rows go in chunks. A chunk of 16 MB stays near a CPU's caches; a GPU
# wants larger products.
CPU_LOGITS, GPU_LOGITS = 2**22, 2**26


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
    queries: Tensor,
    keys: Tensor,
    query_labels: Tensor,
    key_labels: Tensor,
    log_scale: Tensor,
    self_index: Tensor | None = None,
) -> Tensor:
    """Compute :func:`.contrast.supervised_contrast` in plain PyTorch: its definition, holds every logit."""
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
    """Compute :func:`.contrast.quadruplet_contrast` by its definition: labels for the supervised contrast."""
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


class _Chunked(NamedTuple):
    queries: Tensor  # (M, D)
    keys: Tensor  # (N, D)
    log_scale: Tensor  # ()
    positives: Tensor | None  # (M, 3) int64
    query_labels: Tensor | None  # (M,) int64
    key_labels: Tensor | None  # (N,) int64
    self_index: Tensor | None  # (M,) int64
    gradient: bool


def _fake_chunked(x: _Chunked) -> tuple[Tensor, Tensor, Tensor]:
    dtype = torch.promote_types(x.queries.dtype, torch.float32)
    loss, scale_slope = (x.queries.new_empty((), dtype=dtype) for _ in range(2))
    return loss, loss.new_empty(x.queries.shape if x.gradient else (0,)), scale_slope


def _chunked(x: _Chunked) -> tuple[Tensor, Tensor, Tensor]:
    """Compute loss and its derivatives by the queries and by log_scale; backward has but to multiply.

    With unit vectors q^ and K^ and a row's softmax: dL/dq^ = (s / N) (softmax K^ - mean of its positives K^),
    dL/dlog s = sum of q^ . dL/dq^. Both products run on the same chunk of logits: 4 N^2 D operations.
    """
    queries, keys, log_scale, positives, query_labels, key_labels, self_index, gradient = x
    loss, slope, scale_slope = _fake_chunked(x)  # (), (M, D), ()
    rows, columns = queries.shape[0], keys.shape[0]
    step = max((GPU_LOGITS if queries.is_cuda else CPU_LOGITS) // columns, 16)
    raw_scale = log_scale.to(loss.dtype).reshape(()).exp()
    scale = raw_scale.clamp(MIN_SCALE, MAX_SCALE)
    key = keys.to(loss.dtype)
    key = key / (key.norm(dim=1, keepdim=True) + EPSILON)
    buffer = loss.new_empty(min(step, rows), columns)
    totals = loss.new_zeros(3)  # loss, slope of the scale, rows with positives
    with without_autocast(queries.device):
        for first in range(0, rows, step):
            part = slice(first, min(first + step, rows))
            query = queries[part].to(loss.dtype)
            length = query.norm(dim=1, keepdim=True)
            query = query / (length + EPSILON)
            logits = torch.mm(query * scale, key.T, out=buffer[: len(query)])  # (rows of the chunk, N)
            if self_index is not None:
                itself = self_index[part, None]
                logits.scatter_(1, itself, torch.finfo(loss.dtype).min)
            # Everything relative to the largest logit: differences of small numbers lose no digits.
            logits.sub_(logits.amax(1, keepdim=True))
            if positives is not None:
                positive = positives[part]
                count = torch.full_like(length, positive.shape[1])
                agreement = logits.gather(1, positive).mean(1, keepdim=True)
            else:
                assert query_labels is not None
                assert key_labels is not None
                positive = query_labels[part, None] == key_labels
                if self_index is not None:
                    positive.scatter_(1, itself, False)
                count = positive.sum(1, keepdim=True)
                agreement = logits.masked_fill(~positive, 0.0).sum(1, keepdim=True) / count.clamp(min=1)
            total = logits.exp_().sum(1, keepdim=True)
            valid = count > 0
            totals[0] += torch.where(valid, total.log() - agreement, 0.0).sum()
            totals[2] += valid.sum()
            if not gradient:
                continue
            share = total / count.clamp(min=1)
            if positives is not None:
                logits.scatter_add_(1, positive, -share.expand(positive.shape))
            else:
                logits.addcmul_(positive.to(loss.dtype), share, value=-1.0)
            difference = torch.where(valid, torch.mm(logits, key) / total, 0.0).mul_(scale)
            inner = (query * difference).sum(1, keepdim=True)
            totals[1] += inner.sum()
            # Through q / (|q| + eps); at zero PyTorch takes 0 for the slope of the length.
            along = inner / torch.where(length > 0, length, 1.0)
            torch.sub(difference / (length + EPSILON), query * along, out=slope[part])
    rows_counted = totals[2].clamp(min=1)
    loss.copy_(totals[0] / rows_counted)
    inside = (raw_scale >= MIN_SCALE) & (raw_scale <= MAX_SCALE)
    scale_slope.copy_(torch.where(inside, totals[1] / rows_counted, 0.0))
    if gradient:
        slope.div_(rows_counted)
    return loss, slope, scale_slope


def _setup_context(ctx: Any, x: _Chunked, output: tuple[Tensor, ...]) -> None:
    _, slope, scale_slope = output
    ctx.save_for_backward(slope, scale_slope)
    ctx.mark_non_differentiable(slope, scale_slope)
    ctx.set_materialize_grads(False)  # else zeros of the size of slope are filled for nothing
    ctx.dtypes = x.queries.dtype, x.log_scale.dtype
    ctx.scale_shape = x.log_scale.shape


def _backward(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    gradients: list[Tensor | None] = [None] * len(_Chunked._fields)
    if grad is not None:
        slope, scale_slope = ctx.saved_tensors
        if ctx.needs_input_grad[0]:
            gradients[0] = (grad * slope).to(ctx.dtypes[0])
        if ctx.needs_input_grad[2]:
            gradients[2] = (grad * scale_slope).to(ctx.dtypes[1]).reshape(ctx.scale_shape)
    return tuple(gradients)


_contrast_chunked = register(
    "contrast_chunked", _Chunked, "(Tensor, Tensor, Tensor)",
    _chunked, _fake_chunked, _setup_context, _backward,
)  # fmt: skip


def wants_gradient(queries: Tensor, log_scale: Tensor) -> bool:
    """Return whether the forward pass should compute the slopes as well."""
    return torch.is_grad_enabled() and (queries.requires_grad or log_scale.requires_grad)


def _in_one_piece(queries: Tensor, keys: Tensor) -> bool:
    return queries.shape[0] * keys.shape[0] <= (GPU_LOGITS if queries.is_cuda else CPU_LOGITS)


def quadruplet_contrast_eager(
    queries: Tensor, keys: Tensor, log_scale: Tensor, identity: Identity, key_offset: int = 0
) -> Tensor:
    """Run the reference where all logits fit in one chunk, else chunk by chunk: O(N D) memory."""
    if _in_one_piece(queries, keys):
        return quadruplet_contrast_reference(queries, keys, log_scale, identity, key_offset)
    self_index, positives = quadruplet_indices(
        queries.shape[0] // 4, keys.shape[0] // 4, identity, key_offset, queries.device
    )
    gradient = wants_gradient(queries, log_scale)
    arguments = (queries, keys.detach(), log_scale, positives, None, None, self_index, gradient)
    return _contrast_chunked(*arguments)[0]


def supervised_contrast_eager(
    queries: Tensor,
    keys: Tensor,
    query_labels: Tensor,
    key_labels: Tensor,
    log_scale: Tensor,
    self_index: Tensor | None = None,
) -> Tensor:
    """Run the reference where all logits fit in one chunk, else chunk by chunk: O(N D) memory."""
    if _in_one_piece(queries, keys):
        return supervised_contrast_reference(queries, keys, query_labels, key_labels, log_scale, self_index)
    gradient = wants_gradient(queries, log_scale)
    arguments = (queries, keys.detach(), log_scale, None, query_labels, key_labels, self_index, gradient)
    return _contrast_chunked(*arguments)[0]
