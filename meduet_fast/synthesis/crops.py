"""Batches of crops with their factors, for training: the crops are windows of a table."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cache
from typing import Literal

import numpy as np
import torch
from torch import Tensor, from_numpy

from meduet_fast.data.crops import TRAINING, balanced_domains, random_stream
from meduet_fast.data.held_out import HELD_OUT_VOLUMES, HeldOut
from meduet_fast.data.loader import LoadedCrops
from meduet_fast.data.store import LatentStore
from meduet_fast.engine import Batches, EngineConfig
from meduet_fast.errors import UserError, printable
from meduet_fast.files import in_real_folder

from .factors import FactorTable

FactorSource = Literal["own", "volume"]


def check_table(table: FactorTable, store: LatentStore) -> None:
    """Refuse a table that is not of a store's latents as they are.

    Raises:
        UserError: naming what differs.
    """
    if table.tokenizer != store.index.tokenizer:
        raise UserError(
            f"{table.path}: factors of latents of tokenizer {table.tokenizer}, {store.path} has those of "
            f"{store.index.tokenizer}"
        )
    mine = {str(record["name"]): (record["shape"], record["content_key"]) for record in table.volumes}
    theirs = {entry.name: (entry.shape, entry.content_key) for entry in store.entries}
    names = sorted(name for name in {*mine, *theirs} if mine.get(name) != theirs.get(name))
    if names or list(mine) != list(theirs):
        raise UserError(
            f"{table.path}: not a table of {store.path} as it is: {len(names)} volumes differ "
            f"({', '.join(names[:3])}); make it anew with `meduet-fast factors`"
        )


def _borders(table: FactorTable, held_out: HeldOut) -> np.ndarray:
    """Return the first held-out index along axis 0 of each volume, on the grid of patches: (volumes,)."""
    borders, refused = [], []
    for index, record in enumerate(table.volumes):
        try:
            borders.append(held_out.border(index, table.window[0], table.patch))
        except UserError as error:
            refused.append(f"{record['name']}: {error}")
    if refused:
        raise UserError(f"{table.path}: volumes that cannot be divided: {'; '.join(refused)}")
    return np.array(borders)


def training_windows(table: FactorTable, held_out: HeldOut) -> np.ndarray:
    """Return the rows of a table whose windows lie wholly in what is trained on, int64, ascending.

    Args:
        table: of the store that ``held_out`` is of.
        held_out: what training never sees. Slabs are at least a window wide, and end on the grid of patches.

    Raises:
        UserError: naming volumes that have no room for a window on both sides.
    """
    borders = _borders(table, held_out)
    return np.flatnonzero(table.start[:, 0].numpy() + table.window[0] <= borders[table.volume.numpy()])


def held_out_windows(table: FactorTable, held_out: HeldOut) -> np.ndarray:
    """Return the rows of a table whose windows are held out wholly; see :func:`training_windows`."""
    borders = _borders(table, held_out)
    return np.flatnonzero(table.start[:, 0].numpy() >= borders[table.volume.numpy()])


@dataclass(frozen=True)
class Given:
    """Say what a batch gives with its latents.

    Attributes:
        factors: "own" are a window's own content and style, "volume" those of its volume. Maps are its own.
        tokens: the map of content: where the table has exchanged styles, in one drawn at random that is not
            the crop's, which could be told from it.
        standardised: bring the tokens of content to mean 0 and deviation 1 within their volume.
        exchanged_share: part of the crops that are in one of the exchanged styles themselves: their latents
            are the pretrained decoder's, their style is that of these latents.
        aligned: the maps of both factors as the encoder made them.
    """

    factors: FactorSource = "own"
    tokens: bool = False
    standardised: bool = False
    exchanged_share: float = 0.0
    aligned: bool = False


class WindowBatches:
    """Read batches of windows with their factors: item ``number`` is a batch of one endless stream.

    An item is a dict: ``latents`` bfloat16 (B, C, x, y, z); ``content`` (B, D) and ``style`` (B, Ds) float32;
    ``domain`` int64 (B,), positions in ``store.domains``; ``volume`` int64 (B,), positions in
    ``store.entries``; ``start`` int64 (B, 3), first corners in latent voxels. With ``tokens`` also
    ``content_map`` bfloat16 (B, X, Y, Z, D), with ``aligned`` also ``aligned_map`` bfloat16
    (B, X, Y, Z, D + Ds), content and style of each token.

    Every batch holds every domain as often as any other, give or take one; volumes are uniform in a domain,
    windows uniform among a volume's training windows.

    Args:
        store: an open store.
        table: its factors.
        batch_size: windows of a batch, any number.
        seed: seed of the whole order of windows.
        held_out: what training never sees.
        given: what it gives with the latents.

    Raises:
        UserError: see :func:`check_table`; no window to train on; maps or styles that the table has not.
    """

    def __init__(
        self,
        store: LatentStore,
        table: FactorTable,
        batch_size: int,
        seed: int,
        held_out: HeldOut,
        given: Given,
    ) -> None:
        check_table(table, store)
        if (given.tokens or given.aligned) and not table.tokens:
            raise UserError(f"{table.path}: a table without tokens; make one with `factors --tokens true`")
        if given.exchanged_share and not table.exchanged:
            raise UserError(
                f"{table.path}: a table without exchanged styles; make one with `factors --tokens true "
                "--exchanged 2`"
            )
        self._store, self._table, self._batch_size, self._seed = store, table, batch_size, seed
        self._given, self._of_volume = given, given.factors == "volume"
        self._rows = training_windows(table, held_out)
        windows = np.bincount(table.volume.numpy()[self._rows], minlength=len(store.entries))  # (volumes,)
        none = [
            entry.name
            for index, entry in enumerate(store.entries)
            if not windows[index] and index not in held_out.volumes
        ]
        if none:
            raise UserError(f"{table.path}: no window to train on in {', '.join(none)}")
        self._windows, self._first_window = windows, np.cumsum(windows) - windows  # places in _rows
        trained = np.flatnonzero(windows)  # (trained,)
        ids = [store.domain_id(index) for index in trained.tolist()]
        domain = np.unique(ids, return_inverse=True)[1]  # (trained,), of those with windows
        self._by_domain = trained[np.argsort(domain, kind="stable")]  # (trained,), by domain
        self._count = np.bincount(domain)  # (domains,)
        self._first = np.cumsum(self._count) - self._count  # (domains,), places in _by_domain
        self._pair = table.volume_factors() if self._of_volume else (table.content, table.style)
        self._exchanged_style = cache(table.exchanged_style)

    @property
    def store(self) -> LatentStore:
        """Return the store whose crops they are."""
        return self._store

    @property
    def training_windows(self) -> int:
        """Count the windows that batches are drawn from."""
        return len(self._rows)

    def layout(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Return the shape and dtype of every entry of a batch."""
        size, table = self._batch_size, self._table
        dim, style_dim = table.content.shape[1], table.style.shape[1]
        layout: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
            "latents": ((size, self._store.index.channels, *table.window), torch.bfloat16),
            "content": ((size, dim), torch.float32),
            "style": ((size, style_dim), torch.float32),
            "domain": ((size,), torch.int64),
            "volume": ((size,), torch.int64),
            "start": ((size, 3), torch.int64),
        }
        grid = tuple(edge // table.patch for edge in table.window)
        if self._given.tokens:
            layout["content_map"] = (size, *grid, dim), torch.bfloat16
        if self._given.aligned:
            layout["aligned_map"] = (size, *grid, dim + style_dim), torch.bfloat16
        return layout

    def plan(self, number: int) -> np.ndarray:
        """Draw a batch without reading it: rows of the table (B,), int64.

        Raises:
            IndexError: the number is negative.
        """
        if number < 0:
            raise IndexError(f"batch {number}: the number is negative")
        domain, rng = balanced_domains(len(self._count), self._batch_size, self._seed, number)  # (B,)
        chance = rng.random((2, self._batch_size))
        place = self._first[domain] + (chance[0] * self._count[domain]).astype(np.int64)  # (B,)
        volume = self._by_domain[place]  # (B,)
        window = (chance[1] * self._windows[volume]).astype(np.int64)  # (B,)
        return self._rows[self._first_window[volume] + window]

    def volumes(self, number: int) -> np.ndarray:
        """Draw the volumes (B,) of a batch without reading it."""
        return self._table.volume.numpy()[self.plan(number)]

    def styles(self, number: int) -> tuple[list[int | None], list[int | None]]:
        """Draw a batch's styles without reading it: which of a table's exchanged ones, None is the own one.

        Returns:
            The styles that the crops are in, and those that their maps of content are in: others, where there
            are others.
        """
        size, count = self._batch_size, self._table.exchanged
        if not count:
            return [None] * size, [None] * size
        rng = random_stream(self._seed, TRAINING, number, 2)
        told, other = rng.integers(count, size=(2, size))  # (B,) each
        share = self._given.exchanged_share
        shown = np.where(rng.random(size) < share, other, -1) if share else np.full(size, -1)  # (B,)
        told = told - 1 + (told - 1 >= shown)  # (B,), the own one is -1, and that which is shown is left out
        return (
            [None if style < 0 else style for style in shown.tolist()],
            [None if style < 0 else style for style in told.tolist()],
        )

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        table, rows = self._table, from_numpy(self.plan(number))
        volume, start = table.volume[rows], table.start[rows]  # (B,), (B, 3)
        places = list(zip(volume.tolist(), start.tolist(), strict=True))
        chosen = volume if self._of_volume else rows  # (B,)
        batch = {
            "latents": self._store.read_crops(volume.tolist(), start.tolist(), table.window),
            "content": self._pair[0][chosen],  # (B, D)
            "style": self._pair[1][chosen],  # (B, Ds)
            "domain": torch.tensor([self._store.domain_id(index) for index in volume.tolist()]),
            "volume": volume,
            "start": start,
        }
        shown, told = self.styles(number)
        for row, (place, style) in enumerate(zip(places, shown, strict=True)):
            if style is not None:
                batch["latents"][row] = table.exchanged_latents(*place, table.window, style)
                batch["style"][row] = (
                    self._exchanged_style(place[0], style)
                    if self._of_volume
                    else table.style_map(*place, table.window, style).mean((0, 1, 2))
                )  # (Ds,)
        if self._given.tokens:
            maps = [
                table.content_map(*place, table.window, style, self._given.standardised)
                for place, style in zip(places, told, strict=True)
            ]
            batch["content_map"] = torch.stack(maps).bfloat16()  # (B, X, Y, Z, D)
        if self._given.aligned:
            both = [
                torch.cat(
                    [read(*place, table.window, style) for read in (table.content_map, table.style_map)], -1
                )
                for place, style in zip(places, shown, strict=True)
            ]
            batch["aligned_map"] = torch.stack(both).bfloat16()  # (B, X, Y, Z, D + Ds)
        return batch


class FactorCrops(LoadedCrops, Batches):
    """Random windows of a store with their factors, for the engine; see :class:`WindowBatches`.

    Args:
        store, table, held_out, given: see there.
        config: of the run.

    Attributes:
        held_out: what is never trained on.
        windows: how many there are to train on.

    Raises:
        UserError: see :class:`WindowBatches`.
    """

    def __init__(
        self,
        store: LatentStore,
        table: FactorTable,
        config: EngineConfig,
        held_out: HeldOut,
        given: Given,
    ) -> None:
        batches = WindowBatches(store, table, config.batch_size, config.seed, held_out, given)
        super().__init__(batches, config.workers, config.timeout_s)
        self.held_out, self.windows = held_out, batches.training_windows
        self.identity = hashlib.sha256(f"{store.identity()} {table.identity}".encode()).hexdigest()
        self.record = {"factors": printable(in_real_folder(table.path)), "factors_identity": table.identity}
        if held_out.kind == "volumes":
            self.record[HELD_OUT_VOLUMES] = held_out.names()
