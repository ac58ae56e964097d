"""Losses and gradients as one CUDA graph: one launch in place of thousands, and the host is never late."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from meduet_fast.pretraining.losses import ObjectiveConfig
from meduet_fast.pretraining.task import PretrainStep, add_gradients

from .precision import Precision

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
    """:func:`~meduet_fast.pretraining.task.add_gradients` of one process, captured once and replayed.

    It is captured anew when the objective changes, as it does when MFTD or SiQC begins. A graph writes to
    fixed addresses: gradients are made here, and must be zeroed in place from then on.

    Args:
        step: on CUDA, not parallelized.
        share: of a batch in the step.
        precision: that ``step`` was made for.
    """

    def __init__(self, step: PretrainStep, share: float = 1.0, precision: Precision = "auto") -> None:
        self._step, self._share, self._precision = step, share, precision
        self._objective: ObjectiveConfig | None = None
        self._inputs: list[Tensor] = []
        self._losses: dict[str, Tensor] = {}
        self._replay: Replay | None = None
        self._gradients = []
        for parameter in step.student.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.zeros_like(parameter)
                self._gradients.append(parameter.grad)

    def __call__(
        self, latents: Tensor, domain: Tensor, mask: Tensor, objective: ObjectiveConfig
    ) -> dict[str, Tensor]:
        """Losses of a batch, on the device; all batches have the same shapes."""
        inputs = (latents, domain, mask)
        if objective != self._objective:
            self._capture(inputs, objective)
        for fixed, item in zip(self._inputs, inputs, strict=True):
            fixed.copy_(item)
        assert self._replay is not None
        self._replay()
        return {name: loss.clone() for name, loss in self._losses.items()}

    def _capture(self, inputs: tuple[Tensor, ...], objective: ObjectiveConfig) -> None:
        """At the start of a step, when gradients are zero."""
        self._replay, self._losses = None, {}  # the memory of the graph before
        latents, domain, mask = self._inputs = [item.clone() for item in inputs]

        def work() -> dict[str, Tensor]:
            return add_gradients(self._step, latents, domain, mask, objective, self._share, self._precision)

        self._losses, self._replay = capture(work)
        self._objective = objective
        torch._foreach_zero_(self._gradients)
