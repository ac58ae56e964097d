"""Requests to stop, from a terminal or a scheduler, and how all processes come to act on one together.

A process may be where no request reaches it: in a message to another process that hangs, in a read or a write
of a disk that does not answer. A thread of its own watches over that. Where a call of C keeps this thread
waiting, too, a small program beside the process sees that nobody takes note of the request.
"""

from __future__ import annotations

import faulthandler
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from threading import Thread, Timer
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

from .checkpoint import last_good
from .distributed import World, launched

SIGNALS = (signal.SIGINT, signal.SIGTERM)
LOOK_S = 0.5  # between two looks of the watching thread
OVER = b"\0"  # no signal's number: tells the thread to end
LAST_WORDS_S = 3.0  # a process that can't even say why it ends does so after that

# The program: the process of that number has SECONDS to read from the pipe what came in it. It lives as long.
WATCHER = """
import os, select, signal, sys, time
pipe, process, seconds, line = int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]), sys.argv[4]
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, signal.SIG_IGN)
def unread():
    return bool(select.select([pipe], [], [], 0)[0])
seen = time.monotonic()
while os.getppid() == process:
    if not unread():
        seen = time.monotonic()
    elif time.monotonic() - seen > seconds:
        os.kill(process, signal.SIGQUIT)
        time.sleep(1)
        if unread() and os.getppid() == process:
            os.write(2, os.fsencode(line))
            os.kill(process, signal.SIGKILL)
    time.sleep(0.2)
"""


class StopRequest:
    """Turn SIGINT and SIGTERM into a request to stop after the step; a second one acts at once.

    Not so under a launcher: it passes on what its scheduler may have sent to all processes already, and kills
    those that take too long by itself.

    A process that comes no further for ``grace_s`` seconds after a request is ended: it prints where each of
    its threads is, and exits with 128 + the signal's number; with 1, if since the request no other thread of
    it could run. If none could when the request came, it is killed. One that comes no further for most of
    ``timeout_s`` prints that too, before the others give it up, and one that reads a batch itself for longer
    is ended, with exit code 2. SIGQUIT prints it at any time.

    Args:
        output: the run's folder.
        grace_s: seconds for a step, and for a checkpoint, after a request.
        timeout_s: seconds after which other processes give this one up.
    """

    def __init__(self, output: Path, grace_s: float, timeout_s: float) -> None:
        self.signal: signal.Signals | None = None
        self.tell: Callable[[str], None] | None = None  # the other processes, why this one ends
        self.reading: Callable[[], tuple[float, str] | None] = lambda: None  # since when this one reads what
        self._output, self._grace_s, self._timeout_s = output, grace_s, timeout_s
        self._doing, self._since, self._looked_at = "the start", time.monotonic(), ""
        self._previous: dict[signal.Signals, Any] = {}
        self._armed = False

    def __enter__(self) -> StopRequest:
        faulthandler.register(signal.SIGQUIT, file=2)
        for number in SIGNALS:
            self._previous[number] = signal.signal(number, self._request)
        # Python's own handlers wait for the main thread; this pipe is written to by the system's.
        self._received, self._wakeup = os.pipe()
        os.set_blocking(self._wakeup, False)
        self._previous_wakeup = signal.set_wakeup_fd(self._wakeup, warn_on_full_buffer=False)
        self._watching = Thread(target=self._watch, name="watch", daemon=True)
        self._watching.start()
        self._watcher = self._start_watcher()
        return self

    def __exit__(self, *_: object) -> None:
        signal.set_wakeup_fd(self._previous_wakeup)
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        os.write(self._wakeup, OVER)  # to close it would not do: forked readers have it, too
        self._watching.join()
        if self._watcher is not None:
            self._watcher.kill()
            self._watcher.wait()
        if self._armed:
            faulthandler.cancel_dump_traceback_later()
        os.close(self._wakeup)
        os.close(self._received)

    def _start_watcher(self) -> subprocess.Popen[bytes] | None:
        """Start the program that ends this process where none of its threads runs; None: no room for it."""
        seconds = self._grace_s + 2 * LAST_WORDS_S
        line = (
            f"{self._output}: killed, because no thread of it could run for {seconds:g} s after a request to "
            f"stop (grace_s); its checkpoints are in {self._output / 'checkpoints'}\n"
        )
        arguments = [str(self._received), str(os.getpid()), str(seconds), line]
        with suppress(OSError):
            return subprocess.Popen(
                [sys.executable, "-ISc", WATCHER, *arguments],
                stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, pass_fds=[self._received],
                start_new_session=True,  # the scheduler's signals are not for it
            )  # fmt: skip
        return None

    def at(self, doing: str) -> None:
        """Say what the run does from now on: it comes further."""
        self._doing, self._since = doing, time.monotonic()
        if self._armed:
            self._arm()

    def _arm(self) -> None:
        """Have this process ended where a call of C keeps all of Python waiting, the watching thread too."""
        self._armed = True
        faulthandler.dump_traceback_later(self._grace_s + 2 * LAST_WORDS_S, exit=True, file=2)

    def _request(self, number: int, frame: FrameType | None) -> None:
        self.signal = signal.Signals(number)
        if not launched():
            signal.signal(number, self._previous[self.signal])

    def _watch(self) -> None:
        requests: list[tuple[int, float]] = []
        while True:
            if select.select([self._received], [], [], LOOK_S)[0]:
                numbers = os.read(self._received, 100)
                if OVER in numbers:
                    return
                requests.extend((number, time.monotonic()) for number in numbers if number in SIGNALS)
                if requests and not self._armed:
                    self._arm()
            doing, since, now = self._doing, self._since, time.monotonic()
            if requests:
                number, asked = requests[0]
                name = signal.Signals(number).name
                if now - max(asked, since) > self._grace_s:
                    self._end(
                        128 + number, f"{doing} was not over {self._grace_s:g} s after {name} (grace_s)"
                    )
                # Where it can, the main thread acts on the second request by itself.
                if len(requests) > 1 and not launched() and now - requests[1][1] > LAST_WORDS_S:
                    second = signal.Signals(requests[1][0]).name
                    self._end(128 + number, f"{second} came, the second request, and {doing} was not over")
            if now - since > 0.9 * self._timeout_s and self._looked_at != doing:
                self._looked_at = doing
                _say(f"{self._output}: {doing} is not over after {now - since:.0f} s; where each thread is:")
                faulthandler.dump_traceback(file=2)
            reading = self.reading()
            if reading is not None and now - reading[0] > self._timeout_s:
                self._end(2, f"no batch was read for {self._timeout_s:g} s (timeout_s), {reading[1]}")

    def _end(self, code: int, why: str) -> None:
        """End this process, whatever its main thread waits for."""
        Timer(LAST_WORDS_S, os._exit, (code,)).start()
        faulthandler.dump_traceback(file=2)
        _say(f"{self._output}: ended, because {why}; {last_good(self._output / 'checkpoints')}")
        if self.tell is not None:
            with suppress(dist.DistError):
                self.tell(why)
        os._exit(code)


