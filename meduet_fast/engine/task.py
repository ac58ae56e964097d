"""The seam between the engine and what is trained: a task has the losses, batches are its data."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from .config import AdamWConfig

Batch = dict[str, Tensor]
VOLUME = "volume"  # the entry of a batch that stays on the host: (B,) ids, for messages about a bad batch


class Task(nn.Module):
    """A module whose call is the losses of a batch; a subclass says what to train and by what.

    The engine moves it to the device, spreads it over processes, compiles its blocks, captures it as a CUDA
    graph and checkpoints its ``state_dict``: all that must survive a restart is a parameter or a buffer of
    it.

    Attributes:
        title: what the progress bar calls a run.
        adamw: how the parameters of :meth:`trained` are updated.
        sample: what one is called.
        tokens: tokens of a sample, for the record's ``tokens_per_s``; None writes none.
        labels: short names for the progress line, by name of the loss; the others have no place there.
        init: which weights it began from, JSON values for the run's record; None if random ones.
    """

    title: str = "Training"
    sample: str = "sample"
    adamw: AdamWConfig
    tokens: int | None = None
    labels: Mapping[str, str] = {"total": "loss"}
    init: Mapping[str, Any] | None = None

    def prepare(self, batch: Batch, generator: torch.Generator) -> Batch:
        """Draw what is random (augmentation, masks, noise), before ``forward`` and outside of CUDA graphs.

        Args:
            batch: as it was read, on the device.
            generator: on the device, seeded by the batch's number in the stream: the same numbers for a
                resumed run, and for any number of processes.

        Returns:
            The tensors that ``forward`` takes, of the same shapes in every step.
        """
        return batch

    def forward(self, batch: Batch, step: int) -> dict[str, Tensor]:
        """Return the losses of a batch by name, ``total`` last: the one that is differentiated.

        The one call that DDP and FSDP see, and what a CUDA graph captures: it depends on ``step`` through
        :meth:`phase` alone, and waits for nothing.
        """
        raise NotImplementedError

    def trained(self) -> nn.Module:
        """Return the module whose parameters the optimiser gets."""
        return self

    def blocks(self) -> Sequence[nn.Module]:
        """Return what is compiled, recomputed (if it is trained) and sharded, one by one."""
        return []

    def phase(self, step: int) -> Hashable:
        """Return what ``forward`` does in a step: a CUDA graph is captured anew when it changes."""
        return None

    def phase_starts(self) -> Sequence[int]:
        """Return the first steps of the phases behind the first one."""
        return ()

    def after_step(self, step: int) -> None:
        """Do what follows the optimiser's step, such as an average of the weights. Nothing is waited for."""

    def exports(self) -> Mapping[str, nn.Module]:
        """Return the modules that are written beside every checkpoint, by name of the file."""
        return {}

    def write_export(self, name: str, state: Mapping[str, Tensor], path: Path) -> None:
        """Write one of :meth:`exports`, whole and on the CPU, as safetensors."""
        save_file(dict(state), path)

    def flops(self, step: int) -> int | None:
        """Return the FLOPs of a sample in a step, forward and backward, for MFU; None if nobody counted."""
        return None


class Batches:
    """An endless stream of batches, the same for any number of processes that share it out.

    Attributes:
        path: where the data are, for the run's record.
        identity: changes whenever the data do; a resumed run must find the same.
        record: what else the run's record says of them, JSON values by name.
    """

    path: Path
    identity: str
    record: Mapping[str, Any] = {}

    def read(self, first: int, last: int, rank: int, size: int, pin: bool) -> Iterator[Batch]:
        """Yield the batches ``first + rank``, ``first + rank + size``, ... below ``last``.

        Args:
            first, last: numbers in the stream.
            rank: of this process.
            size: how many processes share the stream.
            pin: into page-locked memory, for copies to the GPU that nobody waits for.

        Raises:
            UserError: naming data that can't be read.
        """
        raise NotImplementedError

    def reading(self) -> tuple[float, str] | None:
        """Say what the process itself reads, and since when (``time.monotonic``); None: nothing, or not told.

        Another thread asks, and ends the process if it reads for longer than ``timeout_s``.
        """
        return None

    def names(self, ids: Tensor) -> list[str]:
        """Return what a batch's entry ``volume`` stands for, for messages."""
        return [str(int(item)) for item in ids]
