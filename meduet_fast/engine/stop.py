"""Requests to stop, from a terminal or a scheduler, and how all processes come to act on one together."""

from __future__ import annotations

import signal
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

from .distributed import World, launched


class StopRequest:
    """Turn SIGINT and SIGTERM into a request to stop after the step; a second one acts at once.

    Not so under a launcher: it passes on what its scheduler may have sent to all processes already, and kills
    those that take too long by itself.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopRequest:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._request)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _request(self, number: int, frame: FrameType | None) -> None:
        self.signal = signal.Signals(number)
        if not launched():
            signal.signal(number, self._previous[self.signal])


class Agreement:
    """Tell all processes at the same step what any of them asks for.

    Requests travel while a step is computed: with several processes they arrive a step late, and nobody
    waits for them.
    """

    def __init__(self, world: World) -> None:
        self._world = world
        self._sent: tuple[torch.Tensor, dist.Work] | None = None

    def exchange(self, stop: signal.Signals | None, look: bool) -> tuple[signal.Signals | None, bool]:
        """Exchange requests, once a step in all processes.

        Args:
            stop: the signal that this process got.
            look: whether this process wants all to look at their checkpoint's writer.

        Returns:
            The same of any process.
        """
        if not self._world.grouped:
            return stop, look
        heard = [0, 0]
        if self._sent is not None:
            flags, work = self._sent
            work.wait()
            heard = flags.tolist()
        self._sent = None
        if not heard[0]:  # else this was the last step
            flags = torch.tensor([int(stop or 0), int(look)])
            sent = dist.all_reduce(flags, dist.ReduceOp.MAX, self._world.control, async_op=True)
            self._sent = (flags, sent)
        return signal.Signals(heard[0]) if heard[0] else None, bool(heard[1])

    def settle(self) -> None:
        """Take in what is still on its way, at the end of the run."""
        if self._sent is not None:
            self._sent[1].wait()
            self._sent = None
