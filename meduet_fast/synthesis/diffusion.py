"""Define what a generator is trained on: noisy latents, targets, weights and times of both objectives.

With latents z and noise n::

    flow       x = (1 - sigma) z + sigma n, target n - z; a time is sigma, from 0 (data) to 1 (noise)
    epsilon    x = sqrt(a) z + sqrt(1 - a) n, target n; a time is a step from 0 to 999, and a the product of
               1 - beta up to it; beta grows linearly from 1e-4 to 0.02
"""

from __future__ import annotations

from typing import Literal, TypeVar

import torch
from torch import Tensor

from meduet_fast.models.conditioning import TRAINING_STEPS, alphas_cumprod

Objective = Literal["flow", "epsilon"]
TimeDraw = Literal["uniform", "logit_normal"]

Number = TypeVar("Number", float, Tensor)


def noisy(latents: Tensor, noise: Tensor, times: Tensor, objective: Objective) -> Tensor:
    """Mix latents and noise, both (B, C, X, Y, Z), at the times (B,)."""
    times = times.reshape(-1, *[1] * (latents.ndim - 1))  # (B, 1, 1, 1, 1)
    if objective == "flow":
        return (1 - times) * latents + times * noise  # (B, C, X, Y, Z)
    alphas = alphas_cumprod(times.device)[times]  # (B, 1, 1, 1, 1)
    return alphas.sqrt() * latents + (1 - alphas).sqrt() * noise  # (B, C, X, Y, Z)


def target(latents: Tensor, noise: Tensor, objective: Objective) -> Tensor:
    """Return what the network shall predict, (B, C, X, Y, Z): the velocity of flow, or the noise."""
    return noise - latents if objective == "flow" else noise


def loss_weight(times: Tensor, objective: Objective, min_snr: float | None) -> Tensor:
    """Return the weight of each sample's squared error, (B,) float32.

    For epsilon it is min(SNR, min_snr) / SNR, after Hang et al., "Efficient Diffusion Training via Min-SNR
    Weighting Strategy"; 1 for flow, and if ``min_snr`` is None.
    """
    if objective == "flow" or min_snr is None:
        return torch.ones_like(times, dtype=torch.float32)  # (B,)
    alphas = alphas_cumprod(times.device)[times]  # (B,)
    return ((1 - alphas) / alphas * min_snr).clamp(max=1)  # (B,)


def shifted(sigma: Number, shift: float) -> Number:
    """Move times in [0, 1] towards the noise, as large images want it: s sigma / (1 + (s - 1) sigma).

    After Esser et al., "Scaling Rectified Flow Transformers for High-Resolution Image Synthesis".
    """
    return shift * sigma / (1 + (shift - 1) * sigma)


def size_shift(voxels: int, training_voxels: int) -> float:
    """Return the shift that suits latents of another size than those of training, 1 at theirs."""
    return (voxels / training_voxels) ** (1 / 3)


def draw_times(numbers: Tensor, kind: TimeDraw, shift: float, objective: Objective) -> Tensor:
    """Turn random numbers into training times.

    Args:
        numbers: (B,), uniform in [0, 1) for ``uniform``, standard normal for ``logit_normal``.
        kind: how times are distributed before the shift.
        shift: see :func:`shifted`; 1 changes nothing.
        objective: flow gets sigma, (B,) float; epsilon whole steps from 0 to 999, (B,) int64.
    """
    times = shifted(numbers.sigmoid() if kind == "logit_normal" else numbers, shift)  # (B,)
    if objective == "flow":
        return times
    return (TRAINING_STEPS * times).long().clamp(max=TRAINING_STEPS - 1)


def network_time(times: Tensor, objective: Objective) -> Tensor:
    """Return the times as the network gets them, (B,) float: 1000 sigma, or the step."""
    return TRAINING_STEPS * times if objective == "flow" else times.float()
