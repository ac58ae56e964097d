"""Checkpoints: whole or absent, the last few kept, everything in them that an exact resume needs.

::

    RUN/checkpoints/<step>/state/                PyTorch distributed checkpoint: weights and AdamW's moments
    RUN/checkpoints/<step>/<name>.safetensors    the task's exports, for everybody else
    RUN/checkpoints/<step>/run.json              step, settings and data: what a resumed run must have too

Every process writes its part, and any number of processes can read it. Random numbers need no place: they
are a function of the seed and of the number of a batch. Checkpoints hold tensors and JSON alone, and are read
without unpickling objects: anybody's can be loaded.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
import uuid
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.checkpoint.storage import WriteResult
from torch.distributed.checkpoint.utils import _DistWrapper
from torch.distributed.tensor import DTensor

from meduet_fast.errors import UserError
from meduet_fast.files import atomic_path
from meduet_fast.lock import FolderLock

from .checkpoint_index import IndexedReader, IndexedWriter
from .config import BATCHES_OF_A_STEP, AdamWConfig, EngineConfig
from .distributed import World, lost_contact
from .optimizer import learning_rate
from .task import Task

Exports = Mapping[str, Mapping[str, Tensor]]  # state of every module that is exported, on rank 0


def _state(task: Task, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Return the task's parameters and buffers and AdamW's moments, as they are distributed.

    AdamW's settings come from the configuration.
    """
    return {**task.state_dict(), "optimizer": get_optimizer_state_dict(task.trained(), optimizer)["state"]}


def checkpoint_steps(folder: Path) -> list[int]:
    """List the steps of the complete checkpoints in ``RUN/checkpoints``, ascending."""
    if not folder.is_dir():
        return []
    return sorted(int(item.name) for item in folder.iterdir() if item.name.isdigit())


def latest_checkpoint(run: Path) -> Path:
    """Find the newest checkpoint of a run.

    Raises:
        UserError: if there is none.
    """
    folder = run / "checkpoints"
    steps = checkpoint_steps(folder)
    if not steps:
        raise UserError(f"{folder}: no checkpoint found; `meduet-fast pretrain` writes them")
    return folder / str(steps[-1])


def last_good(folder: Path) -> str:
    """Say, for messages, what is left to go on from."""
    steps = checkpoint_steps(folder)
    return f"the last good checkpoint is {folder / str(steps[-1])}" if steps else "there is no checkpoint yet"


@contextmanager
def _one_process() -> Iterator[None]:
    """Silence PyTorch's warning that it saves as a single process, which is what is meant."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        yield


def _whole(module: nn.Module, rank: int) -> dict[str, Tensor]:
    """Copy a module's state to the host of rank 0, put together from its shards; all processes take part."""
    parts: dict[str, Tensor] = {}
    for key, value in module.state_dict().items():
        value = value.full_tensor() if isinstance(value, DTensor) else value
        if rank == 0:
            parts[key] = value.detach().to("cpu", copy=True)
    return parts


class _Planning(_DistWrapper):
    """Exchange plans with process 0 directly, and not along the trees of broadcasts; see ``_join``."""

    def broadcast_object(self, object: Any) -> Any:
        """Send a small object of process 0 to all."""
        return self.all_gather_object(object)[0]

    def scatter_object(self, object_list: list[Any] | None) -> Any:
        """Send each process its own object of process 0's list."""
        if not self.use_dist:
            return super().scatter_object(object_list)
        packed = [bytearray(pickle.dumps(item)) for item in object_list or ()]
        size = torch.tensor([max(map(len, packed), default=0)])
        dist.all_reduce(size, dist.ReduceOp.MAX, self.group)  # round the ring, and no broadcast
        parts = [torch.frombuffer(item.ljust(int(size), b"\0"), dtype=torch.uint8) for item in packed]
        own = torch.empty(int(size), dtype=torch.uint8)
        dist.scatter(own, parts or None, self.global_coordinator_rank, self.group)
        return pickle.loads(own.numpy().tobytes())  # what follows its end is not read


class _Snapshot(DefaultSavePlanner):
    """Plan who writes what; with ``copy``, hand out values as they were when the plan was made.

    Attributes:
        abandoned: set it, and the write ends with its next value.
    """

    def __init__(self, copy: bool, cache: str) -> None:
        # What each process writes is the same every time: it is sent and compared once. PyTorch keeps it
        # with the class, by default for all runs of a process together.
        super().__init__(enable_plan_caching=True)
        self._cached_plans_key = cache
        self._copy, self._values, self.abandoned = copy, dict[MetadataIndex, Any](), False

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        """Take in this process's part of the plan."""
        plan = super().finish_plan(new_plan)
        if self._copy:
            for item in plan.items:
                value = super().resolve_data(item)
                assert isinstance(value, Tensor), item.index
                self._values[item.index] = value.to("cpu", copy=True)
        return plan

    def resolve_data(self, write_item: WriteItem) -> Any:
        """Return a value to write."""
        if self.abandoned:
            raise InterruptedError("the run failed meanwhile")
        return self._values[write_item.index] if self._copy else super().resolve_data(write_item)


