"""Show whole held-out regions: what the network fills in, and what a change of style makes of them."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from meduet_fast.autoencoder import Tokenizer
from meduet_fast.data.intensity import IntensityRule
from meduet_fast.data.sources import VolumeEntry
from meduet_fast.data.store import LatentStore
from meduet_fast.data.transforms import TransformConfig, content_key, load_volume
from meduet_fast.data.windows import Start, blend, cut, window_starts
from meduet_fast.errors import UserError
from meduet_fast.models import MeDUET
from meduet_fast.plotting import (
    GREY,
    PLANES,
    WIDTH,
    Planes,
    ct_limits,
    describe_grey,
    middle_slices,
    new_figure,
    styled,
)
from meduet_fast.probing import (
    ProbeCrops,
    RestyledRegion,
    StyleChange,
    StyleStatistics,
    fill_hidden,
    hiding_masks,
    interpolate_hidden,
    measure_change,
    restyle_region,
    style_statistics,
)
from meduet_fast.probing.crops import evaluation_starts, has_room
from meduet_fast.probing.style_swap import BATCH

SAME_ANATOMY_PAIRS = 3
OTHER_PAIRS = 2
MOST_CROPS = 8  # edge of the region that is looked at, in crops: more tells the same, and takes its time
STATISTICS_CROPS = 64  # whose styles stand for their volume
MARGIN = 2  # latent voxels that are decoded on both sides of a slice, for the decoder's surroundings
BAR_MM = 50


@dataclass(frozen=True)
class Region:
    """The held-out part of a volume, or the middle of it.

    Attributes:
        volume: position in ``store.entries``.
        domain: its data set.
        first: first corner in latent voxels.
        latents: (C, X, Y, Z) float32.
        mm: edge of a voxel of the prepared image.
        low, high: what is drawn black and white, in HU; None for other images than CT.
    """

    volume: int
    domain: str
    first: tuple[int, int, int]
    latents: Tensor
    mm: float
    low: float | None
    high: float | None

    @property
    def grey(self) -> str:
        """Say what black and white are."""
        return describe_grey(self.low, self.high)

    @property
    def scale(self) -> tuple[float, str]:
        """Return what an image's range of 1 is, and in which unit."""
        if self.low is None or self.high is None:
            return 100.0, "% of the range"
        return self.high - self.low, "HU"


@dataclass(frozen=True)
class Column:
    """One kind of image in a figure; ``planes`` is None if its source is not there unchanged."""

    title: str
    planes: Planes | None


@dataclass(frozen=True)
class FilledPicture:
    """A region in which every token was filled in while it was hidden.

    Attributes:
        region: where.
        columns: scan, tokenizer, network, interpolation.
        psnr: in dB, of network and interpolation against the tokenizer's image, on the slices drawn.
    """

    region: Region
    columns: list[Column]
    psnr: tuple[float, float]


@dataclass(frozen=True)
class StylePicture:
    """A region in its own style and in that of another domain.

    Attributes:
        region: where.
        other: the domain whose style it gets.
        columns: scan, own style, both changes, truth or where the style comes from.
        change: what was measured on the whole region.
        away: root mean square difference from the truth on the slices drawn, in HU, or in percent of the
            range for other images than CT: own style, by statistics, by rank. Empty without a truth.
    """

    region: Region
    other: str
    columns: list[Column]
    change: StyleChange
    away: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Pair:
    """Two volumes, positions in ``store.entries``; the truth is known where they show one anatomy."""

    volumes: tuple[int, int]
    same_anatomy: bool


def choose_pairs(store: LatentStore, crops: ProbeCrops) -> list[Pair]:
    """Pair the first volume of the first group with others of it, and with other body parts.

    Without a group: the first volume with those of other domains.
    """
    first = crops.groups[0][0] if crops.groups else min(crops.tested)
    known, pairs = {store.entries[first].domain}, []
    if crops.groups:
        for other in _one_of_each_domain(store, crops.groups[0], known)[:SAME_ANATOMY_PAIRS]:
            pairs.append(Pair((first, other), True))
        known |= {store.entries[index].domain for index in crops.groups[0]}
    usable = [
        index
        for index in range(len(store.entries))
        if has_room(crops.held_out, index, crops.crop_size, tested=True)
    ]
    others = _one_of_each_domain(store, usable, known)[:OTHER_PAIRS]
    return [*pairs, *(Pair((first, other), False) for other in others)]


