"""Read and transform volumes in processes of their own, ahead of the encoder.

A process has one volume at a time and keeps it until it is asked for, which bounds memory. The processes are
programs of their own, and no forks of this one, which may have threads and a GPU, and begin within half a
second, since reading needs neither torch nor MONAI; images come back through a socket and need no shared
memory. Of a process that is killed its volume alone is lost.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from threading import Thread

import numpy as np

from meduet_fast.data.sources import VolumeEntry
from meduet_fast.data.transforms import PreparedVolume, TransformConfig, content_key, load_volume
from meduet_fast.errors import UserError, VolumeError, failures_of

# With the same paths as here: a working directory may hold other modules of the same names.
PROGRAM = "import sys; sys.path[:] = sys.argv[2:]; from meduet_fast.prepare.load_ahead import serve; serve()"
THREADS = (
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS",
)


@dataclass(frozen=True)
class Loader:
    """Load volumes with their content keys, all with the same settings.

    Attributes:
        transform: grid of the prepared images.
        tokenizer: identity of what will encode them.
    """

    transform: TransformConfig
    tokenizer: str

    def key(self, volume: VolumeEntry) -> str:
        """Compute a volume's content key.

        Raises:
            VolumeError: whatever goes wrong; what nobody foresaw is told with its type and place.
        """
        with failures_of(volume.path):
            return content_key(volume, self.transform, self.tokenizer)

    def load(self, volume: VolumeEntry) -> tuple[str, PreparedVolume]:
        """Compute a volume's content key and load it; raises as :meth:`key` does."""
        with failures_of(volume.path):
            return content_key(volume, self.transform, self.tokenizer), load_volume(volume, self.transform)


Loaded = tuple[str, PreparedVolume]  # content key and image


def load_ahead(
    volumes: Sequence[VolumeEntry], loader: Loader, processes: int
) -> Iterator[tuple[VolumeEntry, Loaded | VolumeError]]:
    """Load volumes in ``processes`` processes of one thread each, and yield them as they become ready.

    Closing the iterator ends the processes; they end with this one, too, however it ends.

    Raises:
        UserError: a process ended by itself, for a reason that it printed.
    """
    waiting = deque(volumes)
    busy: dict[Connection, tuple[_Process, VolumeEntry]] = {}
    try:
        while waiting and len(busy) < processes:
            process, volume = _Process(loader), waiting.popleft()
            busy[process.connection] = process, volume
            process.send(volume)
        while busy:
            for connection in wait(list(busy)):
                assert isinstance(connection, Connection)
                process, volume = busy[connection]
                outcome: Loaded | VolumeError
                killed = False
                try:
                    outcome = _receive(connection)
                except (EOFError, OSError):
                    outcome, killed = VolumeError(volume.path, process.last_words()), True
                del busy[connection]
                if killed or not waiting:
                    process.end()
                if waiting:  # before the encoder has its turn
                    process, following = _Process(loader) if killed else process, waiting.popleft()
                    busy[process.connection] = process, following
                    process.send(following)
                yield volume, outcome
    finally:
        for process, _ in busy.values():
            process.end()


class _Process:
    """A program that loads one volume after another, see :func:`serve`."""

    def __init__(self, loader: Loader) -> None:
        self.connection, theirs = Pipe()
        environment = {**os.environ, **dict.fromkeys(THREADS, "1"), "CUDA_VISIBLE_DEVICES": ""}
        self._process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(theirs.fileno()), *sys.path],
            stdin=subprocess.PIPE,  # never written to; it closes when this process ends
            pass_fds=[theirs.fileno()],
            env=environment,
            start_new_session=True,  # Ctrl-C in a terminal reaches this process alone, which then ends them
        )
        theirs.close()
        self.send(loader)

    def send(self, item: Loader | VolumeEntry) -> None:
        """Send the loader, then one volume after another."""
        with suppress(OSError):  # it has ended; who receives from it is told
            self.connection.send(item)

    def last_words(self) -> str:
        """Say how the process ended, which it has.

        Raises:
            UserError: it was not killed.
        """
        code = self._process.wait()
        if code >= 0:
            raise UserError(
                f"a process that reads volumes ended with exit code {code} (see above); try --workers 0"
            )
        name = signal.Signals(-code).name
        memory = " (out of memory? fewer --workers need less)" if name == "SIGKILL" else ""
        return f"the process that read it was killed by {name}{memory}"

    def end(self) -> None:
        """End the process, whatever it does."""
        self._process.kill()
        self._process.wait()
        self.connection.close()
        assert self._process.stdin is not None
        self._process.stdin.close()


def _receive(connection: Connection) -> Loaded | VolumeError:
    """Receive what :func:`serve` sent: what is small, then the image, which is not copied on its way."""
    answer = connection.recv()
    if len(answer) == 2:
        return VolumeError(*answer)
    key, shape, affine, spacing, intensity, scan = answer
    voxels = np.empty(shape, dtype=np.float32)  # (X, Y, Z)
    connection.recv_bytes_into(voxels.data.cast("B"))
    return key, PreparedVolume(voxels, affine, spacing, intensity, scan)


def serve() -> None:
    """Load the volumes that come through the connection numbered by the first argument, until it closes."""
    connection = Connection(int(sys.argv[1]))
    Thread(target=_end_with_parent, daemon=True).start()
    try:
        loader = connection.recv()
        while True:
            volume = connection.recv()
            try:
                key, loaded = loader.load(volume)
            except VolumeError as error:
                connection.send((str(error.path), error.reason))
                continue
            facts = loaded.affine, loaded.spacing, loaded.intensity, loaded.scan
            connection.send((key, loaded.voxels.shape, *facts))
            connection.send_bytes(loaded.voxels.data.cast("B"))
    except (EOFError, OSError):
        return


def _end_with_parent() -> None:
    os.read(0, 1)  # not sys.stdin, whose lock a process that fails could not take to end
    os._exit(1)
