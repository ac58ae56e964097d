"""Load batches of crops in reader processes, which a run never waits for longer than it was told to.

Readers are forked and put batches into memory that was shared with them before. PyTorch's loader hands over
files in ``/dev/shm`` by descriptors; where there is no room for one, its reader prints an error and the run
waits for ever. Here nothing can run out once the readers are there, and too little of something at the start
means fewer of them.
"""

from __future__ import annotations

import faulthandler
import gc
import mmap
import os
import resource
import signal
import sys
import time
import traceback
import weakref
from collections.abc import Iterator, Sequence
from contextlib import suppress
from math import prod
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NoReturn, Protocol

import numpy as np
import torch
from torch import Tensor

from meduet_fast.connections import close_inherited, descriptors
from meduet_fast.errors import UserError

from .store import LatentStore

AHEAD = 2  # batches that every reader is asked for before they are wanted
SPARE_DESCRIPTORS = 16  # left for latents, checkpoints and logs
ALIGNMENT = 64  # bytes, of a tensor in shared memory
SIGNALS = (signal.SIGINT, signal.SIGTERM)  # they reach the whole process group
Slot = dict[str, Tensor]  # a batch's place in shared memory


class CropSource(Protocol):
    """An endless stream of batches of crops: item ``n`` is batch ``n``, a pure function of its number."""

    @property
    def store(self) -> LatentStore:
        """Return the store whose crops they are."""

    def layout(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Return the shape and dtype of every entry of a batch."""

    def volumes(self, number: int) -> np.ndarray:
        """Return the volumes (B,) of a batch, positions in ``store.entries``, without reading it."""

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        """Read a batch."""


class CropLoader:
    """Load batches of a :class:`CropSource`, by other processes if asked for; see :func:`crop_loader`."""

    def __init__(
        self, batches: CropSource, numbers: Sequence[int], workers: int, pin_memory: bool, timeout_s: float
    ) -> None:
        self._batches, self._numbers, self._workers = batches, numbers, workers
        self._pin, self._timeout_s = pin_memory, timeout_s
        self._reads: tuple[float, int] | None = None  # since when, and which batch

    def __len__(self) -> int:
        return len(self._numbers)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        readers = _start_readers(self._batches, min(self._workers, len(self)))  # now, not at the first batch
        if not readers:
            return self._read_here()
        return _ReadAhead(self._batches, self._numbers, readers, self._pin, self._timeout_s)

    def _read_here(self) -> Iterator[dict[str, Tensor]]:
        for number in self._numbers:
            self._reads = time.monotonic(), number
            try:
                batch = self._batches[number]
            finally:
                self._reads = None
            yield {name: item.pin_memory() for name, item in batch.items()} if self._pin else batch

    def reading(self) -> tuple[float, str] | None:
        """Say since when (``time.monotonic``) this process reads which batch; None if it reads none.

        Nobody can interrupt it in that; a thread that asks can end it.
        """
        if (reads := self._reads) is None:
            return None
        return reads[0], f"{self._batches.store.path}: {_contents(self._batches, reads[1])}"


def _contents(batches: CropSource, number: int) -> str:
    """Name the volumes of a batch, not too many."""
    volumes = list(dict.fromkeys(batches.store.entries[int(item)].name for item in batches.volumes(number)))
    more = f" and {len(volumes) - 4} more" if len(volumes) > 4 else ""
    return f"batch {number} is of {', '.join(volumes[:4])}{more}"


def crop_loader(
    batches: CropSource,
    *,
    rank: int = 0,
    world_size: int = 1,
    start_step: int = 0,
    total_steps: int,
    workers: int = 0,
    pin_memory: bool = False,
    timeout_s: float = 600.0,
) -> CropLoader:
    """Build a loader over a process's share of batches ``start_step`` to ``total_steps - 1``.

    Processes take turns: of every ``world_size`` batches each gets one. Where there are too few file
    descriptors, processes or memory for all readers, as many as there is room for are started, and a line
    says so; where there is room for none, this process reads.

    Args:
        batches: the endless stream; item ``n`` is its batch ``n``.
        rank, world_size: which process this is, of how many.
        start_step, total_steps: first batch of all processes, and the one behind their last.
        workers: reader processes; 0 reads in this process. The batches are the same.
        pin_memory: copy batches to page-locked memory, for asynchronous transfer to a GPU.
        timeout_s: seconds to wait for a batch of a reader.

    Raises:
        UserError: while iterating: see :meth:`LatentStore.read_crops`; a reader was killed, or is not ready
            in time.
    """
    numbers = range(start_step + rank, total_steps, world_size)
    return CropLoader(batches, numbers, workers, pin_memory, timeout_s)


class LoadedCrops:
    """Read a stream for the engine; see :class:`meduet_fast.engine.Batches`, whose part this is.

    Args:
        batches: the stream.
        workers, timeout_s: see :func:`crop_loader`.

    Attributes:
        path: the store.
    """

    def __init__(self, batches: CropSource, workers: int, timeout_s: float) -> None:
        self.path = batches.store.path
        self._batches, self._workers, self._timeout_s = batches, workers, timeout_s
        self._loader: CropLoader | None = None

    def read(self, first: int, last: int, rank: int, size: int, pin: bool) -> Iterator[dict[str, Tensor]]:
        """Yield this process's share."""
        self._loader = crop_loader(
            self._batches, rank=rank, world_size=size, start_step=first, total_steps=last,
            workers=self._workers, pin_memory=pin, timeout_s=self._timeout_s,
        )  # fmt: skip
        return iter(self._loader)

    def reading(self) -> tuple[float, str] | None:
        """Say which batch this process itself reads."""
        return self._loader.reading() if self._loader else None

    def names(self, ids: Tensor) -> list[str]:
        """Return the volumes' names."""
        return [self._batches.store.entries[int(index)].name for index in ids]


def _shared_slot(batches: CropSource) -> Slot:
    """Get memory for a batch that this process shares with those that it forks from now on."""
    places, size = {}, 0
    for name, (shape, dtype) in batches.layout().items():
        places[name] = size, prod(shape) * dtype.itemsize, shape, dtype
        size += -(-prod(shape) * dtype.itemsize // ALIGNMENT) * ALIGNMENT
    memory = torch.frombuffer(mmap.mmap(-1, size), dtype=torch.uint8)  # (size,)
    return {
        name: memory[start : start + length].view(dtype).view(shape)
        for name, (start, length, shape, dtype) in places.items()
    }


class _Reader:
    """A process that reads batches into its slots, in the order in which they are asked for.

    Raises:
        OSError: there is no room for one more.
    """

    def __init__(self, batches: CropSource, earlier: Sequence[_Reader]) -> None:
        self.slots = [_shared_slot(batches) for _ in range(AHEAD)]
        self.connection, theirs = Pipe()
        self.reaped = False
        # A reader has the run's handlers at first, which would tell the run of a signal a second time.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        try:
            self.pid = os.fork()
            if self.pid == 0:
                self._work(theirs, batches, earlier)
        except OSError:
            self.connection.close()
            theirs.close()
            raise
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        theirs.close()

    def _work(
        self, theirs: Connection[Any, Any], batches: CropSource, earlier: Sequence[_Reader]
    ) -> NoReturn:
        """Be the reader, until the run ends."""
        try:
            for reader in (*earlier, self):
                reader.connection.close()  # else the run's end would not be noticed
            _stand_alone()
            _serve(theirs, batches, self.slots)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(1)

    def state(self) -> str:
        """Say what the process is at."""
        try:
            letter = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            letter = "?"
        states = {"T": "is stopped (SIGSTOP? a debugger?)", "D": "waits for a disk", "R": "is computing"}
        return states.get(letter, "waits")


def _start_readers(batches: CropSource, wanted: int) -> list[_Reader]:
    """Start readers, or as many as there is room for."""
    readers, why = list[_Reader](), ""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    while len(readers) < wanted and not why:
        if limit != resource.RLIM_INFINITY and len(descriptors()) + SPARE_DESCRIPTORS > limit:
            why = f"too few file descriptors: `ulimit -n` is {limit}; raise it"
            break
        try:
            readers.append(_Reader(batches, readers))
        except OSError as error:
            why = f"{error.strerror}; raise the limits of processes (`ulimit -u`) and of memory"
    if why:
        instead = f"{len(readers)} of {wanted} readers" if readers else "no readers, the run itself reads"
        print(f"{batches.store.path}: {instead}: {why}", file=sys.stderr, flush=True)
    return readers


def _stand_alone() -> None:
    """Free a reader from what a forked process inherits."""
    gc.freeze()  # to collect a process group among the garbage would hang: a fork has not its threads
    # Ctrl-C, and SIGTERM from torchrun or a scheduler, reach the whole process group; a reader must outlive
    # them until the run has its checkpoint. It ends when the run does, which closes the connection.
    signal.set_wakeup_fd(-1)
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    faulthandler.register(signal.SIGQUIT, file=2)
    torch.set_num_threads(1)
    close_inherited()


def _serve(connection: Connection[Any, Any], batches: CropSource, slots: Sequence[Slot]) -> NoReturn:
    """Read what is asked for, and answer None or what went wrong, until the run ends."""
    while True:
        try:
            number, slot = connection.recv()
        except (EOFError, ConnectionError):
            os._exit(0)
        answer: tuple[type[Exception], str] | None = None
        try:
            for name, item in batches[number].items():
                slots[slot][name].copy_(item)
        except UserError as error:
            answer = UserError, str(error)
        except Exception:
            answer = RuntimeError, f"in a reader of latents:\n{traceback.format_exc()}"
        try:
            connection.send(answer)
        except ConnectionError:
            os._exit(0)


def _end(readers: Sequence[_Reader]) -> None:
    for reader in readers:
        reader.connection.close()
        if not reader.reaped:  # else the number may be another process's by now
            with suppress(ProcessLookupError):
                os.kill(reader.pid, signal.SIGKILL)
    deadline = time.monotonic() + 2.0  # one that waits for a disk can't be killed, and is left behind
    for reader in readers:
        with suppress(ChildProcessError):  # somebody else asked
            while (
                not reader.reaped
                and os.waitpid(reader.pid, os.WNOHANG)[0] == 0
                and time.monotonic() < deadline
            ):
                time.sleep(0.001)


class _ReadAhead(Iterator[dict[str, Tensor]]):
    """Hand out batches in order; readers take turns, and so do the slots of each."""

    def __init__(
        self, batches: CropSource, numbers: Sequence[int], readers: Sequence[_Reader], pin: bool,
        timeout_s: float,
    ) -> None:  # fmt: skip
        self._batches, self._numbers, self._readers = batches, numbers, readers
        self._pin, self._timeout_s, self._place = pin, timeout_s, 0
        self._finish = weakref.finalize(self, _end, readers)
        for place in range(AHEAD * len(readers)):
            self._ask(place)

    def _whose(self, place: int) -> tuple[_Reader, int]:
        """Return who reads the batch at a place of the order, and into which slot."""
        turn, reader = divmod(place, len(self._readers))
        return self._readers[reader], turn % AHEAD

    def _ask(self, place: int) -> None:
        if place < len(self._numbers):
            reader, slot = self._whose(place)
            with suppress(ConnectionError):  # whoever waits for its answer finds out why
                reader.connection.send((self._numbers[place], slot))

    def __next__(self) -> dict[str, Tensor]:
        place = self._place
        if place >= len(self._numbers):
            self._finish()
            raise StopIteration
        reader, slot = self._whose(place)
        try:
            self._wait(reader, self._numbers[place])
        except BaseException:
            self._place = len(self._numbers)
            self._finish()
            raise
        batch = {
            name: torch.empty_like(item, pin_memory=self._pin).copy_(item)
            for name, item in reader.slots[slot].items()
        }
        self._place = place + 1
        self._ask(place + AHEAD * len(self._readers))
        return batch

    def _wait(self, reader: _Reader, number: int) -> None:
        store = self._batches.store
        try:
            if not reader.connection.poll(self._timeout_s):
                state = reader.state()
                os.kill(reader.pid, signal.SIGQUIT)  # it prints where it is, if it can
                time.sleep(0.5)
                raise UserError(
                    f"{store.path}: no batch for {self._timeout_s:g} s (timeout_s): the reader of latents, "
                    f"process {reader.pid}, {state}; {_contents(self._batches, number)}"
                )
            answer = reader.connection.recv()
        except (EOFError, ConnectionError) as error:
            raise UserError(f"{store.path}: {self._lost(reader)}") from error
        if answer is not None:
            kind, text = answer
            raise kind(text)

    def _lost(self, reader: _Reader) -> str:
        """Say what became of a reader."""
        try:
            status = os.waitstatus_to_exitcode(os.waitpid(reader.pid, 0)[1])
        except ChildProcessError:  # somebody else asked
            status = 0
        reader.reaped = True
        how = f"was killed by signal {signal.strsignal(-status)}" if status < 0 else "ended without a word"
        return f"a reader of latents {how} (out of memory?)"
