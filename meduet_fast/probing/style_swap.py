"""Change the style of crops, by another volume's statistics and by rank, and measure it where truth is known.

"By rank" is the published way: the r-th token of one crop gets the style of the r-th token of another. "By
statistics" shifts and scales the styles of a crop's own tokens, dimension by dimension, from the mean and the
spread that its volume has to those of the other volume.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from meduet_fast.data.crops import sample_crops
from meduet_fast.data.store import LatentStore
from meduet_fast.data.windows import Start, blend, cut, window_starts
from meduet_fast.kernels import MixIndex
from meduet_fast.models import Factors, MeDUET

from .hidden_tokens import hidden_crops, hiding_masks, mix_twice

BATCH = 24


class StyleStatistics(NamedTuple):
    """Mean and standard deviation of every dimension of a volume's style tokens, (Ds,) each."""

    mean: Tensor
    deviation: Tensor

    @classmethod
    def of(cls, tokens: Tensor) -> StyleStatistics:
        """Measure tokens (N, Ds)."""
        return cls(tokens.mean(0), tokens.std(0).clamp_min(1e-6))

    def moved_to(self, other: StyleStatistics, style: Tensor) -> Tensor:
        """Shift and scale styles (.., Ds) that have these statistics, so that they have others."""
        return (style - self.mean) / self.deviation * other.deviation + other.mean  # (.., Ds)


class Restyled(NamedTuple):
    """Predicted latents, each (N, C, S, S, S) or (C, X, Y, Z), float32 on the CPU.

    Attributes:
        kept: own content, own style.
        by_statistics: own content, own style moved to the donor's mean and spread.
        by_rank: own content, styles of the donor's tokens.
    """

    kept: Tensor
    by_statistics: Tensor
    by_rank: Tensor


@torch.inference_mode()
def style_statistics(
    model: MeDUET, store: LatentStore, volume: int, starts: Sequence[Start]
) -> StyleStatistics:
    """Measure the styles of unmixed crops of one volume.

    Args:
        volume: position in ``store.entries``.
        starts: first corners of the crops, in latent voxels.
    """
    styles = []
    for first in range(0, len(starts), BATCH):
        crops = sample_crops(store, volume, list(starts[first : first + BATCH]), model.config.latent_size)
        styles.append(model(crops.to(model.cls_token.device, torch.float32)).style.flatten(0, 1))
    return StyleStatistics.of(torch.cat(styles))


@torch.inference_mode()
def restyle(
    model: MeDUET, crops: Tensor, donors: Tensor, own: StyleStatistics, donor: StyleStatistics, whole: bool
) -> Restyled:
    """Reconstruct crops with their own style and, both ways, with that of donors.

    Args:
        model: works on its own device.
        crops, donors: latents (N, C, S, S, S).
        own, donor: statistics of the volumes that they come from.
        whole: encode crops unmixed and put them together from all their tokens, which takes a network that
            was trained with ``objective.lambda_whole``. Otherwise as in the published training: a crop is
            mixed with its donor, and each token is returned from a pass in which it was hidden.
    """
    device = model.cls_token.device
    crops, donors = crops.to(device, torch.float32), donors.to(device, torch.float32)
    if whole:
        factors, given = model(crops), model(donors).style  # (N, L, Ds)
        styles = (factors.style, own.moved_to(donor, factors.style), given)
        return Restyled(*(model.reconstruct(factors._replace(style=s)).float().cpu() for s in styles))
    mixed, index = mix_twice(model, crops, donors, hiding_masks(model.config, len(crops), seed=0))
    streams = model.decode(mixed, index)
    by_statistics = _decode_moved(model, mixed, index, own, donor)
    return Restyled(
        *(hidden_crops(model, kind, index) for kind in (streams.straight, by_statistics, streams.swapped))
    )


def _decode_moved(
    model: MeDUET, mixed: Factors, index: MixIndex, own: StyleStatistics, donor: StyleStatistics
) -> Tensor:
    """Decode crops that were mixed with their donors, their own styles moved: (4N, L, p^3*C)."""
    size = len(index.mask) // 2
    is_own = torch.cat([~index.mask[:size], index.mask[size:]]).unsqueeze(-1)  # (2N, L, 1)
    style = torch.where(is_own, own.moved_to(donor, mixed.style), mixed.style)  # (2N, L, Ds)
    return model.decode(mixed._replace(style=style), index, swapped=False).straight


@torch.inference_mode()
def restyle_by_statistics(
    model: MeDUET, crops: Tensor, donors: Tensor, own: StyleStatistics, donor: StyleStatistics, whole: bool
) -> Tensor:
    """Give crops (N, C, S, S, S) the style of donors by statistics; see :func:`restyle`, which does more."""
    if whole:
        factors = model(crops.to(model.cls_token.device, torch.float32))
        return model.reconstruct(factors._replace(style=own.moved_to(donor, factors.style))).float().cpu()
    masks = hiding_masks(model.config, len(crops), seed=0)
    mixed, index = mix_twice(model, crops, donors, masks)
    return hidden_crops(model, _decode_moved(model, mixed, index, own, donor), index)


class RestyledRegion(NamedTuple):
    """A region put together from windows, latents (C, X, Y, Z): what became of it, and the donor's windows.

    Attributes:
        result: the region with its own and with changed style.
        donated: the donor's windows in the places of those that they were paired with by rank.
    """

    result: Restyled
    donated: Tensor


