"""Find content and style of a sample: in a table of factors, in a user's scan, by chance.

What a user may ask for::

    NAME          a volume of the table; for style also a domain, the mean over its windows
    NAME@x,y,z    the window of that volume that begins there, in latent voxels
    NAME@random   a window of that volume or domain, which the sample's seed chooses
    random        any window of the table, which the seed chooses
    PATH          a scan of the user's, which is prepared and encoded
    none          nothing: the network is not told
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from meduet_fast.data.folders import ending_of
from meduet_fast.data.intensity import IntensityRule
from meduet_fast.data.sources import VolumeEntry, find_volumes
from meduet_fast.encoding import Encoder, encode_latents
from meduet_fast.errors import UserError, printable
from meduet_fast.files import in_real_folder

from .components import MeDUETFactors
from .factors import Moments

NONE, RANDOM = "none", "random"
CONTENT, STYLE = 0, 1  # streams of random numbers of a seed; the noise has torch's

Asked = str | Path | None
Triple = tuple[int, int, int]


@dataclass(frozen=True)
class Content:
    """A volume whose content a sample gets, in its own latent voxels.

    Attributes:
        record: where it comes from, as JSON values.
        grid: (X, Y, Z) of the volume.
        first: where its patches begin.
        patch: their edge.
        start: first corner of the crop; None: the whole volume is meant.
        by_chance: whether the crop may be moved so that it fits into the volume.
        affine: (4, 4), from voxels of the prepared image to mm, RAS; None if it is not known.
        intensity: rule of the volume's values; None if it is not known.
        factor: returns what the network is told of a box (start, size): (D,), or tokens (X', Y', Z', D).
        borrowed: returns where the window of the table begins whose content a box (start, size) is told
            instead of its own; None: it is told its own.
        latents: returns the volume's own latents of a box, (C, x, y, z) float32.
    """

    record: dict[str, Any]
    grid: Triple
    first: Triple
    patch: int
    start: Triple | None
    by_chance: bool
    affine: np.ndarray | None
    intensity: IntensityRule | None
    factor: Callable[[Triple, Triple], Tensor]
    borrowed: Callable[[Triple, Triple], Triple | None]
    latents: Callable[[Triple, Triple], Tensor]


@dataclass(frozen=True)
class Style:
    """A style that a sample gets.

    Attributes:
        record: where it comes from, as JSON values.
        factor: (Ds,) float32.
        intensity: rule of the values of what has this style; None if it is not known, or not one.
    """

    record: dict[str, Any]
    factor: Tensor
    intensity: IntensityRule | None


class Sources:
    """Find contents and styles.

    Args:
        factors: the table; None if there is none.
        encoder: encodes scans; None if there is none.
        tokens: whether the network is told tokens of content, not their mean.
        by_volume: whether they are brought to mean 0 and deviation 1 within their volume.
        least: edges of a crop in latent voxels that a volume must have for contents by chance.
        intensity: rule of scans' values; None: they tell.
    """

    def __init__(
        self,
        factors: MeDUETFactors | None,
        encoder: Encoder | None,
        tokens: bool,
        by_volume: bool,
        least: Sequence[int],
        intensity: IntensityRule | None = None,
    ) -> None:
        self.factors, self.encoder, self.tokens = factors, encoder, tokens
        self.by_volume = by_volume
        self.least, self.intensity = least, intensity
        self._contents: dict[str | Path, Content] = {}  # of scans
        self._styles: dict[str | Path, Style] = {}

    def content(self, asked: Asked, seed: int) -> Content | None:
        """Find a content; see the head of this file.

        Raises:
            UserError: if there is none such.
        """
        if asked is None or asked == NONE:
            return None
        rng = np.random.default_rng([seed, CONTENT])
        if asked == RANDOM:
            factors = self._table("content", asked)
            fitting = [
                number
                for number, one in enumerate(factors.volumes)
                if all(edge >= least for edge, least in zip(one["shape"][1:], self.least, strict=True))
            ]
            if not fitting:
                raise UserError(f"content: no volume of the table has {tuple(self.least)} latent voxels")
            return self._by_chance(factors.rows(fitting), rng)
        name, place = _split(asked)
        number = None if self.factors is None else self.factors.find(name)
        if self.factors is None or number is None:
            return self._of_scan(asked)
        if place == RANDOM:
            return self._by_chance(self.factors.rows([number]), rng)
        return self._of_volume(number, None if place is None else _corner("content", asked, place))

    def style(self, asked: Asked, seed: int) -> Style | None:
        """Find a style; see the head of this file.

        Raises:
            UserError: if there is none such.
        """
        if asked is None or asked == NONE:
            return None
        rng = np.random.default_rng([seed, STYLE])
        if asked == RANDOM:
            count = len(self._table("style", asked).style)
            return self._of_rows(torch.tensor([rng.integers(count)]))
        (name, place), factors = _split(asked), self.factors
        number = None if factors is None else factors.find(name)
        volumes = [] if factors is None else factors.of_domain(name) if number is None else [number]
        if factors is None or not volumes:
            return self._of_scan_style(asked)
        rows = factors.rows(volumes)
        if place is None:
            return self._of_rows(rows, {"of": name})
        if place == RANDOM:
            return self._of_rows(rows[rng.integers(len(rows))][None])
        if number is None:
            raise UserError(f"style: found {asked}, expected a place in a volume; {name} is a domain")
        return self._of_rows(rows.new_tensor([factors.nearest(number, _corner("style", asked, place))]))

    def _table(self, option: str, asked: str | Path) -> MeDUETFactors:
        if self.factors is None:
            raise UserError(f"{option}: found {asked}, and there is no table of factors to take it from")
        return self.factors

    def _by_chance(self, rows: Tensor, rng: np.random.Generator) -> Content:
        """Choose one of some windows (n,)."""
        factors = self._table("content", RANDOM)
        row = rows[rng.integers(len(rows))]
        return self._of_volume(int(factors.volume[row]), triple(factors.start[row].tolist()), True)

    def _of_volume(self, number: int, start: Triple | None, by_chance: bool = False) -> Content:
        factors = self._table("content", RANDOM)
        record = factors.volumes[number]

        @cache  # asked for in every step
        def pooled(start: Triple, size: Triple) -> tuple[Tensor, int | None]:
            return factors.pooled_content(number, start, size)

        def factor(start: Triple, size: Triple) -> Tensor:
            if self.tokens:
                return factors.content_map(number, start, size, self.by_volume)  # (X', Y', Z', D)
            return pooled(start, size)[0]  # (D,)

        def borrowed(start: Triple, size: Triple) -> Triple | None:
            row = None if self.tokens else pooled(start, size)[1]
            return None if row is None else triple(factors.start[row].tolist())

        return Content(
            record={"volume": record["name"], "domain": record["domain"]},
            grid=triple(record["shape"][1:]),
            first=triple(record["first"]),
            patch=factors.config.patch,
            start=start,
            by_chance=by_chance,
            affine=np.array(record["affine"]) if "affine" in record else None,
            intensity=_rule(record),
            factor=factor,
            borrowed=borrowed,
            latents=lambda start, size: factors.latents(number, start, size),
        )

    def _of_rows(self, rows: Tensor, record: dict[str, Any] | None = None) -> Style:
        """Return the mean style of some windows (n,)."""
        factors = self._table("style", RANDOM)
        numbers = sorted(set(factors.volume[rows].tolist()))
        rules = {_rule(factors.volumes[number]) for number in numbers}
        if record is None:
            one = factors.volumes[numbers[0]]
            record = {"of": one["name"], "start": factors.start[int(rows[0])].tolist()}
        volumes = [factors.volumes[number]["name"] for number in numbers]
        return Style(
            {**record, "volumes": volumes, "windows": len(rows)},
            factors.style[rows].mean(0),  # (Ds,)
            rules.pop() if len(rules) == 1 else None,
        )

    def _entry(self, option: str, asked: str | Path) -> tuple[VolumeEntry, Encoder]:
        """Find the one scan at a path."""
        path = Path(asked)
        if not path.exists() and not ending_of(path.name):
            kind = "a volume" if option == "content" else "a volume or domain"
            known = "" if self.factors is None else f", {kind}: {self.factors.known(option == 'style')}"
            raise UserError(f"{option}: found {asked}, expected none, random, the path of a scan{known}")
        if self.encoder is None:
            raise UserError(f"{option}: {path}: scans need the encoder, which this pipeline has not")
        listing = find_volumes(path, intensity=self.intensity)
        if len(listing.volumes) != 1:
            raise UserError(f"{option}: {path}: found {len(listing.volumes)} scans, expected one")
        return listing.volumes[0], self.encoder

    def _of_scan(self, asked: str | Path) -> Content:
        if asked in self._contents:
            return self._contents[asked]
        entry, encoder = self._entry("content", asked)
        latents, volume = encoder.latents(entry)  # (C, x, y, z)
        maps = encode_latents(encoder.model, latents, encoder.stride, encoder.batch_size)
        patch = encoder.model.config.patch_size
        kept = latents.cpu()  # (C, x, y, z)
        whole = not self.tokens and self.factors is not None and self.factors.config.whole
        content = maps.content  # (X, Y, Z, D)
        if self.by_volume:
            moments = Moments(content.shape[-1])
            moments.add(content.flatten(0, 2))
            mean, deviation = moments.mean_and_deviation()  # (D,) each
            content = (content - mean) / deviation  # (X, Y, Z, D)

        def factor(start: Triple, size: Triple) -> Tensor:
            box = tuple(
                slice(None) if whole else slice((begin - first) // patch, (begin - first + edge) // patch)
                for begin, first, edge in zip(start, maps.first, size, strict=True)
            )
            tokens = content[box]  # (X', Y', Z', D)
            return tokens if self.tokens else tokens.mean((0, 1, 2))

        def crop(start: Triple, size: Triple) -> Tensor:
            x, y, z = (slice(begin, begin + edge) for begin, edge in zip(start, size, strict=True))
            return kept[:, x, y, z].float()

        self._contents[asked] = Content(
            record={"scan": printable(in_real_folder(entry.path)), "rule": asdict(volume.intensity)},
            grid=triple(kept.shape[1:]),
            first=maps.first,
            patch=patch,
            start=None,
            by_chance=False,
            affine=volume.affine,
            intensity=volume.intensity,
            factor=factor,
            borrowed=lambda start, size: None,
            latents=crop,
        )
        return self._contents[asked]

    def _of_scan_style(self, asked: str | Path) -> Style:
        if asked not in self._styles:
            entry, encoder = self._entry("style", asked)
            scan = encoder.encode(entry)
            record = {"scan": printable(in_real_folder(entry.path)), "rule": asdict(scan.intensity)}
            self._styles[asked] = Style(record, scan.pooled_style, scan.intensity)
        return self._styles[asked]


def _split(asked: str | Path) -> tuple[str, str | None]:
    name, at, place = str(asked).rpartition("@")
    return (name, place) if at else (place, None)


def _corner(option: str, asked: str | Path, place: str | None) -> Triple:
    if place is None or not re.fullmatch(r"\d+,\d+,\d+", place):
        raise UserError(f"{option}: found {asked}, expected NAME@x,y,z in latent voxels, or NAME@random")
    return triple([int(number) for number in place.split(",")])


def _rule(record: Any) -> IntensityRule | None:
    return IntensityRule(**record["intensity"]) if record.get("intensity") else None


def triple(values: Sequence[int]) -> Triple:
    """Return three whole numbers as such."""
    x, y, z = map(int, values)
    return x, y, z
