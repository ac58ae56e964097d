"""Flip and turn a batch of crops, on the batch's own device, without a host synchronisation."""

from __future__ import annotations

import torch
from torch import Tensor

from meduet_fast.errors import UserError


def augment(
    latents: Tensor,
    generator: torch.Generator | None = None,
    flip_prob: float = 0.2,
    rotate_prob: float = 0.2,
) -> Tensor:
    """Flip and turn every sample on its own (published behaviour: probability 0.2 per axis and for the turn).

    Each spatial axis is flipped with ``flip_prob``; then, with ``rotate_prob``, the sample is turned by 90,
    180 or 270 degrees, equally likely, in the plane of the first two spatial axes.

    Args:
        latents: (B, C, X, Y, Z), any dtype and device; X = Y unless ``rotate_prob`` is 0.
        generator: source of randomness on the same device; None uses the device's default one.
        flip_prob: probability per sample and axis.
        rotate_prob: probability per sample.

    Returns:
        A tensor of the same shape, dtype and device; the input is left as it is.

    Raises:
        UserError: not five dimensions, a turn of a crop that is not square, a probability outside 0..1.
    """
    if latents.ndim != 5:
        raise UserError(f"latents: shape {tuple(latents.shape)}, expected (B, C, X, Y, Z)")
    for name, value in (("flip_prob", flip_prob), ("rotate_prob", rotate_prob)):
        if not 0 <= value <= 1:
            raise UserError(f"{name}: found {value}, expected 0 <= {name} <= 1")
    if rotate_prob > 0 and latents.shape[2] != latents.shape[3]:
        raise UserError(f"latents: a crop of {tuple(latents.shape[2:])} cannot be turned, expected X = Y")

    # Every number is drawn whatever the outcome, so that a sample's fate depends on its row alone.
    rows, device = (len(latents), 1, 1, 1, 1), latents.device
    chance = torch.rand(len(latents), 4, generator=generator, device=device)  # (B, 4)
    turn = torch.randint(1, 4, (len(latents),), generator=generator, device=device).view(rows)

    for axis in range(3):
        flip = (chance[:, axis] < flip_prob).view(rows)  # (B, 1, 1, 1, 1)
        latents = torch.where(flip, latents.flip(2 + axis), latents)  # (B, C, X, Y, Z)
    if rotate_prob > 0:
        turn = torch.where((chance[:, 3] < rotate_prob).view(rows), turn, 0)
        upright = latents
        for quarters in (1, 2, 3):
            latents = torch.where(turn == quarters, torch.rot90(upright, quarters, (2, 3)), latents)
    return latents
