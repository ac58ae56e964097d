"""Checkpoints: whole or absent, the last few kept, everything in them that an exact resume needs.

::

    RUN/checkpoints/<step>/state/                PyTorch distributed checkpoint: weights and AdamW's moments
    RUN/checkpoints/<step>/{student,teacher}.safetensors    the models alone, for everybody else
    RUN/checkpoints/<step>/run.json              step, settings and data: what a resumed run must have too

Every process writes its part, and any number of processes can read it. Random numbers need no place: they
are a function of the seed and of the number of a batch. Checkpoints hold tensors and JSON alone, and are read
without unpickling objects: anybody's can be loaded.
"""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, NamedTuple

import torch
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.staging import BlockingAsyncStager
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.tensor import DTensor

from meduet_fast.errors import UserError
from meduet_fast.files import atomic_path, remove_leftovers
from meduet_fast.models import MeDUET, MeDUETConfig
from meduet_fast.pretraining.erasure import DomainMeans

from .checkpoint_index import IndexedReader, IndexedWriter
from .distributed import World, lost_contact


class Trained(NamedTuple):
    """What a checkpoint holds."""

    student: MeDUET
    teacher: MeDUET
    optimizer: torch.optim.Optimizer
    domain_means: DomainMeans | None = None

    def state(self) -> dict[str, Any]:
        """Its tensors, as they are distributed. AdamW's settings come from the configuration."""
        state = {
            "student": self.student.state_dict(),
            "teacher": self.teacher.state_dict(),
            "optimizer": get_optimizer_state_dict(self.student, self.optimizer)["state"],
        }
        if self.domain_means is not None:
            state["domain_means"] = self.domain_means.state_dict()
        return state


def checkpoint_steps(folder: Path) -> list[int]:
    """Steps of the complete checkpoints in ``RUN/checkpoints``, ascending."""
    if not folder.is_dir():
        return []
    return sorted(int(item.name) for item in folder.iterdir() if item.name.isdigit())


def latest_checkpoint(run: Path) -> Path:
    """The newest checkpoint of a run.

    Raises:
        UserError: if there is none.
    """
    folder = run / "checkpoints"
    steps = checkpoint_steps(folder)
    if not steps:
        raise UserError(f"{folder}: no checkpoint found; `meduet-fast pretrain` writes them")
    return folder / str(steps[-1])


def last_good(folder: Path) -> str:
    """For messages: what is left to go on from."""
    steps = checkpoint_steps(folder)
    return f"the last good checkpoint is {folder / str(steps[-1])}" if steps else "there is no checkpoint yet"


