"""Embed diffusion time and the factors of content and style, for every network that makes latents.

Source: MeDUET section "Synthesis".

Shapes: B samples; D the width of a raw content factor, Ds of style, W of the network's condition; L tokens of
the network's grid.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from meduet_fast.kernels import at_least_float32
from meduet_fast.kernels.patchify import Triple
from meduet_fast.settings import SettingError

Content = Literal["pooled", "tokens"]
Prediction = Literal["flow", "epsilon"]

TRAINING_STEPS = 1000  # of epsilon; the network's time has this range for both objectives
TIME_WAVES = 256
FIRST_TEMPERATURE, LEAST_TEMPERATURE = 0.1, 0.01
STATISTICS = ("content_mean", "content_deviation", "style_mean", "style_deviation")


def alphas_cumprod(device: torch.device | None = None) -> Tensor:
    """Return the share of the signal's variance at each step of epsilon, (1000,) float32."""
    betas = torch.linspace(1e-4, 0.02, TRAINING_STEPS, dtype=torch.float64, device=device)
    return (1 - betas).cumprod(0).float()


def linear_prediction(sample: Tensor, timestep: Tensor, prediction: Prediction) -> Tensor:
    """Predict what no multiple of the sample predicts better, for latents of mean 0 and deviation 1.

    Of x = (1 - s) z + s n the velocity n - z is (2s - 1) / (s^2 + (1 - s)^2) x; of
    x = sqrt(a) z + sqrt(1 - a) n the noise is sqrt(1 - a) x: the conditional means, were z normal.

    Args:
        sample: (B, C, X, Y, Z).
        timestep: (B,): 1000 s, or the step of epsilon.
        prediction: "flow" or "epsilon".

    Returns:
        (B, C, X, Y, Z), of the sample's dtype.
    """
    time = at_least_float32(timestep)  # (B,)
    if prediction == "flow":
        level = time / TRAINING_STEPS  # (B,)
        factor = (2 * level - 1) / (level.square() + (1 - level).square())  # (B,)
    else:
        factor = (1 - alphas_cumprod(time.device)[time.long()]).sqrt()  # (B,)
    return factor.to(sample.dtype).reshape(-1, 1, 1, 1, 1) * sample  # (B, C, X, Y, Z)


class TimeEmbedding(nn.Module):
    """Embed diffusion time: 256 cosines and sines, Linear, SiLU, Linear."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(TIME_WAVES, width)
        self.fc2 = nn.Linear(width, width)

    def forward(self, timestep: Tensor) -> Tensor:
        """Embed times (B,) of 0..1000, whole or not: (B, W)."""
        weight = self.fc1.weight
        half, dtype = TIME_WAVES // 2, torch.promote_types(weight.dtype, torch.float32)
        steps = torch.arange(half, dtype=dtype, device=weight.device)  # (128,)
        frequencies = torch.exp(steps * (-math.log(10000) / half))  # (128,)
        angles = timestep.to(dtype).unsqueeze(-1) * frequencies  # (B, 128)
        waves = torch.cat([angles.cos(), angles.sin()], -1).to(weight.dtype)  # (B, 256)
        return self.fc2(F.silu(self.fc1(waves)))  # (B, W)


class FactorEmbedding(nn.Module):
    """Embed one factor of a sample: W_k SiLU(u / max(T, 0.01)), where u is the factor at length 1.

    The temperature T is learnt and starts at 0.1. Rows whose factor is dropped get a learnt vector instead,
    before their length becomes 1.
    """

    def __init__(self, factor_dim: int, width: int) -> None:
        super().__init__()
        self.null = nn.Parameter(torch.empty(factor_dim))
        self.temperature = nn.Parameter(torch.empty(1))  # FSDP can't shard a tensor without axes
        self.proj = nn.Linear(factor_dim, width)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw a null vector of length 1, about, and set the temperature."""
        nn.init.normal_(self.null, std=len(self.null) ** -0.5)
        nn.init.constant_(self.temperature, FIRST_TEMPERATURE)

    def forward(self, factor: Tensor, dropped: Tensor) -> Tensor:
        """Embed standardised factors (B, D), none of them where ``dropped`` (B,) is true: (B, W)."""
        factor = torch.where(dropped.unsqueeze(-1), self.null, at_least_float32(factor))  # (B, D)
        unit = F.normalize(factor, dim=-1)  # (B, D)
        hidden = F.silu(unit / self.temperature.clamp(min=LEAST_TEMPERATURE))  # (B, D)
        return self.proj(hidden.to(self.proj.weight.dtype))  # (B, W)