def _one_of_each_domain(store: LatentStore, indices: Sequence[int], without: set[str]) -> list[int]:
    """Return the first volume of each domain that is not in ``without``."""
    found: dict[str, int] = {}
    for index in indices:
        found.setdefault(store.entries[index].domain, index)
    return [index for domain, index in found.items() if domain not in without]


def prepared_image(store: LatentStore, index: int) -> Tensor | None:
    """Load the image (X, Y, Z) that a volume's latents were made from; None if its source has changed.

    Sources that were prepared with other than the default transforms count as changed.
    """
    entry = store.entries[index]
    try:
        metadata = store.metadata(index)
        looked = metadata.get("intensity_from") == "values"
        rule = None if looked else IntensityRule(**json.loads(metadata["intensity"]))
        channel = int(metadata["channel"]) if "channel" in metadata else None
        source = VolumeEntry(Path(entry.source), entry.domain, entry.body_part, rule, entry.name, channel)
        if content_key(source, TransformConfig(), store.index.tokenizer) != entry.content_key:
            return None
        return load_volume(source, TransformConfig()).image[0]
    except (UserError, TypeError, KeyError):
        return None


def held_out_region(store: LatentStore, index: int, crops: ProbeCrops) -> Region:
    """Read what is held out of a volume, at most :data:`MOST_CROPS` crops along each axis."""
    entry = store.entries[index]
    border = crops.held_out.border(index, crops.crop_size)
    (x, y, z), latents = _middle(store.read_volume(index)[:, border:].float(), crops.crop_size)
    low, high = ct_limits(store.metadata(index))
    return Region(index, entry.domain, (border + x, y, z), latents, entry.spacing[0], low, high)