def _forget_plans(cache: str) -> None:
    """Drop what planners of a run keep, or half of it where planning failed."""
    caches: list[dict[str, Any]] = [
        SavePlanner._cached_save_plan, SavePlanner._cached_final_save_plan, SavePlanner._cached_all_plans,
        SavePlanner._cached_global_plan, SavePlanner._cached_metadata,
    ]  # fmt: skip
    for kept in caches:
        kept.pop(cache, None)


@dataclass
class _Write:
    """A checkpoint that is being written; ``results`` waits for this process's part."""

    step: int
    planner: _Snapshot
    storage: IndexedWriter
    metadata: Metadata | None  # on rank 0
    results: Callable[[], list[WriteResult]]


class CheckpointWriter:
    """Write checkpoints of one run, one after the other; a context manager, behind which nothing is written.

    A thread that writes in the background sends nothing to other processes and has no part of the model: all
    messages, and the copy, are the main thread's.

    Args:
        folder: ``RUN/checkpoints``.
        run: JSON values that a resumed run compares; the step is added.
        keep: checkpoints kept.
        world: the processes that write together.
        lock: of the run's folder, on rank 0: nothing is begun or named once another process took it over.
        in_background: write from a copy, while training goes on.
    """

    def __init__(
        self, folder: Path, run: Mapping[str, Any], keep: int, world: World, lock: FolderLock | None = None,
        in_background: bool = False,
    ) -> None:  # fmt: skip
        self._folder, self._run, self._keep, self._world = folder, run, keep, world
        self._lock, self._cache = lock, uuid.uuid4().hex
        weakref.finalize(self, _forget_plans, self._cache)
        self._thread = ThreadPoolExecutor(1, "checkpoint") if in_background else None
        self._running: Future[list[WriteResult]] | None = None
        self._write: _Write | None = None
        self._all = _Planning(world.writing, world.grouped, 0)

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if isinstance(error, Exception):
                self.rescue()
        finally:  # somebody may interrupt that
            if self._thread is not None:
                if self._write is not None:
                    self._write.planner.abandoned = True
                self._thread.shutdown()

    def save(self, step: int, task: Task, optimizer: torch.optim.Optimizer) -> None:
        """Write ``folder/<step>``, or begin to, and remove all but the last ``keep`` checkpoints.

        Raises:
            UserError: if it, or the one before, cannot be written (a full disk, no permission); earlier
                checkpoints are untouched. If another process took the folder over.
        """
        self.finish()
        self._check_lock()
        exports = {name: _whole(item, self._world.rank) for name, item in task.exports().items()}
        state, first, temporary = _state(task, optimizer), self._world.rank == 0, self._temporary(step)
        planner, metadata = _Snapshot(self._thread is not None, self._cache), None
        with self._in_one_line(step):
            self._world.on_first(partial(_begin, temporary))
            storage = IndexedWriter(temporary / "state")

            def plan_part() -> SavePlan:
                planner.set_up_planner(state, storage.storage_meta(), first)
                storage.set_up_storage_writer(first, rank=self._world.rank, use_collectives=True)
                return storage.prepare_local_plan(planner.create_local_plan())

            def plan_all(parts: list[SavePlan]) -> list[SavePlan]:
                nonlocal metadata
                parts, metadata = planner.create_global_plan(parts)
                return storage.prepare_global_plan(parts)

            plan = planner.finish_plan(self._all.reduce_scatter("plan", plan_part, plan_all))
        write = partial(_write_part, storage, plan, planner, task, exports if first else {}, temporary)
        if self._thread is None:
            self._write = _Write(step, planner, storage, metadata, write)
            self.finish()
        else:
            self._running = self._thread.submit(write)
            self._write = _Write(step, planner, storage, metadata, self._running.result)

    def failed(self) -> bool:
        """Tell whether a write in the background has failed; :meth:`finish` raises why."""
        running = self._running
        return running is not None and running.done() and running.exception() is not None

    def written(self) -> bool:
        """Tell whether this process's part of a write in the background is done; :meth:`finish` ends it."""
        return self._running is not None and self._running.done()

    def finish(self) -> None:
        """Wait for what is being written, and give it its name; all processes call this at the same place.

        Raises:
            UserError: as :meth:`save`.
        """
        write = self._write
        if write is None:
            return
        self._check_lock()

        def complete(results: list[list[WriteResult]]) -> None:
            assert write.metadata is not None
            write.storage.finish(write.metadata, results)
            self._complete(write.step)

        with self._in_one_line(write.step):
            self._all.all_reduce("write", write.results, complete)
        self._write = self._running = None

    def rescue(self) -> None:
        """Finish what is being written before an error ends the run, if no other process is needed for it."""
        if self._world.size == 1:
            with suppress(UserError):  # the run's own error is the one to tell
                self.finish()

    def _check_lock(self) -> None:
        if self._lock is not None:
            self._lock.check()

    def _temporary(self, step: int) -> Path:
        return self._folder / f".{step}.tmp"

    @contextmanager
    def _in_one_line(self, step: int) -> Iterator[None]:
        """Turn what goes wrong while a checkpoint is written into a user's error that names it."""
        try:
            yield
        except (OSError, CheckpointException, RuntimeError) as error:
            self._write = self._running = None
            _forget_plans(self._cache)
            if self._world.rank == 0:
                shutil.rmtree(self._temporary(step), ignore_errors=True)
            if lost_contact(error):
                raise
            raise UserError(
                f"{self._folder / str(step)}: checkpoint not written: {_cause(error, self._world)}; "
                f"{last_good(self._folder)}"
            ) from error

    def _complete(self, step: int) -> None:
        """Add the rest to all processes' parts, and give the checkpoint its name: on rank 0."""
        temporary, target = self._temporary(step), self._folder / str(step)
        text = json.dumps({"step": step, **self._run}, indent=1)
        with atomic_path(temporary / "run.json") as file:
            file.write_text(text, encoding="utf-8")
        if target.exists():
            _discard(target)
        temporary.replace(target)
        for old in checkpoint_steps(self._folder)[: -self._keep]:
            _discard(self._folder / str(old))


