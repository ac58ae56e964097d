"""Write a run's records: JSON lines, loggers, the text beside the bar. Nothing waits for the device."""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from meduet_fast.errors import UserError
from meduet_fast.files import atomic_path

from .config import EngineConfig
from .distributed import World
from .loggers import open_loggers
from .task import Task

METRICS_FILE = "metrics.jsonl"


# Dense bfloat16 TFLOP/s by name of the device, the longer names first. Source: NVIDIA's data sheets.
_PEAK_TFLOPS = {
    "H100 PCIe": 756, "H100 NVL": 835, "H200 NVL": 835, "H100": 989, "H200": 989, "GH200": 989, "B200": 2250,
    "A100": 312, "A800": 312, "H800": 989, "L40S": 362, "A10G": 70, "RTX 4090": 165,
}  # fmt: skip


def peak_tflops(device: torch.device) -> float | None:
    """Return what the device's matrix units can do in bfloat16, in 10^12 FLOP/s; None if not known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in _PEAK_TFLOPS.items() if part in name), None)


def peak_memory_mb(device: torch.device) -> float:
    """Return the largest memory so far in MB: of the device's allocator on CUDA, else of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if sys.platform == "darwin" else peak * 1024 / 1e6


def metrics_file(rank: int = 0) -> str:
    """Return the name of a process's file in the run's folder."""
    return METRICS_FILE if rank == 0 else f"metrics.rank{rank}.jsonl"


def read_metrics(run: Path, rank: int = 0) -> list[dict[str, float]]:
    """Read the records of a process; a last line cut short by a kill is left out.

    Losses are means over all processes and the same in all files; times and memory are the process's own.

    Raises:
        UserError: if the file is absent or another line is damaged.
    """
    path = run / metrics_file(rank)
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
    """Append to this process's metrics file, and on rank 0 hand on to the loggers.

    Args:
        run: the run's folder.
        start_step: records from this step on, of an earlier attempt, are dropped.
        task: whose losses they are.
        config: of the run.
        world: the processes whose losses are averaged.
    """

    def __init__(self, run: Path, start_step: int, task: Task, config: EngineConfig, world: World) -> None:
        path = run / metrics_file(world.rank)
        if path.exists():
            kept = [record for record in read_metrics(run, world.rank) if record["step"] < start_step]
            with atomic_path(path) as temporary:
                temporary.write_text("".join(json.dumps(record) + "\n" for record in kept), encoding="utf-8")
        self._opened = ExitStack()
        self._file = self._opened.enter_context(path.open("a", encoding="utf-8"))
        loggers = open_loggers(config.loggers, run, start_step, config.flat())
        self._loggers = self._opened.enter_context(loggers) if world.rank == 0 else []
        self._task, self._config, self._world = task, config, world
        self._peak = peak_tflops(world.device)
        if world.device.type == "cuda":  # counting may take seconds, which must not be a step's
            for step in (start_step, *task.phase_starts()):
                task.flops(step)
        self._steps, self._waited, self._last = 0, 0.0, time.perf_counter()

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, *error: Any) -> None:
        self._opened.__exit__(*error)

    def report(self, step: int, values: dict[str, float], waited: float, done_at: float) -> str | None:
        """Take in one step; every ``log_every`` steps average over processes and write a record.

        Args:
            values: losses, gradient norm and learning rate of this process.
            waited: seconds that the step waited for data.
            done_at: ``time.perf_counter()`` when the step was done.

        Returns:
            Text for the progress bar when a record was written.

        Raises:
            OSError: if the disk is full.
        """
        self._steps += 1
        self._waited += waited
        if (step + 1) % self._config.log_every:
            return None
        mean = dict(zip(values, self._world.mean(list(values.values())), strict=True))
        record = {"step": step, **mean, **self._speed(step, done_at), "time": time.time()}
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()
        losses = losses_in(record)
        scalars = {
            f"{'loss' if name in losses else 'run'}/{name}": value
            for name, value in record.items() if name not in ("step", "time")
        }  # fmt: skip
        for logger in self._loggers:
            logger.scalars(step, scalars)
        return summary_line(record, self._task.labels)

    def _speed(self, step: int, done_at: float) -> dict[str, float]:
        """Compute the figures of this process's device since the last record."""
        elapsed = max(done_at - self._last, 1e-9)
        config = self._config
        rate = self._steps * config.batch_size * config.accumulate / elapsed
        speed = {
            "samples_per_s": rate,
            **({} if self._task.tokens is None else {"tokens_per_s": rate * self._task.tokens}),
            "data_wait_percent": 100 * self._waited / elapsed,
            "memory_mb": peak_memory_mb(self._world.device),
        }
        if self._world.device.type == "cuda" and (flops := self._task.flops(step)) is not None:
            speed["tflops_per_s"] = rate * flops / 1e12
            if self._peak is not None:
                speed["mfu_percent"] = 100 * speed["tflops_per_s"] / self._peak
        self._steps, self._waited, self._last = 0, 0.0, done_at
        return speed


def losses_in(record: Mapping[str, float]) -> list[str]:
    """Return the names of a record's losses, in the task's order: from behind its step to its total."""
    names = list(record)
    return names[names.index("step") + 1 : names.index("total") + 1]


def first_and_last(records: Sequence[Mapping[str, float]], name: str) -> tuple[float, float]:
    """Average a value over the first and over the last tenth of a run's records; there must be one."""
    values = [record[name] for record in records]
    count = max(1, round(len(values) / 10))
    return fmean(values[:count]), fmean(values[-count:])


def summary_line(record: Mapping[str, float], labels: Mapping[str, str]) -> str:
    """Return the text beside the progress bar: rate, memory, and the losses that have a label."""
    items = [
        f"{record['samples_per_s']:.1f} samples/s", f"data wait {record['data_wait_percent']:.0f} %",
        f"{record['memory_mb']:.0f} MB",
    ]  # fmt: skip
    if "mfu_percent" in record:
        items.append(f"MFU {record['mfu_percent']:.0f} %")
    return ", ".join([*items, *(f"{label} {record[name]:.3f}" for name, label in labels.items())])
