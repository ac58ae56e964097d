"""Crop batches: a pure function of seed and number, so resume is exact with any workers and processes."""

from __future__ import annotations

import gc
import os
import re
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing import parent_process
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
from torch import Tensor, from_numpy
from torch.utils.data import DataLoader, Dataset

from meduet_fast.connections import close_inherited
from meduet_fast.errors import UserError

from .held_out import held_out_start
from .store import LatentStore, check_file, read_index

# Streams of the counter-based generator; two uses of one seed never share numbers.
_TRAINING, _EVALUATION = 1, 2
READER = "DataLoader worker"  # so PyTorch's errors call a reader
PINNING = "Pin memory thread exited"  # it is who takes over what readers hand over, on CUDA


@dataclass(frozen=True)
class CropConfig:
    """How batches are drawn.

    Attributes:
        crop_size: edge of the cubic crop in latent voxels (published: 24).
        batch_size: crops of a batch; even, because the method mixes row i with row B-1-i.
        seed: seed of the whole order of crops.
        held_out_fraction: part of axis 0 (left-right) of every volume that training never sees.
    """

    crop_size: int = 24
    batch_size: int = 64
    seed: int = 0
    held_out_fraction: float = 0.0


def _generator(seed: int, stream: int, number: int, lane: int) -> np.random.Generator:
    # The counter's low words count the numbers drawn; number and lane, in the high words, keep streams apart.
    key = np.array([seed, stream], dtype=np.uint64)  # of mixed plain integers numpy would make floats
    counter = np.array([0, 0, number, lane], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=counter))