class ContentMap(nn.Module):
    """Project content tokens on a few channels: all that a network sees of them, so that style finds no way.

    Rows that are dropped get a learnt token everywhere.

    Args:
        content_dim: D.
        channels: that are left.
        pool: tokens along each axis whose mean the network sees: noise and sharpness of a scanner are finer
            than its anatomy.
    """

    def __init__(self, content_dim: int, channels: int, pool: int) -> None:
        super().__init__()
        self.pool = pool
        self.proj = nn.Linear(content_dim, channels)
        self.null = nn.Parameter(torch.empty(channels))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw a null token of length 1, about."""
        nn.init.normal_(self.null, std=len(self.null) ** -0.5)

    def pooled(self, tokens: Tensor) -> Tensor:
        """Return means of tokens (B, X', Y', Z', D): (B, X'/pool, Y'/pool, Z'/pool, D), the rest cut off."""
        if self.pool == 1:
            return tokens
        return F.avg_pool3d(tokens.movedim(-1, 1), self.pool).movedim(1, -1)

    def forward(self, tokens: Tensor, grid: Triple, dropped: Tensor) -> Tensor:
        """Project pooled standardised tokens (B, X', Y', Z', D) on a grid, trilinearly: (B, L, channels)."""
        if tuple(tokens.shape[1:4]) != grid:
            # Of the tokens, not of their projection: no gradient passes here, whose sums CUDA takes in any
            # order.
            wide = F.interpolate(tokens.movedim(-1, 1), grid, mode="trilinear", align_corners=False)
            tokens = wide.movedim(1, -1)  # (B, X, Y, Z, D)
        narrow = self.proj(tokens.flatten(1, 3).to(self.proj.weight.dtype))  # (B, L, channels)
        return torch.where(dropped[:, None, None], self.null, narrow)  # (B, L, channels)


class FactorStatistics(nn.Module):
    """Standardise raw factors by statistics that the network carries: a base of the networks.

    The four buffers stay float32 (or wider) when the network becomes narrower: the means are large beside the
    deviations.
    """

    # What diffusers reads: it would otherwise take the dtype of all weights from the first tensor, a buffer.
    _supports_param_buffer_assignment = False

    config: Any  # diffusers', which the networks bring: their arguments by name
    content_mean: Tensor  # (D,)
    content_deviation: Tensor  # (D,)
    style_mean: Tensor  # (Ds,)
    style_deviation: Tensor  # (Ds,)

    def register_statistics(self, content_dim: int, style_dim: int, content: Content) -> None:
        """Register the buffers, which change nothing until :meth:`set_statistics`."""
        self._content_axes = 5 if content == "tokens" else 2
        for name, width in zip(STATISTICS, (content_dim, content_dim, style_dim, style_dim), strict=True):
            self.register_buffer(name, torch.empty(width, dtype=torch.float32))
        self.reset_statistics()

    def reset_statistics(self) -> None:
        """Set means to 0 and deviations to 1."""
        for name in STATISTICS:
            getattr(self, name).fill_(float(name.endswith("deviation")))

    @torch.no_grad()
    def set_statistics(
        self, content_mean: Tensor, content_deviation: Tensor, style_mean: Tensor, style_deviation: Tensor
    ) -> None:
        """Take the statistics of the factors that the network is trained with.

        Args:
            content_mean, content_deviation: (D,), of pooled factors or of tokens, as the network has them.
            style_mean, style_deviation: (Ds,). A deviation of 0, of what never varies, counts as 1.

        Raises:
            ValueError: naming what has another shape, is not finite, or is a negative deviation.
        """
        given = (content_mean, content_deviation, style_mean, style_deviation)
        for name, value in zip(STATISTICS, given, strict=True):
            own = getattr(self, name)
            if value.shape != own.shape:
                raise ValueError(f"{name} has shape {tuple(value.shape)}, expected {tuple(own.shape)}")
            spread = name.endswith("deviation")
            if not value.isfinite().all() or (spread and (value < 0).any()):
                raise ValueError(f"{name} is not {'finite and 0 or more' if spread else 'finite'} everywhere")
            own.copy_(value.masked_fill(value == 0, 1) if spread else value)

    def standardised(self, content: Tensor, style: Tensor) -> tuple[Tensor, Tensor]:
        """Standardise raw content, (B, D) or (B, X', Y', Z', D), and style (B, Ds).

        Raises:
            ValueError: for other shapes.
        """
        for name, factor, axes, width in (
            ("content", content, self._content_axes, len(self.content_mean)),
            ("style", style, 2, len(self.style_mean)),
        ):
            if factor.dim() != axes or factor.shape[-1] != width:
                expected = f"(B, X, Y, Z, {width})" if axes == 5 else f"(B, {width})"
                raise ValueError(f"{name} has shape {tuple(factor.shape)}, expected {expected}")
        return (
            (content - self.content_mean) / self.content_deviation,
            (style - self.style_mean) / self.style_deviation,
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FactorStatistics:
        """Move or convert like any module, without a loss of digits."""
        before = {name: getattr(self, name) for name in STATISTICS}
        super()._apply(fn, recurse)
        for name, value in before.items():
            moved = getattr(self, name)
            if moved.dtype.itemsize < value.dtype.itemsize:
                setattr(self, name, moved.to(value.dtype) if moved.is_meta else value.to(moved.device))
        return self


def check_conditions(
    in_channels: int,
    content: str,
    prediction: str,
    latents_mean: Sequence[float],
    latents_std: Sequence[float],
) -> None:
    """Check what the configurations of the networks share.

    Raises:
        SettingError: naming the setting.
    """
    for name, value, kinds in (("content", content, Content), ("prediction", prediction, Prediction)):
        if value not in get_args(kinds):
            known = " or ".join(map(repr, get_args(kinds)))
            raise SettingError(name, f"found {value!r}, expected {known}")
    for name, values in (("latents_mean", latents_mean), ("latents_std", latents_std)):
        if len(values) != in_channels:
            raise SettingError(
                name, f"found {len(values)} numbers, expected one for each of {in_channels} channels"
            )


def no_row(dropped: Tensor | None, sample: Tensor) -> Tensor:
    """Return ``dropped``, or (B,) of False: what is dropped is a part of every pass, and has gradients."""
    return torch.zeros(len(sample), dtype=torch.bool, device=sample.device) if dropped is None else dropped
