"""Losses and gradients as one CUDA graph: one launch in place of thousands, and the host is never late."""

from __future__ import annotations

from collections.abc import Callable, Hashable

import torch
from torch import Tensor

from .step import add_gradients
from .task import Batch, Task

Replay = Callable[[], None]
WARM_UP = 3


def capture(work: Callable[[], dict[str, Tensor]]) -> tuple[dict[str, Tensor], Replay]:
    """Do ``work`` a few times, then record what it launches, without doing it.

    Returns:
        Where the results will be, and the call that does the work.
    """
    # Compilation and what libraries do at their first call can't be recorded; off the default stream, as a
    # graph's recording is.
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP):
            work()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    # Other threads (pinned memory, checkpoints) go on using CUDA meanwhile.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        results = work()
    return results, graph.replay


class GraphedGradients:
    """Do :func:`~meduet_fast.engine.step.add_gradients` in one process, captured once and replayed.

    It is captured anew when the task's phase changes. A graph writes to fixed addresses: gradients are made
    here, and must be zeroed in place from then on.

    Args:
        task: on CUDA, not parallelized.
        share: of a batch in the step.
        low: whether autocast to bfloat16 is on.
    """

    def __init__(self, task: Task, share: float = 1.0, low: bool = False) -> None:
        self._task, self._share, self._low = task, share, low
        self._phase: Hashable = self  # of the graph there is: none yet
        self._batch: Batch = {}
        self._losses: dict[str, Tensor] = {}
        self._replay: Replay | None = None
        self._gradients = []
        for parameter in task.trained().parameters():
            if parameter.requires_grad:
                parameter.grad = torch.zeros_like(parameter)
                self._gradients.append(parameter.grad)

    def __call__(self, batch: Batch, step: int, last: bool = True) -> dict[str, Tensor]:
        """Compute the losses of a batch, on the device; all batches have the same entries and shapes."""
        if self._task.phase(step) != self._phase:
            self._capture(batch, step)
        for name, fixed in self._batch.items():
            fixed.copy_(batch[name])
        assert self._replay is not None
        self._replay()
        return {name: loss.clone() for name, loss in self._losses.items()}

    def _capture(self, batch: Batch, step: int) -> None:
        """Capture the graph of a phase at the start of a step, when gradients are zero."""
        self._replay, self._losses = None, {}  # the memory of the graph before
        fixed = self._batch = {name: item.clone() for name, item in batch.items()}
        self._losses, self._replay = capture(
            lambda: add_gradients(self._task, fixed, step, share=self._share, low=self._low)
        )
        self._phase = self._task.phase(step)
        torch._foreach_zero_(self._gradients)