class CropBatches(Dataset[dict[str, Tensor]]):
    """Map-style data set: the index is the number of a batch in one endless stream, the item that batch.

    An item is a dict: ``latents`` bfloat16 (B, C, s, s, s); ``domain`` int64 (B,), positions in
    ``store.domains``; ``volume`` int64 (B,), positions in ``store.entries``; ``start`` int64 (B, 3), first
    corners in latent voxels.

    Every batch holds every domain as often as any other, give or take one; volumes are uniform in a domain,
    corners uniform within a volume's training region. Rows i and B-1-i come from different volumes.

    Args:
        store: an open store.
        config: how batches are drawn.

    Raises:
        UserError: odd batch, a single volume, volumes that cannot hold a crop (all are named), bad arguments.
    """

    def __init__(self, store: LatentStore, config: CropConfig) -> None:
        if config.batch_size < 2 or config.batch_size % 2:
            raise UserError(
                f"batch_size: found {config.batch_size}, expected an even number of at least 2 "
                "(row i is mixed with row B-1-i)"
            )
        if not 0 <= config.seed < 2**64:
            raise UserError(f"seed: found {config.seed}, expected 0 <= seed < 2**64")
        if len(store.entries) < 2:
            raise UserError(
                f"{store.path}: {len(store.entries)} volume(s), expected at least 2: "
                "a sample is never mixed with itself"
            )
        self.store, self.config = store, config
        self._choices = _start_choices(store, config)
        domain = np.array([store.domain_id(index) for index in range(len(store.entries))])
        self._by_domain = np.argsort(domain, kind="stable")  # volume indices, grouped by domain
        self._count = np.bincount(domain)
        self._first = np.cumsum(self._count) - self._count

    def plan(self, number: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """What a batch holds, without reading it: domain (B,), volume (B,), start (B, 3), all int64.

        Raises:
            IndexError: the number is negative.
        """
        if number < 0:
            raise IndexError(f"batch {number}: the number is negative")
        size, seed = self.config.batch_size, self.config.seed
        order = _generator(seed, _TRAINING, number, 0).permutation(len(self._count))
        rng = _generator(seed, _TRAINING, number, 1)
        domain = rng.permutation(order[np.arange(size) % len(order)])
        own, partner = domain[: size // 2], domain[: size // 2 - 1 : -1]  # views: row i and row B-1-i
        self._part_single_volumes(own, partner, rng)

        rank_in_domain = (rng.random(size) * self._count[domain]).astype(np.int64)
        first, second = rank_in_domain[: size // 2], rank_in_domain[: size // 2 - 1 : -1]
        same = own == partner
        # Within one domain the partner is drawn from the others: one choice less, and skip the own volume.
        others = (rng.random(size // 2) * (self._count[partner] - 1)).astype(np.int64)
        second[same] = (others + (others >= first))[same]

        volume = self._by_domain[self._first[domain] + rank_in_domain]
        start = (rng.random((size, 3)) * self._choices[volume]).astype(np.int64)
        return domain, volume, start

    def _part_single_volumes(self, own: np.ndarray, partner: np.ndarray, rng: np.random.Generator) -> None:
        """Swap rows so that no pair has both its rows in a domain of one volume.

        Of two or more domains none fills more than half the rows, so for such a pair there is always another
        pair without that domain; a swap with it mends one pair and harms none.
        """
        for pair in np.flatnonzero((own == partner) & (self._count[own] == 1)):
            single = own[pair]
            if partner[pair] != single:
                continue  # an earlier swap took one of its rows
            other = rng.choice(np.flatnonzero((own != single) & (partner != single)))
            partner[pair], own[other] = own[other], single

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        domain, volume, start = self.plan(number)
        edge = self.config.crop_size
        return {
            "latents": self.store.read_crops(volume.tolist(), start.tolist(), (edge, edge, edge)),
            "domain": from_numpy(domain),
            "volume": from_numpy(volume),
            "start": from_numpy(start),
        }


def _start_choices(store: LatentStore, config: CropConfig) -> np.ndarray:
    """Number of possible first corners per volume and axis, (volumes, 3)."""
    crop, refused, choices = config.crop_size, [], []
    if crop < 1:
        raise UserError(f"crop_size: found {crop}, expected at least 1")
    for entry in store.entries:
        if min(entry.grid) < crop:
            refused.append(f"{entry.name} {entry.grid} is smaller than a crop of {crop}")
            continue
        try:
            end = held_out_start(entry.grid[0], config.held_out_fraction, crop)
        except UserError as error:
            refused.append(f"{entry.name}: {error}")
            continue
        choices.append([end - crop + 1, entry.grid[1] - crop + 1, entry.grid[2] - crop + 1])
    if refused:
        raise UserError(f"{store.path}: volumes that cannot hold a training crop: " + "; ".join(refused))
    return np.array(choices)


class _ErrorsAsItems(Dataset[Any]):
    """Hands on a user's error as an item: raised here, the loader would wrap it in a traceback."""

    def __init__(self, batches: CropBatches) -> None:
        self.batches = batches

    def __getitem__(self, number: int) -> dict[str, Tensor] | UserError:
        try:
            return self.batches[number]
        except UserError as error:
            return error


class CropLoader(DataLoader[dict[str, Tensor]]):
    """Batches of :class:`CropBatches`, read by other processes if asked for; see :func:`crop_loader`."""

    def __iter__(self) -> Iterator[dict[str, Tensor]]:  # type: ignore[override]
        return self._raise_errors(super().__iter__())  # readers start now, and not at the first batch

    @staticmethod
    def _raise_errors(items: Iterator[dict[str, Tensor] | UserError]) -> Iterator[dict[str, Tensor]]:
        while True:
            try:
                batch = next(items)
            except StopIteration:
                return
            except (ConnectionError, EOFError) as error:  # killed while it handed over a batch
                raise RuntimeError(f"{READER} broke off: {error}") from error
            if isinstance(batch, UserError):
                raise batch
            yield batch


def crop_loader(
    store: LatentStore,
    config: CropConfig,
    *,
    rank: int = 0,
    world_size: int = 1,
    start_step: int = 0,
    total_steps: int,
    workers: int = 0,
    pin_memory: bool = False,
) -> CropLoader:
    """Loader over a process's share of batches ``start_step`` to ``total_steps - 1``.

    Processes take turns: of every ``world_size`` batches each gets one; see :class:`CropBatches`.

    Args:
        rank, world_size: which process this is, of how many.
        start_step, total_steps: first batch of all processes, and the one behind their last.
        workers: reader processes; 0 reads in this process. The batches are the same.
        pin_memory: copy batches to page-locked memory, for asynchronous transfer to a GPU.

    Raises:
        UserError: see :class:`CropBatches`; while iterating, see :meth:`LatentStore.read_crops`.
    """
    return CropLoader(
        _ErrorsAsItems(CropBatches(store, config)),
        batch_size=None,
        sampler=range(start_step + rank, total_steps, world_size),
        num_workers=workers,
        pin_memory=pin_memory,
        worker_init_fn=_stand_alone,
    )


def lost_reader(store: Path, error: Exception) -> str | None:
    """What to say of an error if a killed reader is behind it, else None.

    PyTorch raises when it finds a reader dead, wherever the main thread is then: in a checkpoint, too. A file
    that is cut short while it is mapped kills its readers.

    Raises:
        UserError: the store has no readable index any more.
    """
    if READER not in str(error) and PINNING not in str(error):
        return None
    killed = re.search(r"killed by signal: ([^.]+)", str(error))
    reason = "out of memory?"
    for entry in read_index(store).entries:
        try:
            check_file(store, entry)
        except UserError as damaged:
            reason = str(damaged)
            break
    how = f"was killed by signal {killed[1]}" if killed else "ended without a word"
    return f"a reader of latents {how} ({reason})"


def _stand_alone(worker: int) -> None:
    """Free a reader from what a forked process inherits."""
    gc.freeze()  # to collect a process group among the garbage would hang: a fork has not its threads
    # Ctrl-C, and SIGTERM from torchrun or a scheduler, reach the whole process group; a reader must outlive
    # them until the run has its checkpoint.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGBUS, signal.SIG_DFL)  # PyTorch's handler would speak of shared memory
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    Thread(target=_obey_parent, daemon=True).start()
    close_inherited()


def _obey_parent() -> None:
    """End with the parent, and at the SIGTERM that it sends when it ends, but at no other."""
    parent = parent_process()
    assert parent is not None
    while parent.is_alive():
        received = signal.sigtimedwait({signal.SIGTERM}, 5.0)
        if received is not None and received.si_pid == parent.pid:
            break
    os._exit(0)


def evaluation_starts(
    grid: tuple[int, int, int], crop_size: int, fraction: float, count: int, seed: int, *, held_out: bool
) -> list[tuple[int, int, int]]:
    """Distinct crop corners in the held-out slab, or in the training region; the same for every equal grid.

    Args:
        grid: spatial shape (X, Y, Z) in latent voxels.
        crop_size: edge of the crop in latent voxels.
        fraction: held-out part of axis 0.
        count: how many corners; fewer come back where the region has fewer.
        seed: chooses the corners.
        held_out: which of the two regions.

    Raises:
        UserError: the grid cannot hold such a crop, or nothing is held out.
    """
    if min(grid) < crop_size:
        raise UserError(f"grid {grid} cannot hold a crop of {crop_size}")
    if held_out and fraction == 0:
        raise UserError("held-out fraction is 0: there are no held-out crops")
    boundary = held_out_start(grid[0], fraction, crop_size)
    first, end = (boundary, grid[0]) if held_out else (0, boundary)
    choices = (end - first - crop_size + 1, grid[1] - crop_size + 1, grid[2] - crop_size + 1)
    total = int(np.prod(choices))
    chosen = _generator(seed, _EVALUATION, 0, 0).choice(total, size=min(count, total), replace=False)
    x, y, z = (axis.tolist() for axis in np.unravel_index(chosen, choices))
    return [(first + x[i], y[i], z[i]) for i in range(len(chosen))]


def sample_crops(
    store: LatentStore, index: int, starts: list[tuple[int, int, int]], crop_size: int
) -> Tensor:
    """Crops of one volume at given corners: bfloat16 (len(starts), C, s, s, s)."""
    return store.read_crops([index] * len(starts), starts, (crop_size, crop_size, crop_size))
