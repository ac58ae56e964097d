"""The steps of a run on CUDA, for tests of tasks."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from meduet_fast.engine import Batch, EngineConfig, Task
from meduet_fast.engine.distributed import World
from meduet_fast.engine.loop import backward_of
from meduet_fast.engine.optimizer import build_optimizer
from meduet_fast.engine.parallel import parallelize
from meduet_fast.engine.prefetch import prefetch
from meduet_fast.engine.step import StepValues, train_step

DEVICE = torch.device("cuda")


def steps_of(task: Task, config: EngineConfig, stream: Iterator[Batch]) -> Callable[[int], StepValues]:
    """Return the step of a task that is on the device, by number; its batches are those of a stream."""
    world = World(DEVICE)
    model = parallelize(task, config, world)
    backward, optimizer = backward_of(model, config, world), build_optimizer(task.trained(), task.adamw)
    batches = prefetch(stream, DEVICE)
    return lambda number: train_step(task, backward, optimizer, batches, number, config, world)


def require_no_waiting(step: Callable[[int], StepValues]) -> None:
    """Fail where one of three steps waits for the device, or gives losses that are not finite."""
    for number in range(3):  # kernels, the graph, positions and the optimiser's state are made at first
        step(number)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        values = [step(number) for number in range(3, 6)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.tensor(list(value.fetch().values())).isfinite().all() for value in values)
