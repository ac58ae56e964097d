"""One optimiser step, which never waits for the device."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from .config import EngineConfig
from .distributed import World
from .optimizer import clip_gradients, learning_rate
from .task import VOLUME, Batch, Task

Backward = Callable[[Batch, int, bool], dict[str, Tensor]]  # batch, step, whether it is the step's last


@dataclass
class StepValues:
    """Values of one step, on their way from the device.

    Attributes:
        step: which step.
        names: of the values.
        values: (len(names),) float32 on the host; valid once ``ready`` has happened.
        volumes: ids of the volumes in the step's batches.
        waited: seconds that the step waited for data.
        done_at: ``time.perf_counter()`` when the host was through with the step; when the device was, if it
            was found to be still at it.
        ready: the copy's event; None where there is nothing to wait for.
    """

    step: int
    names: Sequence[str]
    values: Tensor
    volumes: list[Tensor]
    waited: float
    done_at: float
    ready: torch.cuda.Event | None

    def fetch(self) -> dict[str, float]:
        """Return the values; waits for the copy, which is long over a step later."""
        if self.ready is not None and not self.ready.query():
            self.ready.synchronize()
            self.done_at = time.perf_counter()
        return dict(zip(self.names, self.values.tolist(), strict=True))


def send_values(step: int, values: dict[str, Tensor], volumes: list[Tensor], waited: float) -> StepValues:
    """Start the copy of scalar tensors to the host without waiting for it."""
    stacked = torch.stack([value.detach().float() for value in values.values()])
    if not stacked.is_cuda:
        return StepValues(step, list(values), stacked, volumes, waited, time.perf_counter(), None)
    host = torch.empty(stacked.shape, dtype=stacked.dtype, pin_memory=True)
    host.copy_(stacked, non_blocking=True)
    ready = torch.cuda.Event()
    ready.record()
    return StepValues(step, list(values), host, volumes, waited, time.perf_counter(), ready)


def add_gradients(
    model: nn.Module, batch: Batch, step: int, last: bool = True, share: float = 1.0, low: bool = False
) -> dict[str, Tensor]:
    """Compute the losses of one batch; gradients grow by ``share`` of theirs.

    Args:
        model: a task, as :func:`~meduet_fast.engine.parallel.parallelize` left it.
        batch: as :meth:`Task.prepare` gave it.
        step: number of the step.
        last: whether it is the step's last batch; the others' gradients stay in their process.
        share: of this batch in the step.
        low: whether autocast to bfloat16 is on.

    Returns:
        The losses, detached.
    """
    device = next(iter(batch.values())).device
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(last)
    with model.no_sync() if isinstance(model, DistributedDataParallel) and not last else nullcontext():
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


def batch_generator(seed: int, number: int, device: torch.device | str = "cpu") -> torch.Generator:
    """Return the random numbers of a batch: a function of the run's seed and its number in the stream alone.

    Args:
        seed: 0 to 2^64 - 1.
        number: 0 to 2^40 - 1.
        device: where the numbers are drawn.
    """
    own = (seed << 40) + number
    if own >= 1 << 64:  # PyTorch's seeds have 64 bits
        own = int.from_bytes(hashlib.sha256(f"{seed} {number}".encode()).digest()[:8], "little")
    return torch.Generator(device).manual_seed(own)


def train_step(
    task: Task,
    backward: Backward,
    optimizer: torch.optim.Optimizer,
    batches: Iterator[Batch],
    step: int,
    config: EngineConfig,
    world: World,
) -> StepValues:
    """Do one optimiser step.

    Args:
        task: what is trained.
        backward: adds a batch's gradients and gives its losses.
        optimizer: of :meth:`Task.trained`.
        batches: this process's share of the stream, at the step's place, on the device.
        step: its number.
        config: of the run.
        world: the processes of the run.

    Returns:
        The step's losses in this process, gradient norm and learning rate, on their way to the host.
    """
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
        number = (step * config.accumulate + turn) * world.size + world.rank
        batch = task.prepare(batch, batch_generator(config.seed, number, world.device))
        losses = backward(batch, step, turn + 1 == config.accumulate)
        for name, loss in losses.items():
            sums[name] = sums.get(name, 0) + loss / config.accumulate
    sums["grad_norm"] = update(task, optimizer, step, keep_gradients=config.cuda_graph)
    sums["learning_rate"] = sums["grad_norm"].new_full((), rate)  # new_tensor would wait for the device
    return send_values(step, sums, volumes, waited)
