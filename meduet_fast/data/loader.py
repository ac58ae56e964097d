"""Load batches of crops in reader processes, and tell what became of a reader that was lost."""

from __future__ import annotations

import gc
import os
import re
import signal
from collections.abc import Iterator
from multiprocessing import parent_process
from pathlib import Path
from threading import Thread
from typing import Any

from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from meduet_fast.connections import close_inherited
from meduet_fast.errors import UserError

from .crops import CropBatches
from .store import check_file
from .store_index import read_index

READER = "DataLoader worker"  # so PyTorch's errors call a reader
PINNING = "Pin memory thread exited"  # it is who takes over what readers hand over, on CUDA


class _ErrorsAsItems(Dataset[Any]):
    """Hand on a user's error as an item: raised here, the loader would wrap it in a traceback."""

    def __init__(self, batches: CropBatches) -> None:
        self.batches = batches

    def __getitem__(self, number: int) -> dict[str, Tensor] | UserError:
        try:
            return self.batches[number]
        except UserError as error:
            return error


class CropLoader(DataLoader[dict[str, Tensor]]):
    """Load batches of :class:`CropBatches`, by other processes if asked for; see :func:`crop_loader`."""

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
    batches: CropBatches,
    *,
    rank: int = 0,
    world_size: int = 1,
    start_step: int = 0,
    total_steps: int,
    workers: int = 0,
    pin_memory: bool = False,
) -> CropLoader:
    """Build a loader over a process's share of batches ``start_step`` to ``total_steps - 1``.

    Processes take turns: of every ``world_size`` batches each gets one.

    Args:
        batches: the endless stream; item ``n`` is its batch ``n``.
        rank, world_size: which process this is, of how many.
        start_step, total_steps: first batch of all processes, and the one behind their last.
        workers: reader processes; 0 reads in this process. The batches are the same.
        pin_memory: copy batches to page-locked memory, for asynchronous transfer to a GPU.

    Raises:
        UserError: while iterating, see :meth:`LatentStore.read_crops`.
    """
    return CropLoader(
        _ErrorsAsItems(batches),
        batch_size=None,
        sampler=range(start_step + rank, total_steps, world_size),
        num_workers=workers,
        pin_memory=pin_memory,
        worker_init_fn=_stand_alone,
    )


def lost_reader(store: Path, error: Exception) -> str | None:
    """Return what to say of an error if a killed reader is behind it, else None.

    PyTorch raises when it finds a reader dead, wherever the main thread is then: in a checkpoint, too.

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
