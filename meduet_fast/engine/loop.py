"""The training loop of every task; it reads top to bottom."""

from __future__ import annotations

import json
import math
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

from meduet_fast.errors import UserError
from meduet_fast.files import atomic_path, remove_leftovers
from meduet_fast.layers import set_attention_backend
from meduet_fast.lock import FolderLock
from meduet_fast.progress import ProgressBar

from .checkpoint import CheckpointWriter, describe_start, find_start, last_good, load_checkpoint, read_run
from .config import EngineConfig
from .cuda_graph import GraphedGradients
from .distributed import World, join_world
from .loggers import require_loggers
from .metrics import RunLog
from .optimizer import build_optimizer
from .parallel import parallelize
from .precision import low_precision
from .prefetch import prefetch
from .step import Backward, StepValues, add_gradients, train_step
from .stop import Agreement, StopRequest
from .task import Batches, Task

RUN_FILE = "run.json"


@dataclass(frozen=True)
class FitResult:
    """How a run ended.

    Attributes:
        step: steps done.
        finished: whether that is all of them.
        stopped_by: the signal that stopped it, or None.
        rank: which of the run's processes says so.
    """

    step: int
    finished: bool
    stopped_by: signal.Signals | None = None
    rank: int = 0


def fit(
    make: Callable[[], tuple[Task, Batches]],
    config: EngineConfig,
    output: Path,
    resume: bool = False,
) -> FitResult:
    """Train a task.

    SIGINT and SIGTERM write a checkpoint and end the run; one that hangs they end, too, see
    :class:`StopRequest`. All processes that torchrun started call this alike.

    Args:
        make: builds the task, on the CPU, and opens its data; called once, with the random generator seeded.
        config: settings.
        output: the run's folder: ``checkpoints/``, ``metrics.jsonl`` (of rank 0; the others have
            ``metrics.rankN.jsonl``), ``tensorboard/``, ``run.json``.
        resume: go on from the last checkpoint, if there is one; the result is that of a run never stopped, on
            another number of processes to rounding.

    Raises:
        UserError: for bad settings, data that do not fit or can't be read, a folder in use, a non-finite
            loss, a full disk, a lost process, a killed reader.
    """
    # The request first: a launcher that ends this process while it finds out what happened must not win.
    with (
        StopRequest(output, config.grace_s, config.timeout_s) as stop,
        join_world(config.device, config.timeout_s) as world,
        _in_one_line(output),
        FolderLock(output) if world.rank == 0 else nullcontext() as lock,
    ):
        stop.tell = world.fail
        set_attention_backend(config.attention, world.device)
        require_loggers(config.loggers)
        torch.manual_seed(config.seed)
        task, data = make()
        stop.reading = data.reading
        world.require_same("the weights that the run begins from", json.dumps(task.init))
        checkpoint = find_start(output, config, world.size, data.identity, resume)
        start = read_run(checkpoint)["step"] if checkpoint else 0
        world.barrier()  # all have looked before anything is written
        if start >= config.steps:
            return FitResult(start, finished=True, rank=world.rank)

        model = parallelize(task.to(world.device), config, world)
        optimizer = build_optimizer(task.trained(), task.adamw)
        if checkpoint:
            load_checkpoint(checkpoint, task, optimizer, world)
            if world.rank == 0:
                print(describe_start(checkpoint, config, task.adamw, world.size), file=sys.stderr)
        backward = backward_of(model, config, world)
        per_step = config.accumulate * world.size
        stream = data.read(
            start * per_step, config.steps * per_step, world.rank, world.size, world.device.type == "cuda"
        )
        batches = prefetch(stream, world.device) if world.device.type == "cuda" else stream
        if world.rank == 0:
            (output / "checkpoints").mkdir(parents=True, exist_ok=True)
            remove_leftovers(output / "checkpoints")  # of killed writers
            record = {
                "data": str(data.path.resolve()), "config": asdict(config), "init": task.init, **data.record
            }  # fmt: skip
            with atomic_path(output / RUN_FILE) as temporary:
                temporary.write_text(json.dumps(record, indent=1))
        world.barrier()

        done = saved = start
        pending: StepValues | None = None
        stopped: signal.Signals | None = None
        agreement = Agreement(world)
        every = config.flat() | {"processes": world.size}
        settings = {
            "config": config.identity(world.size), "settings": every, "data": data.identity, "init": task.init
        }  # fmt: skip
        writer = CheckpointWriter(
            output / "checkpoints", settings, config.keep_checkpoints, world, lock, config.async_checkpoints
        )
        with (
            writer,
            RunLog(output, start, task, config, world) as log,
            ProgressBar(task.title, config.steps, "step", start, world.rank == 0) as bar,
        ):

            def report(values: StepValues) -> None:
                checked = _finite(values, data, output, writer)
                bar.update(1, log.report(values.step, checked, values.waited, values.done_at))

            while done < config.steps and stopped is None:
                stop.at(f"step {done}")
                values = train_step(task, backward, optimizer, batches, done, config, world)
                done += 1
                agreement.receive()
                # The previous step's values have arrived meanwhile: reading them costs no waiting.
                if pending is not None:
                    report(pending)
                pending = values
                if done % config.checkpoint_every == 0:
                    report(pending)  # only a state after finite steps may be kept
                    pending = None
                    stop.at(f"checkpoint {done}")
                    writer.save(done, task, optimizer)
                    saved = done
                world.look_at_store()
                if lock is not None:
                    lock.check()
                stopped, finish = agreement.exchange(stop.signal, writer.failed(), writer.written())
                if finish and done != saved:  # else said of the checkpoint before
                    writer.finish()
            stop.at(f"the end after step {done - 1}, with its checkpoint,")
            agreement.receive()
            if pending is not None:
                report(pending)
            if done > saved:
                writer.save(done, task, optimizer)
            writer.finish()
        return FitResult(done, done == config.steps, stopped, world.rank)