def _say(line: str) -> None:
    os.write(2, f"{line}\n".encode())  # whoever hangs may hold the lock of sys.stderr


class Agreement:
    """Tell all processes at the same step what any of them asks for.

    Requests travel while a step is computed: with several processes they arrive a step late, and nobody
    waits for them.
    """

    def __init__(self, world: World) -> None:
        self._world = world
        # One tensor for all steps: gloo's threads may let go of it later than this one.
        self._flags = torch.tensor([0, 0, 1])
        self._under_way: dist.Work | None = None

    def receive(self) -> None:
        """Take in what is on its way: before anything else is sent in group ``control``, and at the end."""
        if self._under_way is not None:
            self._under_way.wait()
            self._under_way = None

    def exchange(
        self, stop: signal.Signals | None, failed: bool, written: bool
    ) -> tuple[signal.Signals | None, bool]:
        """Exchange requests, once a step in all processes.

        Args:
            stop: the signal that this process got.
            failed: whether a checkpoint that this process writes in the background has failed.
            written: whether this process's part of it is done.

        Returns:
            The signal that any process got; whether all should finish the checkpoint, because it failed in
            one or is written in all.
        """
        if not self._world.grouped:
            return stop, failed or written
        self.receive()
        heard, any_failed, any_writes = self._flags.tolist()
        if not heard:  # else this was the last step
            self._flags.copy_(torch.tensor([int(stop or 0), int(failed), int(not written)]))
            self._under_way = dist.all_reduce(
                self._flags, dist.ReduceOp.MAX, self._world.control, async_op=True
            )
        return signal.Signals(heard) if heard else None, bool(any_failed or not any_writes)
