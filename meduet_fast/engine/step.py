"""One optimiser step, which never waits for the device."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from .config import EngineConfig
from .distributed import World
from .metrics import StepValues, send_values
from .optimizer import clip_gradients, learning_rate
from .parallel import inner_task, without_reduction
from .task import VOLUME, Batch, Task

Backward = Callable[[Batch, int], dict[str, Tensor]]


def add_gradients(
    model: nn.Module, batch: Batch, step: int, share: float = 1.0, low: bool = False
) -> dict[str, Tensor]:
    """Compute the losses of one batch; gradients grow by ``share`` of theirs.

    Args:
        model: a task, as :func:`~meduet_fast.engine.parallel.parallelize` left it.
        batch: as :meth:`Task.prepare` gave it.
        step: number of the step.
        share: of this batch in the step.
        low: whether autocast to bfloat16 is on.

    Returns:
        The losses, detached.
    """
    device = next(iter(batch.values())).device
    with torch.autocast(device.type, torch.bfloat16, enabled=low):
        losses = model(batch, step)
    (losses["total"] * share).backward()
    return {name: loss.detach() for name, loss in losses.items()}


def update(task: Task, optimizer: torch.optim.Optimizer, step: int, keep_gradients: bool = False) -> Tensor:
    """Clip the gradients, use them up, and let the task do what follows.

    Args:
        keep_gradients: zero their memory and do not free it, for a CUDA graph writes to fixed addresses.

    Returns:
        The gradient's norm before clipping, a scalar on the device.
    """
    norm = clip_gradients(task.trained(), task.adamw.clip_norm)
    optimizer.step()
    optimizer.zero_grad(set_to_none=not keep_gradients)
    task.after_step(step)
    return norm


def train_step(
    model: nn.Module,
    backward: Backward,
    optimizer: torch.optim.Optimizer,
    batches: Iterator[Batch],
    step: int,
    config: EngineConfig,
    world: World,
) -> StepValues:
    """Do one optimiser step.

    Args:
        model: a task, as :func:`~meduet_fast.engine.parallel.parallelize` left it.
        backward: adds a batch's gradients and gives its losses.
        optimizer: of :meth:`Task.trained`.
        batches: this process's share of the stream, at the step's place, on the device.
        step: its number.
        config: of the run.
        world: the processes of the run.

    Returns:
        The step's losses in this process, gradient norm and learning rate, on their way to the host.
    """
    task = inner_task(model)
    rate = learning_rate(step, config.steps, task.adamw)
    for group in optimizer.param_groups:
        group["lr"] = rate
    sums: dict[str, Tensor] = {}
    volumes, waited = [], 0.0
    for turn in range(config.accumulate):
        began = time.perf_counter()
        batch = next(batches)
        waited += time.perf_counter() - began
        if VOLUME in batch:
            volumes.append(batch.pop(VOLUME))
        # Random numbers depend on the batch's number in the stream alone.
        number = (step * config.accumulate + turn) * world.size + world.rank
        batch = task.prepare(batch, torch.Generator(world.device).manual_seed((config.seed << 40) + number))
        last = turn + 1 == config.accumulate
        with nullcontext() if last else without_reduction(model):
            losses = backward(batch, step)
        for name, loss in losses.items():
            sums[name] = sums.get(name, 0) + loss / config.accumulate
    sums["grad_norm"] = update(task, optimizer, step, keep_gradients=config.cuda_graph)
    sums["learning_rate"] = sums["grad_norm"].new_full((), rate)  # new_tensor would wait for the device
    return send_values(step, sums, volumes, waited)