def backward_of(model: torch.nn.Module, config: EngineConfig, world: World) -> Backward:
    """Return what adds a batch's gradients and gives its losses.

    Args:
        model: a task, as :func:`~meduet_fast.engine.parallel.parallelize` left it.

    Raises:
        UserError: for a CUDA graph where there can't be one.
    """
    share, low = 1 / config.accumulate, low_precision(config.precision, world.device)
    if not config.cuda_graph:
        return partial(add_gradients, model, share=share, low=low)
    refuse_graph(world.device, world.size, world.grouped)
    assert isinstance(model, Task)  # nothing is around it
    return GraphedGradients(model, share, low)


def refuse_graph(device: torch.device, processes: int, grouped: bool) -> None:
    """Refuse a CUDA graph where there can't be one.

    Raises:
        UserError: on another device than a GPU, or if a launcher started the process.
    """
    if grouped or device.type != "cuda":
        raise UserError(
            "cuda_graph is for one GPU, without torchrun: "
            f"found device {device}, {processes} process{'es' * (processes > 1)}"
        )


def _finite(pending: StepValues, data: Batches, output: Path, writer: CheckpointWriter) -> dict[str, float]:
    """Fetch a step's values and refuse non-finite ones."""
    values = pending.fetch()
    bad = [name for name, value in values.items() if not math.isfinite(value)]  # terms before their total
    if bad == ["grad_norm"] and dist.is_initialized():
        raise UserError(
            f"{output}: stopped at step {pending.step}: grad_norm is {values['grad_norm']}, though this "
            "process's losses are finite; see what the others say"
        )
    if bad:
        writer.rescue()  # it may be the last good one
        names = sorted({name for part in pending.volumes for name in data.names(part)})
        raise UserError(
            f"{output}: stopped at step {pending.step}: {bad[0]} is {values[bad[0]]}"
            + (f" (and {', '.join(bad[1:])})" if bad[1:] else "")
            + (f"; volumes in the batch: {', '.join(names)}" if names else "")
            + f"; {last_good(output / 'checkpoints')}"
        )
    return values


@contextmanager
def _in_one_line(output: Path) -> Iterator[None]:
    """Turn what the operating system raises into a user's error that names the run."""
    try:
        yield
    except OSError as error:
        what = error.strerror or str(error)
        raise UserError(f"{output}: {what}; {last_good(output / 'checkpoints')}") from error
