"""Find the weights that a run begins from, or began from when it is resumed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from meduet_fast.errors import UserError
from meduet_fast.files import file_sha256
from meduet_fast.weight_files import weight_file

from .checkpoint import checkpoint_steps, latest_checkpoint, read_run
from .dry_run import Rows


@dataclass(frozen=True)
class Beginning:
    """What a run begins from.

    Attributes:
        record: what its ``run.json`` says of it, the file's ``path`` and ``sha256`` among it; None if it
            began from random weights.
        tensors: for the network, by name, where it begins now.
        rows: what to tell.
    """

    record: dict[str, Any] | None = None
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    rows: Rows = field(default_factory=list)


def find_beginning(
    path: Path | None,
    read: Callable[[Path], Beginning],
    output: Path | None,
    resume: bool,
    locate: Callable[[Path], Path] = weight_file,
) -> Beginning:
    """Find what a run begins from, or began from.

    A resumed run has its weights from its checkpoint, and reads no others again.

    Args:
        path: initial weights; None if none are given.
        read: reads them.
        locate: returns the file of weights that a path stands for.
        output: the run's folder; None if it is not known yet.
        resume: go on from the last checkpoint in it, if there is one.

    Raises:
        UserError: as ``read``; if a resumed run began from something else than is given.
    """
    holds_run = output is not None and bool(checkpoint_steps(output / "checkpoints"))
    if output is not None and holds_run and resume:
        return _began_from(latest_checkpoint(output), path, locate)
    if path is None or holds_run:  # the latter is refused elsewhere
        return Beginning()
    return read(path)


def _began_from(checkpoint: Path, path: Path | None, locate: Callable[[Path], Path]) -> Beginning:
    """Return what the run of a checkpoint began from, if that is what is given now."""
    began = read_run(checkpoint).get("init")
    if path is None:
        return Beginning(began)
    hint = "leave --init out to go on, or choose another --output to begin"
    if began is None:
        raise UserError(f"{path}: the run of {checkpoint} began from random weights, not from these: {hint}")
    if path.exists() and (found := file_sha256(locate(path))) != began["sha256"]:
        raise UserError(
            f"{path}: has SHA-256 {found[:12]}..., the run of {checkpoint} began from {began['path']} with "
            f"{began['sha256'][:12]}...: {hint}"
        )
    return Beginning(began, rows=[("init", f"{path} is not read again: the run goes on from {checkpoint}")])