def _write_part(
    storage: IndexedWriter,
    plan: SavePlan,
    planner: SavePlanner,
    task: Task,
    exports: Exports,
    temporary: Path,
) -> list[WriteResult]:
    """Write this process's part, and on rank 0 the exports."""
    results: list[WriteResult] = storage.write_data(plan, planner).wait()
    for name, parts in exports.items():
        try:
            with atomic_path(temporary / f"{name}.safetensors") as file:
                task.write_export(name, parts, file)
        except SafetensorError as error:  # a full disk too
            raise OSError(str(error)) from error
    return results


def _begin(temporary: Path) -> None:
    if temporary.exists():
        shutil.rmtree(temporary)
    temporary.mkdir()


def _discard(checkpoint: Path) -> None:
    # Renamed first: a kill in the middle of the removal must not leave half a checkpoint.
    doomed = checkpoint.with_name(f".{checkpoint.name}.tmp-removed")
    checkpoint.rename(doomed)
    shutil.rmtree(doomed)


def _cause(error: BaseException, world: World | None = None) -> str:
    """Return the operating system's word on a failed write, from inside whatever wraps it."""
    if isinstance(error, CheckpointException):
        for rank, wrapped in error.failures.items():
            named = f"rank {rank}: " if world is not None and world.grouped else ""
            return named + _cause(wrapped[0])
    if isinstance(error, FileNotFoundError) and error.filename:
        return f"{Path(os.fsdecode(error.filename)).name}: {error.strerror}"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    # PyTorch's own words are of its reader, or how to load it all the same.
    damaged = isinstance(error, pickle.UnpicklingError | EOFError | UnicodeError)
    if damaged or "PytorchStreamReader" in str(error):
        return "a part is damaged, or is no tensor"
    return str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__


def read_run(folder: Path, of_checkpoint: bool = True) -> dict[str, Any]:
    """Read ``run.json`` of a checkpoint, or of the run's folder, which has no step.

    Raises:
        UserError: if it is absent or damaged.
    """
    path = folder / "run.json"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not readable: {error}") from error
    wanted: dict[str, Any] = {"config": dict, "data": (str, type(None))}
    if of_checkpoint:
        wanted["step"] = int
    for name, kind in wanted.items():
        if not isinstance(found, dict) or name not in found or not isinstance(found[name], kind):
            raise UserError(f"{path}: damaged: no {name!r} as a run writes it")
    return found


@contextmanager
def _without_gradients(module: nn.Module) -> Iterator[None]:
    """Put gradients aside: where there are any, PyTorch does not give an optimiser its moments."""
    gradients = [(parameter, parameter.grad) for parameter in module.parameters()]
    for parameter, _ in gradients:
        parameter.grad = None
    yield
    for parameter, gradient in gradients:
        parameter.grad = gradient