def _middle(latents: Tensor, crop_size: int) -> tuple[Start, Tensor]:
    """Return corner and latents of the middle of (C, X, Y, Z), at most MOST_CROPS crops along each axis."""
    corner = []
    for axis in (1, 2, 3):
        kept = min(latents.shape[axis], MOST_CROPS * crop_size)
        corner.append((latents.shape[axis] - kept) // 2)
        latents = latents.narrow(axis, corner[-1], kept)
    x, y, z = corner
    return (x, y, z), latents


def decode_slices(tokenizer: Tokenizer, latents: Tensor) -> Planes:
    """Decode the middle slices of a region (C, X, Y, Z), from thin slabs around them."""
    factor, planes = tokenizer.compression, []
    for axis in (3, 2, 1):
        edge = latents.shape[axis]
        voxel = factor * edge // 2  # as middle_slices of the whole image
        first = max(0, voxel // factor - MARGIN)
        slab = latents.narrow(axis, first, min(edge, voxel // factor + MARGIN + 1) - first)
        decoded = tokenizer.decode(slab[None])[0, 0].cpu()  # (X, Y, Z) of the slab
        plane = decoded.select(axis - 1, voxel - factor * first)
        planes.append(np.flipud(plane.numpy().T))
    axial, coronal, sagittal = planes
    return axial, coronal, sagittal


def root_mean_square(one: Planes, other: Planes) -> float:
    """Return the root mean square difference over all pixels of the slices."""
    squares = np.concatenate([np.square(a - b).ravel() for a, b in zip(one, other, strict=True)])
    return float(np.sqrt(squares.mean()))


class Painter:
    """Make the pictures of one run; what several of them share is read, measured and decoded once.

    Args:
        model: the network, on its own device.
        whole: see :func:`~meduet_fast.probing.restyle`.
        store: the latents.
        crops: which volumes and places are looked at.
        tokenizer: decodes latents; None draws nothing, and styles are measured all the same.
    """

    def __init__(
        self, model: MeDUET, whole: bool, store: LatentStore, crops: ProbeCrops, tokenizer: Tokenizer | None
    ) -> None:
        self.model, self.whole, self.store, self.crops, self.tokenizer = model, whole, store, crops, tokenizer
        self._regions: dict[int, Region] = {}
        self._statistics: dict[int, StyleStatistics] = {}
        self._scans: dict[int, Planes | None] = {}
        self._kept: dict[int, Planes] = {}

    def region(self, index: int) -> Region:
        """Return the held-out region of a volume."""
        if index not in self._regions:
            self._regions[index] = held_out_region(self.store, index, self.crops)
        return self._regions[index]

    def donated(self, index: int) -> Tensor:
        """Read what a volume gives styles from by rank, (C, X, Y, Z): the middle of its training side.

        In one anatomy it does not show the region; of a volume that is held out whole there is nothing else.
        """
        border = self.crops.held_out.border(index, self.crops.crop_size)
        if border == 0:
            return self.region(index).latents
        return _middle(self.store.read_volume(index)[:, :border].float(), self.crops.crop_size)[1]

    def statistics(self, index: int) -> StyleStatistics:
        """Return the style of a volume, measured away from the region, or all over one held out whole."""
        if index not in self._statistics:
            held_out, size = self.crops.held_out, self.crops.crop_size
            starts = evaluation_starts(
                held_out, index, size, STATISTICS_CROPS, seed=0, tested=index in held_out.volumes
            )
            self._statistics[index] = style_statistics(self.model, self.store, index, starts)
        return self._statistics[index]

    def scan(self, index: int) -> Planes | None:
        """Return the slices of the prepared image itself."""
        if index not in self._scans:
            image, region = prepared_image(self.store, index), self.region(index)
            factor = self.store.index.compression
            x, y, z = (
                slice(factor * start, factor * (start + edge))
                for start, edge in zip(region.first, region.latents.shape[1:], strict=True)
            )
            self._scans[index] = None if image is None else middle_slices(image[x, y, z])
        return self._scans[index]

    def change(self, own: int, donor: int, same_anatomy: bool) -> tuple[RestyledRegion, StyleChange]:
        """Give the region of one volume the style of another, and measure it."""
        region = self.region(own)
        changed = restyle_region(
            self.model,
            region.latents,
            self.donated(donor),
            self.statistics(own),
            self.statistics(donor),
            self.whole,
        )
        truth = self.region(donor).latents if same_anatomy else None
        return changed, measure_change(region.latents, changed, truth)

    def draw_style(
        self, own: int, donor: int, same_anatomy: bool, changed: RestyledRegion, change: StyleChange
    ) -> StylePicture:
        """Decode what a change of style made."""
        assert self.tokenizer is not None
        region, other = self.region(own), self.region(donor).domain
        kept = self._kept.get(own) if self.whole else None  # mixed with a donor, it would be another for each
        if kept is None:
            kept = self._kept[own] = decode_slices(self.tokenizer, changed.result.kept)
        moved = decode_slices(self.tokenizer, changed.result.by_statistics)
        ranked = decode_slices(self.tokenizer, changed.result.by_rank)
        goal, away, said = self.scan(donor), {}, {"kept": "", "by_statistics": "", "by_rank": ""}
        if same_anatomy and goal is not None:
            scale, unit = region.scale
            for name, planes in (("kept", kept), ("by_statistics", moved), ("by_rank", ranked)):
                away[name] = scale * root_mean_square(planes, goal)
                said[name] = f"\n{away[name]:.0f} {unit} from the truth"
        columns = [
            Column(f"{region.domain}: scan", self.scan(own)),
            Column(f"its content,\nits own style{said['kept']}", kept),
            Column(f"its content, style of\n{other}{said['by_statistics']}", moved),
            Column(f"the same, token by\ntoken (by rank){said['by_rank']}", ranked),
            Column(
                f"truth: scan of\n{other}" if same_anatomy else f"where the style\nis from: {other}", goal
            ),
        ]
        return StylePicture(region, other, columns, change, away)

    def draw_filled(self, own: int, partner: int) -> FilledPicture:
        """Fill in every token of a region while it is hidden, by the network and by interpolation."""
        assert self.tokenizer is not None
        region, config = self.region(own), self.model.config
        shape = region.latents.shape[1:]
        starts = window_starts(shape, config.latent_size, max(1, config.latent_size // 2))
        others = window_starts(self.region(partner).latents.shape[1:], config.latent_size, config.latent_size)
        masks = hiding_masks(config, len(starts), seed=0)  # (N, L)
        windows = cut(region.latents, starts, config.latent_size)  # (N, C, S, S, S)
        partners = [others[number % len(others)] for number in range(len(starts))]
        given = cut(self.region(partner).latents, partners, config.latent_size)  # (N, C, S, S, S)
        parts = [
            fill_hidden(self.model, windows[rows], given[rows], masks[rows])
            for rows in (slice(first, first + BATCH) for first in range(0, len(starts), BATCH))
        ]
        goal = decode_slices(self.tokenizer, region.latents)
        network = decode_slices(self.tokenizer, blend(torch.cat(parts), starts, shape))
        smooth = interpolate_hidden(windows, masks, config.patch_size)
        interpolation = decode_slices(self.tokenizer, blend(smooth, starts, shape))
        first, second = (
            -20 * math.log10(max(root_mean_square(planes, goal), 1e-5)) for planes in (network, interpolation)
        )
        columns = [
            Column(f"{region.domain}: scan", self.scan(own)),
            Column("through the\ntokenizer", goal),
            Column(f"filled in by the\nnetwork: {first:.1f} dB", network),
            Column(f"by interpolation:\n{second:.1f} dB", interpolation),
        ]
        return FilledPicture(region, columns, (first, second))


@styled
def draw_columns(columns: Sequence[Column], mm: float) -> Figure:
    """Draw kinds of images beside each other, one row for each plane, all at one scale.

    Args:
        mm: edge of a pixel.
    """
    shapes = next([plane.shape for plane in column.planes] for column in columns if column.planes is not None)
    widest = max(width for _, width in shapes)
    inches = WIDTH / len(columns) * 0.94 / widest  # of a pixel
    figure = new_figure(sum(height for height, _ in shapes) * inches + 1.1)
    axes = figure.subplots(
        len(PLANES), len(columns), squeeze=False, height_ratios=[height for height, _ in shapes]
    )
    for row, (name, (height, width)) in enumerate(zip(PLANES, shapes, strict=True)):
        for number, (column, ax) in enumerate(zip(columns, axes[row], strict=True)):
            ax.set_xticks([])
            ax.set_yticks([])
            ax.grid(False)
            for spine in ax.spines.values():
                spine.set_visible(False)
            if row == 0:
                ax.set_title(column.title, fontsize=9.5, loc="center")
            if number == 0:
                ax.set_ylabel(name, color=GREY)
            if column.planes is None:
                ax.text(width / 2, height / 2, "source not found\nas it was", ha="center", color=GREY)
            else:  # in the middle, for another anatomy has another size
                tall, wide = column.planes[row].shape
                left, top = (width - wide) / 2 - 0.5, (height - tall) / 2 - 0.5
                extent = (left, left + wide, top + tall, top)
                ax.imshow(column.planes[row], cmap="gray", vmin=0, vmax=1, extent=extent)
            if number == 0:
                ax.plot([2, 2 + BAR_MM / mm], [height - 5] * 2, color="#ffd400", linewidth=2.5)
                if row == 0:
                    ax.text(2, height - 9, f"{BAR_MM} mm", color="#ffd400", fontsize=8, va="bottom")
            ax.set_xlim(-0.5 - (widest - width) / 2, width - 0.5 + (widest - width) / 2)
            ax.set_ylim(height - 0.5, -0.5)
            ax.set_aspect("equal")
    return figure
