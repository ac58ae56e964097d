"""Checkpoints: whole or absent, the last few kept, everything in them that an exact resume needs.

::

    RUN/checkpoints/<step>/state/                PyTorch distributed checkpoint: weights, optimiser, RNG
    RUN/checkpoints/<step>/{student,teacher}.safetensors    the models alone, for everybody else
    RUN/checkpoints/<step>/run.json              step, settings and data: what a resumed run must have too
"""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

from meduet_fast.errors import UserError
from meduet_fast.files import atomic_path, remove_leftovers
from meduet_fast.model import MeDUET


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


def _rng_state() -> dict[str, torch.Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _state(student: MeDUET, teacher: MeDUET, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    return {
        "student": student.state_dict(),
        "teacher": teacher.state_dict(),
        "optimizer": get_optimizer_state_dict(student, optimizer),
        "rng": _rng_state(),
    }


@contextmanager
def _one_process() -> Iterator[None]:
    """Without a process group PyTorch warns that it saves as a single process, which is what is meant."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        yield


def save_checkpoint(
    folder: Path,
    step: int,
    student: MeDUET,
    teacher: MeDUET,
    optimizer: torch.optim.Optimizer,
    run: dict[str, Any],
    keep: int,
) -> None:
    """Write ``folder/<step>`` and remove all but the last ``keep`` checkpoints.

    Args:
        run: JSON values that a resumed run compares; the step is added.

    Raises:
        UserError: if it cannot be written (a full disk, no permission); earlier checkpoints are untouched.
    """
    target = folder / str(step)
    try:
        if target.exists():
            shutil.rmtree(target)
        with atomic_path(target) as temporary:
            temporary.mkdir()
            with _one_process():
                dcp.save(_state(student, teacher, optimizer), checkpoint_id=temporary / "state")
            student.save_pretrained(temporary / "student.safetensors")
            teacher.save_pretrained(temporary / "teacher.safetensors")
            (temporary / "run.json").write_text(json.dumps({"step": step, **run}, indent=1), encoding="utf-8")
    except (OSError, CheckpointException, RuntimeError) as error:
        raise UserError(f"{target}: checkpoint not written: {_cause(error)}; {last_good(folder)}") from error
    for old in checkpoint_steps(folder)[:-keep]:
        # Renamed first: a kill in the middle of the removal must not leave half a checkpoint.
        doomed = folder / f".{old}.tmp-removed"
        (folder / str(old)).rename(doomed)
        shutil.rmtree(doomed)


def _cause(error: BaseException) -> str:
    """The operating system's word on a failed write, from inside whatever wraps it."""
    if isinstance(error, CheckpointException):
        for wrapped in error.failures.values():
            return _cause(wrapped[0])
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
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


def load_checkpoint(
    checkpoint: Path, student: MeDUET, teacher: MeDUET, optimizer: torch.optim.Optimizer
) -> None:
    """Put everything back, in place.

    Raises:
        UserError: if the checkpoint is damaged or of another model.
    """
    state = _state(student, teacher, optimizer)
    try:
        with _one_process():
            dcp.load(state, checkpoint_id=checkpoint / "state")
    except (OSError, CheckpointException, RuntimeError, ValueError) as error:
        raise UserError(f"{checkpoint}: not a readable checkpoint of this model: {_cause(error)}") from error
    student.load_state_dict(state["student"])
    teacher.load_state_dict(state["teacher"])
    set_optimizer_state_dict(student, optimizer, state["optimizer"])
    torch.set_rng_state(state["rng"]["cpu"])
    if "cuda" in state["rng"]:
        torch.cuda.set_rng_state(state["rng"]["cuda"])


def prepare_folder(folder: Path) -> None:
    """Make the checkpoint folder and remove what killed writers left in it."""
    folder.mkdir(parents=True, exist_ok=True)
    remove_leftovers(folder)
