"""The quadruplet contrast: every query has exactly three positives, known in closed form.

Source: MeDUET section "Losses", SiQC.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from .precision import at_least_float32, without_autocast

Identity = Literal["content", "style"]
MIN_SCALE, MAX_SCALE = 1e-3, 100.0


def quadruplet_identities(batch: int, identity: Identity, device: torch.device | None = None) -> Tensor:
    """Identity of each of the 4B rows: (4B,) int64.

    The four blocks are: source 1, source 2 (the batch-flip partner), the reconstruction with source 1's
    content and source 2's style, and the reverse. Rows are alike in content, or in style.

    In an odd batch the middle sample is its own partner, and its four rows are alike: three positives again.

    Raises:
        ValueError: for an unknown identity.
    """
    own = torch.arange(batch, device=device)
    partner = own.flip(0)
    if identity == "content":
        return torch.cat([own, partner, own, partner])
    if identity == "style":
        return torch.cat([own, partner, partner, own])
    raise ValueError(f"identity is {identity!r}, expected 'content' or 'style'")


def quadruplet_contrast(queries: Tensor, keys: Tensor, log_scale: Tensor, identity: Identity) -> Tensor:
    """Mean over rows of minus the mean log-probability of a row's three positives.

    Logits are scale * cos(query, key), the row's own key left out; scale = exp(log_scale) clamped to
    [1e-3, 100]; a vector is divided by its length plus 1e-8.

    Args:
        queries: (4B, D), four blocks as in :func:`quadruplet_identities`.
        keys: (4B, D), the same rows seen by the teacher; they get no gradient.
        log_scale: scalar.
        identity: which rows are alike.

    Returns:
        Scalar, computed in at least float32.

    Raises:
        ValueError: if the shapes differ or do not make four blocks.
    """
    if queries.shape != keys.shape or queries.dim() != 2 or queries.shape[0] % 4:
        raise ValueError(
            f"queries has shape {tuple(queries.shape)} and keys {tuple(keys.shape)}, expected both (4B, D)"
        )
    query = at_least_float32(queries)
    key = keys.detach().to(query.dtype)
    query = query / (query.norm(dim=1, keepdim=True) + 1e-8)
    key = key / (key.norm(dim=1, keepdim=True) + 1e-8)
    rows = quadruplet_identities(queries.shape[0] // 4, identity, queries.device)
    itself = torch.eye(len(rows), dtype=torch.bool, device=queries.device)
    scale = log_scale.to(query.dtype).exp().clamp(MIN_SCALE, MAX_SCALE)
    with without_autocast(queries.device):  # it would run the small, sensitive similarity in bf16
        logits = (scale * (query @ key.T)).masked_fill(itself, float("-inf"))
    log_probability = logits.log_softmax(1).masked_fill(itself, 0.0)
    positive = (rows[:, None] == rows[None, :]) & ~itself
    return -(log_probability * positive).sum(1).mean() / 3
