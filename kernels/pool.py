"""Token means for the contrast and the domain heads. Source: MeDUET section "Losses", SiQC and dom."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .precision import at_least_float32


def token_mean(x: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean over tokens, of the whole sequence or of each source.

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
        return x.mean(1).unsqueeze(0)
    if mask.shape != x.shape[:2]:
        raise ValueError(f"mask has shape {tuple(mask.shape)}, expected {tuple(x.shape[:2])}")
    second = mask.to(x.dtype).unsqueeze(-1)
    sums = torch.stack([(x * (1 - second)).sum(1), (x * second).sum(1)])
    counts = torch.stack([(1 - second).sum(1), second.sum(1)])
    return sums / counts.clamp(min=1)


def pooled_layer_norm(x: Tensor, mask: Tensor | None = None, eps: float = 1e-5) -> tuple[Tensor, Tensor]:
    """LayerNorm without affine followed by the token mean, and the plain token mean.

    Args:
        x: (B, L, D), any float dtype.
        mask: as in :func:`token_mean`.
        eps: LayerNorm's.

    Returns:
        The pooled LayerNorm and the plain mean, both (S, B, D), computed and returned in at least float32.

    Raises:
        ValueError: if the mask's shape does not fit.
    """
    x = at_least_float32(x)
    return token_mean(F.layer_norm(x, x.shape[-1:], eps=eps), mask), token_mean(x, mask)