def load_checkpoint(checkpoint: Path, task: Task, optimizer: torch.optim.Optimizer, world: World) -> None:
    """Put everything back, in place.

    Raises:
        UserError: if the checkpoint is damaged, of another model, or has not the moments of every parameter.
    """
    with _without_gradients(task.trained()):
        state = _state(task, optimizer)
    try:
        with _one_process():
            reader = IndexedReader(checkpoint / "state")
            names = reader.read_metadata().state_dict_metadata
            held = {
                name.split(".", 1)[1].rpartition(".")[0] for name in names if name.startswith("optimizer.")
            }
            wanted = state["optimizer"].keys()
            if not wanted <= held:
                raise UserError(
                    f"{checkpoint}: has the optimizer's moments of {len(wanted & held)} of {len(wanted)} "
                    "parameters: going on would not be exact; take an earlier checkpoint, or begin anew"
                )
            dcp.load(state, storage_reader=reader, no_dist=True)  # each finds its own parts
    except (OSError, CheckpointException, RuntimeError, ValueError) as error:
        if lost_contact(error):
            raise
        raise UserError(f"{checkpoint}: not a readable checkpoint of this model: {_cause(error)}") from error
    moments = state.pop("optimizer")
    task.load_state_dict(state)
    groups = get_optimizer_state_dict(task.trained(), optimizer)["param_groups"]
    set_optimizer_state_dict(task.trained(), optimizer, {"state": moments, "param_groups": groups})


def find_start(
    output: Path, config: EngineConfig, processes: int, data: str | None, resume: bool
) -> Path | None:
    """Return the checkpoint to go on from, if any.

    Args:
        output: the run's folder.
        config: of the run.
        processes: of the run.
        data: identity of the data; None does not look at them.
        resume: whether going on was asked for.

    Raises:
        UserError: if the folder holds a run and resuming was not asked for, or was made by another setting,
            or has more steps behind it than the run shall have.
    """
    if not checkpoint_steps(output / "checkpoints"):
        return None
    if not resume:
        raise UserError(
            f"{output}: holds a run already; continue it with --resume, or choose another --output"
        )
    checkpoint = latest_checkpoint(output)
    saved = read_run(checkpoint)
    # As JSON has them: it knows no tuples. Older runs lack newer settings.
    identity, defaults = json.loads(json.dumps([config.identity(processes), type(config)().identity()]))
    settings = defaults | saved["config"]
    differing = [key for key in identity if settings.get(key) != identity[key] and key != "steps"]
    if differing:
        first = differing[0]
        raise UserError(
            f"{output}: can't resume with other settings: {', '.join(differing)} differ "
            f"({first} was {settings.get(first)}, now {identity[first]})"
            + (
                f"; {_fitting(settings[BATCHES_OF_A_STEP], processes)}"
                if BATCHES_OF_A_STEP in differing
                else ""
            )
        )
    if config.steps < saved["step"]:
        raise UserError(
            f"{output}: can't resume: {saved['step']} steps are done, --steps asks for {config.steps}"
        )
    if data not in (None, saved["data"]):
        raise UserError(f"{output}: can't resume: the data are not those that the run began with")
    return checkpoint


def _fitting(batches: int, processes: int) -> str:
    """Say what would give a step as many batches as before."""
    if batches % processes == 0:
        return f"with {processes} process{'es' * (processes > 1)} use --accumulate {batches // processes}"
    return f"{processes} processes can't share {batches} batches a step: use a number that divides {batches}"


def describe_start(checkpoint: Path, config: EngineConfig, adamw: AdamWConfig, processes: int) -> str:
    """Say from where a resumed run goes on, which settings are new, and what new ``steps`` do to its rate.

    Args:
        checkpoint: as :func:`find_start` found it.
        config: of the run.
        adamw: of its task.
        processes: of the run.
    """
    saved = read_run(checkpoint)
    step, before = saved["step"], saved["config"] | saved.get("settings", {})
    now = json.loads(json.dumps(config.flat() | {"processes": processes}))
    changes = [
        f"{name} {before[name]} -> {value}" for name, value in now.items() if before.get(name, value) != value
    ]
    text = f"continues from {checkpoint} (step {step} of {config.steps})"
    if changes:
        text += f"; changed: {', '.join(changes)}"
    if before["steps"] != config.steps and step < config.steps:
        old, new = (learning_rate(step, steps, adamw) for steps in (before["steps"], config.steps))
        text += (
            f"; the schedules now end at step {config.steps}, not {before['steps']}: at step {step} the "
            f"learning rate is {new:.3g}, not {old:.3g}"
        )
    return text
