"""What a run tells: JSON lines, TensorBoard, the text beside the bar. Nothing waits for the device."""

from __future__ import annotations

import json
import math
import resource
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from meduet_fast.errors import UserError
from meduet_fast.files import atomic_path

METRICS_FILE = "metrics.jsonl"
LOSSES = ("reconstruction", "domain_content", "domain_style", "mftd", "siqc", "total")


class StepValues(NamedTuple):
    """Values of one step, on their way from the device.

    Attributes:
        step: which step.
        names: of the values.
        values: (len(names),) float32 on the host; valid once ``ready`` has happened.
        volumes: ids of the volumes in the step's batches.
        waited: seconds that the step waited for data.
        ready: the copy's event; None where there is nothing to wait for.
    """

    step: int
    names: Sequence[str]
    values: Tensor
    volumes: list[Tensor]
    waited: float
    ready: torch.cuda.Event | None

    def fetch(self) -> dict[str, float]:
        """The values; waits for the copy, which is long over a step later."""
        if self.ready is not None:
            self.ready.synchronize()
        return dict(zip(self.names, self.values.tolist(), strict=True))


def send_values(step: int, values: dict[str, Tensor], volumes: list[Tensor], waited: float) -> StepValues:
    """Start the copy of scalar tensors to the host without waiting for it."""
    stacked = torch.stack([value.detach().float() for value in values.values()])
    if not stacked.is_cuda:
        return StepValues(step, list(values), stacked, volumes, waited, None)
    host = torch.empty(stacked.shape, dtype=stacked.dtype, pin_memory=True)
    host.copy_(stacked, non_blocking=True)
    ready = torch.cuda.Event()
    ready.record()
    return StepValues(step, list(values), host, volumes, waited, ready)


def peak_memory_mb(device: torch.device) -> float:
    """Largest memory so far in MB: of the device's allocator on CUDA, else of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if sys.platform == "darwin" else peak * 1024 / 1e6


def read_metrics(run: Path) -> list[dict[str, float]]:
    """The records of ``RUN/metrics.jsonl``; a last line cut short by a kill is left out.

    Raises:
        UserError: if the file is absent or another line is damaged.
    """
    path = run / METRICS_FILE
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}; is this a pretraining run?") from error
    records = []
    for number, line in enumerate(lines, 1):
        try:
            records.append(json.loads(line))
        except ValueError as error:
            if number < len(lines):
                raise UserError(f"{path}: line {number} is damaged: {error}") from error
    return records


class RunLog:
    """Appends to ``metrics.jsonl`` and TensorBoard.

    Args:
        run: the run's folder.
        start_step: records from this step on, of an earlier attempt, are dropped.
        log_every: steps between two records; the last of them is the one recorded.
        samples_per_step: for the rate.
        device: whose memory is told.
    """

    def __init__(
        self, run: Path, start_step: int, log_every: int, samples_per_step: int, device: torch.device
    ) -> None:
        path = run / METRICS_FILE
        if path.exists():
            kept = [record for record in read_metrics(run) if record["step"] < start_step]
            with atomic_path(path) as temporary:
                temporary.write_text("".join(json.dumps(record) + "\n" for record in kept), encoding="utf-8")
        self._file = path.open("a", encoding="utf-8")
        self._board = SummaryWriter(str(run / "tensorboard"), purge_step=start_step)
        self._log_every, self._samples_per_step, self._device = log_every, samples_per_step, device
        self._steps, self._waited, self._last = 0, 0.0, time.perf_counter()

    def __enter__(self) -> RunLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        self._board.close()

    def report(self, step: int, values: dict[str, float], waited: float) -> str | None:
        """Take in one step; every ``log_every`` steps write a record.

        Args:
            values: losses, gradient norm and learning rate.
            waited: seconds that the step waited for data.

        Returns:
            Text for the progress bar when a record was written.

        Raises:
            OSError: if the disk is full.
        """
        self._steps += 1
        self._waited += waited
        if (step + 1) % self._log_every:
            return None
        now = time.perf_counter()
        elapsed = max(now - self._last, 1e-9)
        record = {
            "step": step,
            **values,
            "samples_per_s": self._steps * self._samples_per_step / elapsed,
            "data_wait_percent": 100 * self._waited / elapsed,
            "memory_mb": peak_memory_mb(self._device),
            "time": time.time(),
        }
        self._steps, self._waited, self._last = 0, 0.0, now
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()
        for name in record.keys() - {"step", "time"}:
            self._board.add_scalar(f"{'loss' if name in LOSSES else 'run'}/{name}", record[name], step)
        return summary_line(record)


def non_finite(values: dict[str, float]) -> list[str]:
    """Names of the values that are not finite, the terms before their total."""
    return [name for name, value in values.items() if not math.isfinite(value)]


def summary_line(record: dict[str, float]) -> str:
    """The text beside the progress bar."""
    short = {
        "total": "loss", "reconstruction": "rec", "domain_content": "dom_c", "domain_style": "dom_s",
        "mftd": "mftd", "siqc": "siqc",
    }  # fmt: skip
    losses = " ".join(f"{label} {record[name]:.3f}" for name, label in short.items())
    return (
        f"{losses} | {record['samples_per_s']:.1f} samples/s, data wait {record['data_wait_percent']:.0f} %, "
        f"{record['memory_mb']:.0f} MB"
    )
