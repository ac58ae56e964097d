"""Content and style of a store's volumes, and of windows of them, in one table: a safetensors file.

::

    content, style           float32 (N, D) and (N, Ds), means over the tokens of each of N windows
    volume, start            int64 (N,), rows of "volumes", and (N, 3), first corners in latent voxels
    K_mean, K_deviation      float32, of each dimension of K: content and style, over the windows; token and
                             style_token, over the tokens of content and of style; latents, over the voxels
    content/NAME, style/NAME bfloat16 (X, Y, Z, D) and (X, Y, Z, Ds), a token for each patch
    exchanged_latents/K/NAME bfloat16 (C, x, y, z), the volume in the style of its donor K, by the decoder
    exchanged_content/K/NAME, exchanged_style/K/NAME
                             bfloat16, the tokens of those latents
    map_mean, map_deviation  float32 (V, 1 + K, D), of each dimension in the maps of content of V volumes: in
                             their own style, and in those of their donors
    metadata                 "volumes", a JSON list; what encoded them and how

Maps of tokens are there if they were asked for, and then what is exchanged. The windows are on the network's
grid of patches.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from math import prod
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from meduet_fast.data.crops import DONORS, random_stream
from meduet_fast.data.store import LatentStore
from meduet_fast.data.store_index import IMPORTED
from meduet_fast.data.windows import axis_starts
from meduet_fast.devices import select_device
from meduet_fast.encoding.encode import (
    FactorMaps,
    Pretrained,
    encode_latents,
    failures_of_memory,
    load_pretrained,
    window_stride,
)
from meduet_fast.errors import UserError, printable
from meduet_fast.files import atomic_path, in_real_folder, refuse_unwritable
from meduet_fast.models import MeDUETConfig
from meduet_fast.probing import StyleStatistics, restyle_region_by_statistics
from meduet_fast.progress import ProgressBar
from meduet_fast.settings import FROM_0, FROM_1, SEED, SettingError, check_numbers
from meduet_fast.tensor_file import TensorFile, TensorFileWriter

FORMAT = "meduet-fast factors 2"
Edges = tuple[int, int, int]


@dataclass(frozen=True)
class FactorsConfig:
    """Say what a table of factors has.

    Attributes:
        window: edge of a window in latent voxels, or its three edges: multiples of the network's patch size.
            A run of synthesis trains on crops of this size. By default the network's crop.
        stride: from window to window in latent voxels, a multiple of the patch size, up to the shortest edge
            of a window. By default half a window. Training takes its crops from these windows.
        encode_stride: of the network's own windows, see ``encode``. By default half a crop.
        tokens: keep the map of a token for each patch, too.
        exchanged: how many other styles to show every volume in: the network's decoder gives it the style of
            a volume of another domain, and latents and maps of the result are kept. 0 keeps none; others
            need tokens.
        batch_size: windows that are encoded at once.
        device: where the network works; "auto" takes CUDA where there is one.
        seed: chooses the volumes whose style is given.

    Raises:
        UserError: if a number is out of its range.
    """

    window: int | Edges | None = None
    stride: int | None = None
    encode_stride: int | None = None
    tokens: bool = False
    exchanged: int = 0
    batch_size: int = 4
    device: str = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        check_numbers(self, FROM_1, "window", "stride", "encode_stride", "batch_size")
        check_numbers(self, FROM_0, "exchanged")
        check_numbers(self, SEED, "seed")
        if self.exchanged and not self.tokens:
            raise SettingError("exchanged", f"found {self.exchanged}, expected 0 without tokens")

    def windows(self, network: MeDUETConfig) -> tuple[Edges, Edges]:
        """Return the edges of a window and the strides along the axes, in latent voxels.

        Raises:
            SettingError: if they do not fit the network's grid of patches.
        """
        patch, given = network.patch_size, self.window or network.latent_size
        x, y, z = given if isinstance(given, tuple) else (given,) * 3
        if any(edge % patch for edge in (x, y, z)):
            expected = f"multiples of the network's patch size, {patch}"
            raise SettingError("window", f"found {self.window}, expected {expected}")
        if self.stride is None:
            a, b, c = (max(patch, edge // 2 // patch * patch) for edge in (x, y, z))
            return (x, y, z), (a, b, c)
        if self.stride % patch or self.stride > min(x, y, z):
            expected = (
                f"a multiple of the network's patch size, {patch}, up to a window's edge, {min(x, y, z)}"
            )
            raise SettingError("stride", f"found {self.stride}, expected {expected}")
        return (x, y, z), (self.stride,) * 3


@dataclass(frozen=True)
class FactorsSummary:
    """Tell what a table has.

    Attributes:
        table: the file.
        weights: of the network that encoded.
        tokenizer: identity of what made the latents.
        volumes, windows: how many.
        window: edges of a window in latent voxels.
        tokens: whether it has maps of tokens.
        exchanged: maps of content in other styles, of every volume.
    """

    table: Path
    weights: str
    tokenizer: str
    volumes: int
    windows: int
    window: Edges
    tokens: bool
    exchanged: int

    def __str__(self) -> str:
        """Format it for a person."""
        maps = f", with tokens, in {self.exchanged} exchanged styles too" if self.tokens else ""
        edges = "x".join(map(str, self.window))
        return (
            f"{self.table}: {self.windows} windows of {edges} latent voxels, of {self.volumes} "
            f"volume{'s' * (self.volumes != 1)}{maps}\n"
            f"  encoded by {self.weights}; tokenizer {self.tokenizer}"
        )


class Moments:
    """Add up rows of values for the mean and the deviation of each dimension."""

    def __init__(self, width: int) -> None:
        self._count, self._sums = 0, torch.zeros(2, width, dtype=torch.float64)

    def add(self, rows: Tensor) -> None:
        """Count rows (N, width)."""
        self._count += len(rows)
        for part in rows.split(4096):
            values = part.double()  # (n, width)
            self._sums += torch.stack([values.sum(0), values.square().sum(0)])  # (2, width)

    def mean_and_deviation(self) -> tuple[Tensor, Tensor]:
        """Return both, float32 (width,); the deviation is never 0, so that values can be divided by it."""
        mean, square = self._sums / self._count
        return mean.float(), (square - mean.square()).clamp_min(1e-12).sqrt().float()


class _Windows(NamedTuple):
    """Hold the windows of one volume.

    Attributes:
        first: latent voxel where the first patch begins, along each axis.
        corners: their first patches along each axis; the windows are the product of the three.
    """

    first: Edges
    corners: tuple[list[int], list[int], list[int]]

    @classmethod
    def of(cls, grid: Edges, window: Edges, strides: Edges, patch: int) -> _Windows:
        """Cover a volume; all sizes in latent voxels."""
        x, y, z = (
            axis_starts(edge // patch, side // patch, stride // patch)
            for edge, side, stride in zip(grid, window, strides, strict=True)
        )
        i, j, k = (edge % patch // 2 for edge in grid)
        return cls((i, j, k), (x, y, z))

    def starts(self, patch: int) -> np.ndarray:
        """Return the first corners in latent voxels, (n, 3), in raster order."""
        return np.array(self.first) + patch * np.array(list(product(*self.corners)))

    def means(self, tokens: Tensor, window: Edges, patch: int) -> Tensor:
        """Return the means (n, D) of a volume's tokens (X, Y, Z, D) over each window, in raster order."""
        for axis, (corners, edge) in enumerate(zip(self.corners, window, strict=True)):
            means = [tokens.narrow(axis, corner, edge // patch).mean(axis) for corner in corners]
            tokens = torch.stack(means, axis)
        return tokens.flatten(0, 2)  # (n, D)


def write_factors(
    weights: Path | str, data: Path | str, output: Path | str, config: FactorsConfig | None = None
) -> FactorsSummary:
    """Encode all volumes of a latent store into a table; see the head of this file.

    A volume, or two of which one gives its style, are in memory at a time. The table is written whole or not
    at all.

    Args:
        weights: see :meth:`~meduet_fast.encoding.Encoder.load`.
        data: a latent store, of the tokenizer that the network was pretrained with.
        output: the file to write.
        config: what the table has.

    Raises:
        UserError: no such weights or store, or they do not fit together; volumes that are too small; too few
            of other domains to exchange styles with.
        OSError: the table can't be written.
    """
    output, config = Path(output), config or FactorsConfig()
    if output.is_dir():
        raise UserError(f"{output}: a folder, expected the name of a file to write")
    refuse_unwritable(output.parent)
    store, found = LatentStore.open(data), load_pretrained(Path(weights))
    with (
        atomic_path(output) as temporary,
        TemporaryFile(dir=output.parent) as values,
        ProgressBar("Encoding", len(store.entries) * (1 + config.exchanged), "volume") as bar,
    ):
        work = _Work(store, found, config, TensorFileWriter(values), bar)
        for index in range(len(store.entries)):
            work.encode_volume(index)
        for index in range(len(store.entries)):
            work.exchange_styles(index)
        work.write(temporary)
    weights_file = printable(in_real_folder(found.file))
    return FactorsSummary(
        output, weights_file, store.index.tokenizer, len(store.entries), sum(work.counts), work.window,
        config.tokens, config.exchanged,
    )  # fmt: skip


class _Work:
    """Fill a table, volume by volume.

    Attributes:
        window: edges of a window in latent voxels.
        counts: windows of each volume.
    """

    def __init__(
        self, store: LatentStore, found: Pretrained, config: FactorsConfig, table: TensorFileWriter,
        bar: ProgressBar,
    ) -> None:  # fmt: skip
        sizes = found.model.config
        self._store, self._found, self._config, self._table, self._bar = store, found, config, table, bar
        self._patch, self._stride = sizes.patch_size, window_stride(sizes, config.encode_stride)
        self.window, self._strides = config.windows(sizes)
        _check_store(store, found, [max(edge, sizes.latent_size) for edge in self.window])
        self._donors = choose_donors(store, config.exchanged, config.seed)
        self._whole = bool(found.run and found.run["config"].get("objective", {}).get("lambda_whole"))
        self._device = select_device(config.device)
        self._model = found.model.to(self._device)
        self._places = [
            _Windows.of(entry.grid, self.window, self._strides, self._patch) for entry in store.entries
        ]
        self.counts = [prod(map(len, volume.corners)) for volume in self._places]
        self._done = 0  # windows of the volumes before
        self._styles: list[StyleStatistics] = []  # of each volume's tokens, on the device
        # The largest types first, so that all values are aligned.
        table.add("volume", torch.repeat_interleave(torch.tensor(self.counts)))
        starts = np.concatenate([volume.starts(self._patch) for volume in self._places])
        table.add("start", torch.from_numpy(starts))
        widths = {
            "content": sizes.embed_dim, "style": sizes.style_dim, "token": sizes.embed_dim,
            "style_token": sizes.style_dim, "latents": sizes.in_channels,
        }  # fmt: skip
        self._rows = {
            kind: table.reserve(kind, torch.float32, (sum(self.counts), widths[kind]))
            for kind in ("content", "style")
        }  # (N, D) and (N, Ds)
        self._moments = {kind: Moments(width) for kind, width in widths.items()}
        self._statistics = {
            kind: [table.reserve(f"{kind}_{name}", torch.float32, (width,)) for name in ("mean", "deviation")]
            for kind, width in widths.items()
        }
        maps = len(store.entries), 1 + config.exchanged, sizes.embed_dim
        self._of_maps = [
            table.reserve(f"map_{name}", torch.float32, maps)
            for name in ("mean", "deviation") * config.tokens
        ]  # (V, 1 + K, D) each

    def _encode(self, index: int, latents: Tensor) -> FactorMaps:
        maps = encode_latents(self._model, latents, self._stride, self._config.batch_size)
        name = self._store.entries[index].name
        if not (maps.content.isfinite().all() and maps.style.isfinite().all()):
            raise UserError(f"{self._store.path}: {name}: its factors are not finite")
        self._bar.update(1, name)
        return maps

    def encode_volume(self, index: int) -> None:
        """Add a volume's windows and, if they are asked for, its maps."""
        entry, place, moments = self._store.entries[index], self._places[index], self._moments
        rows = slice(self._done, self._done + self.counts[index])
        with failures_of_memory(self._store.path / entry.file, self._device):
            latents = self._store.read_volume(index)  # (C, x, y, z)
            moments["latents"].add(latents.flatten(1).T)  # (x y z, C)
            maps = self._encode(index, latents)
            named = (("content", "token", maps.content), ("style", "style_token", maps.style))
            for kind, token, tokens in named:  # (X, Y, Z, D or Ds)
                means = place.means(tokens, self.window, self._patch)  # (n, D or Ds)
                self._rows[kind][rows] = means
                moments[kind].add(means)
                moments[token].add(tokens.flatten(0, 2))
            if self._config.tokens:
                self._add_maps(index, 0, maps)
            self._styles.append(StyleStatistics.of(maps.style.flatten(0, 2).to(self._device)))
        self._done = rows.stop

    def _add_maps(self, index: int, number: int, maps: FactorMaps) -> None:
        """Add the maps of a volume in its own style (0), or in that of a donor (from 1 on)."""
        name, own = self._store.entries[index].name, number == 0
        for kind, tokens in (("content", maps.content), ("style", maps.style)):  # (X, Y, Z, D or Ds)
            place = f"{kind}/{name}" if own else f"exchanged_{kind}/{number - 1}/{name}"
            self._table.add(place, tokens.bfloat16())
        moments = Moments(maps.content.shape[-1])
        moments.add(maps.content.flatten(0, 2))
        for array, values in zip(self._of_maps, moments.mean_and_deviation(), strict=True):
            array[index, number] = values

    def exchange_styles(self, index: int) -> None:
        """Add a volume in the styles of its donors; all volumes have been encoded before."""
        entry, own = self._store.entries[index], self._styles[index]
        for number, donor in enumerate(self._donors[index]):
            with failures_of_memory(self._store.path / entry.file, self._device):
                latents, given = self._store.read_volume(index), self._store.read_volume(donor)
                changed = restyle_region_by_statistics(
                    self._model, latents, given, own, self._styles[donor], self._whole
                )  # (C, x, y, z)
                self._table.add(f"exchanged_latents/{number}/{entry.name}", changed.bfloat16())
                self._add_maps(index, 1 + number, self._encode(index, changed))

    def write(self, path: Path) -> None:
        """Write the table."""
        for kind, arrays in self._statistics.items():
            for array, values in zip(arrays, self._moments[kind].mean_and_deviation(), strict=True):
                array[:] = values
        store, config, found = self._store, self._config, self._found
        records = [
            {
                "name": entry.name, "domain": entry.domain, "body_part": entry.body_part,
                "shape": entry.shape, "content_key": entry.content_key, "spacing": entry.spacing,
                "first": place.first, "donors": [store.entries[donor].name for donor in donors],
            }
            for entry, place, donors in zip(store.entries, self._places, self._donors, strict=True)
        ]  # fmt: skip
        crop = found.model.config.latent_size
        about = {
            "encoder": {**found.record(), "step": found.step, "crop": crop, "stride": self._stride},
            "window": self.window, "strides": self._strides, "patch": self._patch, "tokens": config.tokens,
            "exchanged": config.exchanged, "whole": self._whole, "seed": config.seed, "volumes": records,
        }  # fmt: skip
        metadata = {name: json.dumps(value) for name, value in about.items()}
        self._table.write(path, {"format": FORMAT, "tokenizer": store.index.tokenizer, **metadata})


def _check_store(store: LatentStore, found: Pretrained, smallest: Sequence[int]) -> None:
    """Refuse a store whose latents are not for the network, or have no room for a window."""
    made_by = found.index.tokenizer if found.index else None
    if store.index.channels != found.model.config.in_channels:
        raise UserError(
            f"{store.path}: latents have {store.index.channels} channels, the network takes "
            f"{found.model.config.in_channels}"
        )
    if made_by not in (None, IMPORTED, store.index.tokenizer):
        raise UserError(
            f"{store.path}: latents of tokenizer {store.index.tokenizer}, the network was pretrained on "
            f"latents of {made_by} ({found.store}): expected that one"
        )
    if made_by is None or made_by == IMPORTED:
        why = "its store is not known" if made_by is None else f"{found.store} was imported"
        print(
            f"warning: what made the latents of the network's pretraining can't be told, as {why}: if it was "
            f"not {store.index.tokenizer}, the factors mean nothing",
            file=sys.stderr,
        )
    if not store.entries:
        raise UserError(f"{store.path}: no volumes, expected one or more")
    small = [
        f"{entry.name} {entry.grid}"
        for entry in store.entries
        if any(edge < least for edge, least in zip(entry.grid, smallest, strict=True))
    ]
    if small:
        raise UserError(
            f"{store.path}: volumes smaller than {tuple(smallest)} latent voxels, a window and the network's "
            f"crop: {', '.join(small)}"
        )


def choose_donors(store: LatentStore, count: int, seed: int) -> list[list[int]]:
    """Choose volumes of other domains for each volume, of as many domains as can be.

    Args:
        store: an open store.
        count: how many for each.
        seed: chooses them.

    Returns:
        Positions in ``store.entries``, by volume.

    Raises:
        UserError: a volume has fewer.
    """
    domains = np.array([store.domain_id(index) for index in range(len(store.entries))])
    members = [np.flatnonzero(domains == domain) for domain in range(len(store.domains))]
    chosen = []
    for index, domain in enumerate(domains):
        rng = random_stream(seed, DONORS, index)
        others = [members[other] for other in rng.permutation(len(members)) if other != domain]
        drawn = [rng.choice(other, min(count, len(other)), replace=False) for other in others]
        turns = [int(few[turn]) for turn in range(count) for few in drawn if turn < len(few)]
        if len(turns) < count:
            name = store.entries[index].name
            raise UserError(
                f"exchanged: found {count}, {store.path} has {len(turns)} volumes of other domains than "
                f"{name}'s: expected no more"
            )
        chosen.append(turns[:count])
    return chosen


class FactorTable:
    """Read a table of factors. Safe to pass to processes that are forked; little of the file is in memory.

    Attributes:
        path: the file.
        identity: changes whenever the table does.
        tokenizer: identity of what made the latents.
        encoder: what encoded them: ``weights``, ``weights_sha256``, ``step`` (None if of no run), ``crop``,
            ``stride``.
        window: edges (x, y, z) of a window in latent voxels.
        patch: edge of a patch.
        tokens: whether there are maps.
        exchanged: other styles that every volume is shown in.
        volumes: ``name``, ``domain``, ``body_part``, ``shape`` (C, X, Y, Z), ``content_key``, ``spacing``,
            ``first`` latent voxel of its patches along each axis, names of the ``donors`` of its exchanged
            styles; in the order of the store.
        content, style: (N, D) and (N, Ds) float32, of each of N windows.
        volume: (N,) int64, positions in ``volumes``, ascending.
        start: (N, 3) int64, first corners in latent voxels.
        content_mean, content_deviation: (D,) float32, over the windows; no deviation is 0.
        style_mean, style_deviation: (Ds,), over the windows.
        token_mean, token_deviation: (D,), over all tokens of content.
        style_token_mean, style_token_deviation: (Ds,), over all tokens of style.
        latents_mean, latents_deviation: (C,), over all voxels.
    """

    def __init__(self, file: TensorFile) -> None:
        self._file, self.path = file, file.path
        if file.metadata.get("format") != FORMAT:
            raise UserError(
                f"{self.path}: not a table of factors as this version makes them; make one with "
                "`meduet-fast factors`"
            )
        try:
            about = {name: json.loads(text) for name, text in file.metadata.items() if name in _ABOUT}
            self.tokenizer: str = file.metadata["tokenizer"]
            self.encoder: dict[str, Any] = dict(about["encoder"])
            self.window: Edges = _edges(about["window"])
            self.patch, self.exchanged = int(about["patch"]), int(about["exchanged"])
            self.tokens = bool(about["tokens"])
            self.volumes: list[dict[str, Any]] = [
                {
                    **record, "name": str(record["name"]), "shape": tuple(record["shape"]),
                    "first": _edges(record["first"]),
                }
                for record in about["volumes"]
            ]  # fmt: skip
            shapes = file.shapes()
            expected = self._shapes(shapes["content"], shapes["style"])
        except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
            raise UserError(f"{self.path}: damaged: {error!r} in what the table says of itself") from error
        if expected != shapes:
            name = min(name for name in {*expected, *shapes} if expected.get(name) != shapes.get(name))
            found, wanted = shapes.get(name, "nothing"), expected.get(name, "nothing")
            raise UserError(f"{self.path}: damaged: {name}: found {found}, expected {wanted}")
        self.content, self.style = self._tensor("content"), self._tensor("style")
        self.volume, self.start = self._tensor("volume"), self._tensor("start")
        self.content_mean, self.content_deviation = self._statistics("content")
        self.style_mean, self.style_deviation = self._statistics("style")
        self.token_mean, self.token_deviation = self._statistics("token")
        self.style_token_mean, self.style_token_deviation = self._statistics("style_token")
        self.latents_mean, self.latents_deviation = self._statistics("latents")
        if self.tokens:
            self._map_mean, self._map_deviation = self._statistics("map")  # (V, 1 + K, D)
        digest = hashlib.sha256(file.sha256.encode())
        for statistics in (self.content_mean, self.style_mean, self.token_deviation, self.latents_deviation):
            digest.update(statistics.numpy().tobytes())
        self.identity = digest.hexdigest()

    @classmethod
    def open(cls, path: Path | str) -> FactorTable:
        """Open a table; its values are read when they are used.

        Raises:
            UserError: if it can't be read, is damaged or no such table.
        """
        return cls(TensorFile(Path(path)))

    def _tensor(self, name: str) -> Tensor:
        return torch.from_numpy(self._file.array(name, writable=True))

    def _statistics(self, kind: str) -> tuple[Tensor, Tensor]:
        return self._tensor(f"{kind}_mean"), self._tensor(f"{kind}_deviation")

    def _shapes(self, content: Sequence[int], style: Sequence[int]) -> dict[str, tuple[int, ...]]:
        """Return what shape every tensor must have, given those of two."""
        (count, dim), (_, style_dim) = content, style
        channels = int(self.volumes[0]["shape"][0])
        widths = {
            "content": dim, "style": style_dim, "token": dim, "style_token": style_dim, "latents": channels,
        }  # fmt: skip
        shapes: dict[str, tuple[int, ...]] = {
            "content": (count, dim), "style": (count, style_dim), "volume": (count,), "start": (count, 3),
        }  # fmt: skip
        for kind, width in widths.items():
            shapes |= {f"{kind}_mean": (width,), f"{kind}_deviation": (width,)}
        if not self.tokens:
            return shapes
        of_maps = len(self.volumes), 1 + self.exchanged, dim
        shapes |= {"map_mean": of_maps, "map_deviation": of_maps}
        for record in self.volumes:
            name, grid = record["name"], tuple(edge // self.patch for edge in record["shape"][1:])
            shapes |= {f"content/{name}": (*grid, dim), f"style/{name}": (*grid, style_dim)}
            for number in range(self.exchanged):
                shapes |= {
                    f"exchanged_latents/{number}/{name}": record["shape"],
                    f"exchanged_content/{number}/{name}": (*grid, dim),
                    f"exchanged_style/{number}/{name}": (*grid, style_dim),
                }
        return shapes

    def volume_factors(self) -> tuple[Tensor, Tensor]:
        """Return content (V, D) and style (V, Ds) of all V volumes: the means over their windows."""
        counts = torch.bincount(self.volume, minlength=len(self.volumes)).tolist()
        content, style = (
            torch.stack([rows.mean(0) for rows in factors.split(counts)])
            for factors in (self.content, self.style)
        )
        return content, style

    def content_map(
        self,
        volume: int,
        start: Sequence[int],
        size: Sequence[int],
        exchanged: int | None = None,
        standardised: bool = False,
    ) -> Tensor:
        """Read the content of a box of a volume, a token for each patch.

        Args:
            volume: position in ``volumes``.
            start: first corner of the box in latent voxels, on the grid of patches.
            size: its edges in latent voxels, multiples of a patch.
            exchanged: which of the exchanged styles the volume has; None for its own.
            standardised: bring each dimension to mean 0 and deviation 1 over the whole volume in that style.

        Returns:
            (X, Y, Z, D) float32.

        Raises:
            UserError: the table has no maps, or not so many exchanged styles.
            ValueError: the box is not on the grid of patches, or leaves it.
        """
        tokens = self._map("content", volume, start, size, exchanged)  # (X, Y, Z, D)
        if not standardised:
            return tokens
        style = 0 if exchanged is None else 1 + exchanged
        return (tokens - self._map_mean[volume, style]) / self._map_deviation[volume, style]

    def style_map(
        self, volume: int, start: Sequence[int], size: Sequence[int], exchanged: int | None = None
    ) -> Tensor:
        """Read the style of a box of a volume, (X, Y, Z, Ds) float32; see :meth:`content_map`."""
        return self._map("style", volume, start, size, exchanged)

    def exchanged_style(self, volume: int, exchanged: int) -> Tensor:
        """Return the style (Ds,) of a volume in an exchanged style: the mean over its tokens."""
        tokens = _values(self._array("style", volume, exchanged))  # (X, Y, Z, Ds)
        return tokens.float().mean((0, 1, 2))

    def exchanged_latents(
        self, volume: int, start: Sequence[int], size: Sequence[int], exchanged: int
    ) -> Tensor:
        """Read a box of a volume's latents in another style: (C, x, y, z) bfloat16."""
        latents = self._array("latents", volume, exchanged)  # (C, x, y, z)
        x, y, z = (slice(begin, begin + edge) for begin, edge in zip(start, size, strict=True))
        return _values(latents[:, x, y, z])

    def _array(self, kind: str, volume: int, exchanged: int | None) -> np.ndarray:
        """Return the bits of a volume's bfloat16 array, which stay in the file until they are used."""
        if not self.tokens:
            raise UserError(f"{self.path}: a table without tokens; make one with `factors --tokens true`")
        name = self.volumes[volume]["name"]
        if exchanged is None:
            return self._file.array(f"{kind}/{name}")
        if not 0 <= exchanged < self.exchanged:
            raise UserError(f"{self.path}: no exchanged style {exchanged}, the table has {self.exchanged}")
        return self._file.array(f"exchanged_{kind}/{exchanged}/{name}")

    def _map(
        self, kind: str, volume: int, start: Sequence[int], size: Sequence[int], exchanged: int | None
    ) -> Tensor:
        record, tokens = self.volumes[volume], self._array(kind, volume, exchanged)  # (X, Y, Z, D)
        box = []
        for begin, edge, first, whole in zip(start, size, record["first"], tokens.shape, strict=False):
            place, rest = divmod(begin - first, self.patch)
            if rest or edge % self.patch or not 0 <= place <= place + edge // self.patch <= whole:
                raise ValueError(
                    f"box of {tuple(size)} at {tuple(start)} is not on the patches of {record['name']}, of "
                    f"{self.patch} from {record['first']} on"
                )
            box.append(slice(place, place + edge // self.patch))
        return _values(tokens[tuple(box)]).float()


_ABOUT = ("encoder", "window", "patch", "tokens", "exchanged", "volumes")  # in the metadata, as JSON


def _values(bits: np.ndarray) -> Tensor:
    """Copy bfloat16 values out of the file, given their bits."""
    return torch.from_numpy(np.array(bits)).view(torch.bfloat16)


def _edges(values: Sequence[int]) -> Edges:
    x, y, z = map(int, values)
    return x, y, z
