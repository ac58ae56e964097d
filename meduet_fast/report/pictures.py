"""Draw crops of two volumes: input, tokenizer round trip, reconstruction, swapped styles, and the truth."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure, FigureBase, SubFigure
from torch import Tensor

from meduet_fast.autoencoder import Tokenizer
from meduet_fast.data.crops import sample_crops
from meduet_fast.data.intensity import IntensityRule
from meduet_fast.data.sources import VolumeEntry
from meduet_fast.data.store import LatentStore
from meduet_fast.data.transforms import TransformConfig, content_key, load_volume
from meduet_fast.errors import UserError
from meduet_fast.models import MeDUET
from meduet_fast.probing import ProbeCrops, far_start, structured_starts, swap_styles
from meduet_fast.probing.crops import Start, holds_both

from .plotting import GREY, WIDTH, new_figure, styled

SAME_ANATOMY_PAIRS = 3
OTHER_PAIRS = 2


@dataclass(frozen=True)
class Pair:
    """Two crops whose styles are swapped.

    Attributes:
        volumes: positions in ``store.entries``.
        starts: first corners in latent voxels.
        same_anatomy: whether each volume shows the other's place too, so that the truth is known.
    """

    volumes: tuple[int, int]
    starts: tuple[Start, Start]
    same_anatomy: bool


@dataclass(frozen=True)
class Side:
    """The pictures of one of the two crops; images are (X, Y, Z) in [0, 1].

    Attributes:
        own, other: domains of this crop and of the one whose style it gets.
        image: crop of the prepared image; None if its source is not there unchanged.
        decoded: the crop's latents, decoded: the best that the network could do.
        reconstructed: with its own style.
        swapped: with the other's style.
        truth: the other volume's own crop of this place, decoded; None if it shows another anatomy.
    """

    own: str
    other: str
    image: Tensor | None
    decoded: Tensor
    reconstructed: Tensor
    swapped: Tensor
    truth: Tensor | None

    def psnr(self) -> dict[str, float]:
        """Compute PSNR in dB: reconstruction against ``decoded``; with and without swap against ``truth``."""
        values = {"reconstruction": _psnr(self.reconstructed, self.decoded)}
        if self.truth is not None:
            values["swapped"] = _psnr(self.swapped, self.truth)
            values["kept"] = _psnr(self.reconstructed, self.truth)
        return values


def _psnr(image: Tensor, truth: Tensor) -> float:
    return -10 * math.log10(max(float((image - truth).square().mean()), 1e-10))


def choose_pairs(store: LatentStore, crops: ProbeCrops) -> list[Pair]:
    """Pair the first volume of the first group with others of it, and with other body parts.

    Without a group: the first volume with those of other domains. Places are held out; within a group, the
    second crop is far from the first, so that the network never sees the answer while it swaps.
    """
    first = crops.groups[0][0] if crops.groups else crops.volumes[0]
    place = crops.tested[first][0]
    pairs, known = [], {store.entries[first].domain}
    if crops.groups:
        far = far_start(place, crops.tested[first][: max(2, len(crops.tested[first]) // 2)])
        for other in _one_of_each_domain(store, crops.groups[0], known)[:SAME_ANATOMY_PAIRS]:
            pairs.append(Pair((first, other), (place, far), True))
        known |= {store.entries[index].domain for index in crops.groups[0]}
    usable = [
        index
        for index in range(len(store.entries))
        if holds_both(store, index, crops.crop_size, crops.fraction)
    ]
    for other in _one_of_each_domain(store, usable, known)[:OTHER_PAIRS]:
        there = structured_starts(store, [other], crops.crop_size, crops.fraction, 16)[0]
        pairs.append(Pair((first, other), (place, there), False))
    return pairs


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


@torch.inference_mode()
def make_sides(
    model: MeDUET,
    tokenizer: Tokenizer,
    store: LatentStore,
    pair: Pair,
    images: dict[int, Tensor | None],
) -> tuple[Side, Side]:
    """Swap the styles of a pair and decode everything to images.

    Args:
        images: prepared images by volume.
    """
    size, factor = model.config.latent_size, store.index.compression
    (first, second), (here, there) = pair.volumes, pair.starts

    def crop(index: int, start: Start) -> Tensor:
        return sample_crops(store, index, [start], size).float()

    own = crop(first, here), crop(second, there)
    result = swap_styles(model, *own)
    latents = [
        own[0], result.first, result.first_in_second_style,
        own[1], result.second, result.second_in_first_style,
    ]  # fmt: skip
    if pair.same_anatomy:
        latents += [crop(second, here), crop(first, there)]
    decoded = tokenizer.decode(torch.cat(latents))[:, 0].cpu()  # (6 or 8, X, Y, Z)

    def side(number: int) -> Side:
        image = images[pair.volumes[number]]
        if image is not None:
            x, y, z = (slice(factor * edge, factor * (edge + size)) for edge in pair.starts[number])
            image = image[x, y, z]
        return Side(
            own=store.entries[pair.volumes[number]].domain,
            other=store.entries[pair.volumes[1 - number]].domain,
            image=image,
            decoded=decoded[3 * number],
            reconstructed=decoded[3 * number + 1],
            swapped=decoded[3 * number + 2],
            truth=decoded[6 + number] if pair.same_anatomy else None,
        )

    return side(0), side(1)


def _subfigures(figure: FigureBase, rows: int, columns: int) -> list[SubFigure]:
    """Divide a figure, row by row."""
    parts: Any = figure.subfigures(rows, columns, squeeze=False, wspace=0.03)
    return list(parts.flat)


@styled
def draw_pair(sides: tuple[Side, Side]) -> Figure:
    """Draw both sides beside each other, three planes each, one row for each kind of picture."""
    left, right = (_rows(side) for side in sides)
    kinds = [kind for kind in left if left[kind][1] is not None or right[kind][1] is not None]
    figure = new_figure(0.2 + len(kinds) * (WIDTH / 6.2 + 0.3))
    figure.set_layout_engine("constrained", w_pad=0.01, h_pad=0.01, wspace=0.0, hspace=0.0)
    for half, rows in zip(_subfigures(figure, 1, 2), (left, right), strict=True):
        bands = _subfigures(half, len(kinds), 1)
        for number, (band, kind) in enumerate(zip(bands, kinds, strict=True)):
            title, image = rows[kind]
            band.suptitle(title, fontsize=10, x=0.01, ha="left")
            for ax, (plane, pixels) in zip(band.subplots(1, 3), _planes(image), strict=True):
                ax.set_axis_off()
                if number == 0:
                    ax.set_title(plane, fontsize=9, loc="center", color=GREY, pad=2)
                if pixels is None:
                    ax.text(0.5, 0.5, "source not found\nas it was", ha="center", va="center", color=GREY)
                else:
                    ax.imshow(pixels, cmap="gray", vmin=0, vmax=1, interpolation="bilinear")
    return figure


def _rows(side: Side) -> dict[str, tuple[str, Tensor | None]]:
    """Return title and image of each kind of picture."""
    psnr = side.psnr()
    swapped, truth = f"content of {side.own}, style of {side.other}", ""
    if side.truth is not None:
        swapped += f": {psnr['swapped']:.1f} dB (own style: {psnr['kept']:.1f})"
        truth = f"truth: the same place in {side.other}"
    reconstructed = f"{side.own}: reconstructed ({psnr['reconstruction']:.1f} dB)"
    return {
        "image": (f"{side.own}: input", side.image),
        "decoded": (f"{side.own}: through the tokenizer", side.decoded),
        "reconstructed": (reconstructed, side.reconstructed),
        "swapped": (swapped, side.swapped),
        "truth": (truth, side.truth),
    }


def _planes(image: Tensor | None) -> list[tuple[str, np.ndarray | None]]:
    """Cut middle slices: superior (axial: anterior) is up, the patient's right (sagittal: anterior) right."""
    names = ("axial", "coronal", "sagittal")
    if image is None:
        return [(name, None) for name in names]
    x, y, z = (size // 2 for size in image.shape)
    slices = (image[:, :, z], image[:, y], image[x])
    return [(name, np.flipud(part.numpy().T)) for name, part in zip(names, slices, strict=True)]
