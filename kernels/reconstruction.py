"""The reconstruction loss of the two demixed streams. Source: MeDUET section "Losses", rec."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from .precision import at_least_float32
from .tokenize import patchify_3d

Pairing = Literal["source", "reference"]


def dual_reconstruction_loss(
    prediction: Tensor, target: Tensor, mask: Tensor, patch_size: int, pairing: Pairing = "source"
) -> Tensor:
    """Mean squared error of hidden tokens against the patchified volume.

    Stream 1 of row i predicts sample i where mask_i is 1. Stream 2 of row B-1-i predicts sample i too; its
    hidden tokens are those where mask_{B-1-i} is 0.

    Args:
        prediction: (2B, L, p^3*C), stream 1 rows first, tokens in (px, py, pz, c) order.
        target: (B, C, X, Y, Z).
        mask: (B, L) of 0 and 1.
        patch_size: patch edge.
        pairing: "source" supervises each stream exactly where it was hidden. "reference" reproduces the
            published code, which weights the second term by 1 - mask_i instead.

    Returns:
        Scalar: squared errors summed over the supervised tokens, divided by B*L*p^3*C. At least float32.

    Raises:
        ValueError: if a shape does not fit, or for an unknown pairing.
    """
    truth = patchify_3d(target, patch_size)
    if prediction.shape != (2 * truth.shape[0], *truth.shape[1:]):
        raise ValueError(
            f"prediction has shape {tuple(prediction.shape)}, "
            f"expected {(2 * truth.shape[0], *truth.shape[1:])} for this target"
        )
    if mask.shape != truth.shape[:2]:
        raise ValueError(f"mask has shape {tuple(mask.shape)}, expected {tuple(truth.shape[:2])}")
    if pairing not in ("source", "reference"):
        raise ValueError(f"pairing is {pairing!r}, expected 'source' or 'reference'")
    first, second = at_least_float32(prediction).chunk(2)
    truth, hidden = truth.to(first.dtype), mask.to(first.dtype)
    error_first = (first - truth).square().mean(-1)
    error_second = (second.flip(0) - truth).square().mean(-1)
    hidden_second = 1 - (hidden.flip(0) if pairing == "source" else hidden)
    return (error_first * hidden + error_second * hidden_second).mean()