@contextmanager
def _one_process() -> Iterator[None]:
    """Without a process group PyTorch warns that it saves as a single process, which is what is meant."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        yield


def _whole(model: MeDUET, rank: int) -> MeDUET | None:
    """A copy of a model on the host of rank 0, put together from its shards; all processes take part."""
    parts: dict[str, Tensor] = {}
    for key, value in model.state_dict().items():
        value = value.full_tensor() if isinstance(value, DTensor) else value
        if rank == 0:
            parts[key] = value.detach().to("cpu", copy=True)
    if rank:
        return None
    return _from_parts(model.config, parts)


def _from_parts(config: MeDUETConfig, parts: Mapping[str, Tensor]) -> MeDUET:
    with torch.device("meta"):
        model = MeDUET(config)
    model.load_state_dict(parts, assign=True)
    return model


class CheckpointWriter:
    """Writes checkpoints of one run, one after the other.

    Args:
        folder: ``RUN/checkpoints``.
        run: JSON values that a resumed run compares; the step is added.
        keep: checkpoints kept.
        world: the processes that write together.
        in_background: write from a copy, while training goes on.
    """

    def __init__(
        self, folder: Path, run: Mapping[str, Any], keep: int, world: World, in_background: bool = False
    ) -> None:
        self._folder, self._run, self._keep, self._world = folder, run, keep, world
        self._thread = ThreadPoolExecutor(1, "checkpoint") if in_background else None
        self._running: Future[None] | None = None

    def save(self, step: int, trained: Trained) -> None:
        """Write ``folder/<step>``, or begin to, and remove all but the last ``keep`` checkpoints.

        Raises:
            UserError: if it, or the one before, cannot be written (a full disk, no permission); earlier
                checkpoints are untouched.
        """
        self.finish()
        models = {name: _whole(getattr(trained, name), self._world.rank) for name in ("student", "teacher")}
        state = trained.state()
        if self._thread is None:
            self._write(step, state, models)
        else:
            state = BlockingAsyncStager().stage(state)
            self._running = self._thread.submit(self._write, step, state, models)

    def failed(self) -> bool:
        """Whether a write in the background has failed; :meth:`finish` raises why."""
        running = self._running
        return running is not None and running.done() and running.exception() is not None

    def finish(self) -> None:
        """Wait for what is being written.

        Raises:
            UserError: as :meth:`save`.
        """
        running, self._running = self._running, None
        if running is not None:
            running.result()

    def _write(self, step: int, state: dict[str, Any], models: Mapping[str, MeDUET | None]) -> None:
        target = self._folder / str(step)
        temporary = self._folder / f".{step}.tmp"
        world = self._world
        try:
            world.on_first(partial(_begin, temporary))
            with _one_process():
                writer = IndexedWriter(temporary / "state")
                dcp.save(state, storage_writer=writer, process_group=world.writing)
            world.on_first(partial(self._complete, step, temporary, target, models))
        except (OSError, CheckpointException, RuntimeError) as error:
            if world.rank == 0:
                shutil.rmtree(temporary, ignore_errors=True)
            if lost_contact(error):
                raise
            raise UserError(
                f"{target}: checkpoint not written: {_cause(error, world)}; {last_good(self._folder)}"
            ) from error

    def _complete(
        self, step: int, temporary: Path, target: Path, models: Mapping[str, MeDUET | None]
    ) -> None:
        """On rank 0: all parts are there; add the rest, and give it its name."""
        for name, model in models.items():
            assert model is not None
            try:
                model.save_pretrained(temporary / f"{name}.safetensors")
            except SafetensorError as error:  # a full disk too
                raise OSError(str(error)) from error
        text = json.dumps({"step": step, **self._run}, indent=1)
        with atomic_path(temporary / "run.json") as file:
            file.write_text(text, encoding="utf-8")
        if target.exists():
            _discard(target)
        temporary.replace(target)
        for old in checkpoint_steps(self._folder)[: -self._keep]:
            _discard(self._folder / str(old))


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
    """The operating system's word on a failed write, from inside whatever wraps it."""
    if isinstance(error, CheckpointException):
        for rank, wrapped in error.failures.items():
            named = f"rank {rank}: " if world is not None and world.grouped else ""
            return named + _cause(wrapped[0])
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if isinstance(error, UnpicklingError):  # PyTorch says how to load it all the same
        return "a part is damaged, or is no tensor"
    return str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__


def read_run(checkpoint: Path) -> dict[str, Any]:
    """What ``run.json`` of a checkpoint says.

    Raises:
        UserError: if it is absent or damaged.
    """
    path = checkpoint / "run.json"
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not a readable checkpoint: {error}") from error


def load_checkpoint(checkpoint: Path, trained: Trained, world: World) -> None:
    """Put everything back, in place.

    Raises:
        UserError: if the checkpoint is damaged or of another model.
    """
    state = trained.state()
    try:
        with _one_process():
            reader = IndexedReader(checkpoint / "state")
            dcp.load(state, storage_reader=reader, process_group=world.writing)
    except (OSError, CheckpointException, RuntimeError, ValueError) as error:
        if lost_contact(error):
            raise
        raise UserError(f"{checkpoint}: not a readable checkpoint of this model: {_cause(error)}") from error
    trained.student.load_state_dict(state["student"])
    trained.teacher.load_state_dict(state["teacher"])
    if trained.domain_means is not None:
        trained.domain_means.load_state_dict(state["domain_means"])
    student, optimizer = trained.student, trained.optimizer
    groups = get_optimizer_state_dict(student, optimizer)["param_groups"]
    set_optimizer_state_dict(student, optimizer, {"state": state["optimizer"], "param_groups": groups})


def prepare_folder(folder: Path) -> None:
    """Make the checkpoint folder and remove what killed writers left in it."""
    folder.mkdir(parents=True, exist_ok=True)
    remove_leftovers(folder)