def restyle_region(
    model: MeDUET,
    region: Tensor,
    donor_region: Tensor,
    own: StyleStatistics,
    donor: StyleStatistics,
    whole: bool,
) -> RestyledRegion:
    """Change the style of a region of any size, in windows that overlap by half; see :func:`restyle`.

    Windows and donors are paired in opposite order, so that in one anatomy no window meets its own place
    but by chance in the middle.

    Args:
        region, donor_region: latents (C, X, Y, Z) of the region and of what the donor's windows are cut from.
    """

    def change(crops: Tensor, donors: Tensor) -> list[Tensor]:
        return [*restyle(model, crops, donors, own, donor, whole), donors.float()]

    *changed, donated = _change_windows(region, donor_region, model.config.latent_size, change)
    return RestyledRegion(Restyled(*changed), donated)


def restyle_region_by_statistics(
    model: MeDUET,
    region: Tensor,
    donor_region: Tensor,
    own: StyleStatistics,
    donor: StyleStatistics,
    whole: bool,
) -> Tensor:
    """Give a region the style of another by statistics; see :func:`restyle_region`, which does more.

    Returns:
        Latents (C, X, Y, Z), float32 on the CPU.
    """

    def change(crops: Tensor, donors: Tensor) -> list[Tensor]:
        return [restyle_by_statistics(model, crops, donors, own, donor, whole)]

    [changed] = _change_windows(region, donor_region, model.config.latent_size, change)
    return changed


def _change_windows(
    region: Tensor, donor_region: Tensor, size: int, change: Callable[[Tensor, Tensor], list[Tensor]]
) -> list[Tensor]:
    """Cut a region and its donor into pairs of windows, change these, and blend each of the results.

    Args:
        region, donor_region: latents (C, X, Y, Z).
        size: edge of a window.
        change: gets windows and their donors, (N, C, s, s, s) each, and returns results of the same shape.
    """
    stride = max(1, size // 2)
    starts = window_starts(region.shape[1:], size, stride)
    others = window_starts(donor_region.shape[1:], size, stride)
    paired = [others[-1 - number * len(others) // len(starts)] for number in range(len(starts))]
    parts = []
    for first in range(0, len(starts), BATCH):
        rows = slice(first, first + BATCH)
        parts.append(change(cut(region, starts[rows], size), cut(donor_region, paired[rows], size)))
    return [blend(torch.cat(windows), starts, region.shape[1:]) for windows in zip(*parts, strict=True)]


@dataclass(frozen=True)
class StyleChange:
    """What a change of style did to one region of one volume.

    Attributes:
        own: mean squared error of the reconstruction in the own style, against the region's own latents.
        kept, by_statistics, by_rank: mean squared errors against the other acquisition's own latents of the
            region; None if it shows another anatomy.
        stays_by_statistics, stays_by_rank: whether the anatomy stays: whether the result correlates more with
            the reconstruction in the own style than with the donor's windows.
    """

    own: float
    kept: float | None
    by_statistics: float | None
    by_rank: float | None
    stays_by_statistics: bool
    stays_by_rank: bool


def measure_change(region: Tensor, changed: RestyledRegion, truth: Tensor | None) -> StyleChange:
    """Measure a change of style.

    Args:
        region: latents (C, X, Y, Z).
        changed: what became of it.
        truth: the same region of the other acquisition, (C, X, Y, Z), if it is known.
    """
    result = changed.result

    def error(guess: Tensor, goal: Tensor) -> float:
        return float((guess - goal.float()).square().mean())

    def stays(guess: Tensor) -> bool:
        rows = [x.flatten() for x in (guess, result.kept, changed.donated)]
        to_own, to_donor = torch.corrcoef(torch.stack(rows))[0, 1:]
        return bool(to_own > to_donor)

    kept, by_statistics, by_rank = (None if truth is None else error(guess, truth) for guess in result)
    return StyleChange(
        error(result.kept, region), kept, by_statistics, by_rank,
        stays(result.by_statistics), stays(result.by_rank),
    )  # fmt: skip


@dataclass(frozen=True)
class PairVerdict:
    """Both directions of a change of style between two acquisitions of one anatomy.

    Attributes:
        first, second: names of the domains.
        own, kept, by_statistics, by_rank: means of both directions; see :class:`StyleChange`.
        stays_by_statistics, stays_by_rank: whether the anatomy stays in both.
    """

    first: str
    second: str
    own: float
    kept: float
    by_statistics: float
    by_rank: float
    stays_by_statistics: bool
    stays_by_rank: bool

    @classmethod
    def of(cls, first: str, second: str, changes: Sequence[StyleChange]) -> PairVerdict:
        """Sum up the two directions."""
        names = ("own", "kept", "by_statistics", "by_rank")
        means = [sum(getattr(change, name) for change in changes) / len(changes) for name in names]
        stays = [all(getattr(change, f"stays_{way}") for change in changes) for way in names[2:]]
        return cls(first, second, *means, *stays)

    def gain(self, way: str) -> float:
        """Return the part of the kept style's error that a way, "by_statistics" or "by_rank", removes."""
        return 1 - float(getattr(self, way)) / self.kept

    def works(self, way: str) -> bool:
        """Tell whether a way brings the image nearer to the other acquisition, and keeps the anatomy."""
        return self.gain(way) > 0 and bool(getattr(self, f"stays_{way}"))
