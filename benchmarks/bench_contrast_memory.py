"""Memory and time of the quadruplet contrast on the CPU: chunks of rows beside the plain definition.

``python -m benchmarks.bench_contrast_memory [--rows N] [--width D] [--rounds R] [--json PATH]``

Every figure comes from a process of its own, float32, forward and backward. Memory is what the process's peak
resident size grows by over its inputs and a warm-up on few rows; the largest of all rounds counts. Nothing
is reported unless loss and gradients of both agree.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from meduet_fast.kernels.contrast import quadruplet_contrast_eager, quadruplet_contrast_reference

from .command import command
from .harness import WRONG, figures, first_line
from .results import Row
from .tables import OURS

RUNS: dict[str, Callable[..., Tensor]] = {
    OURS: quadruplet_contrast_eager,
    "eager": quadruplet_contrast_reference,
}


def make_inputs(rows: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Make queries, keys that resemble them, and the scale of the published configuration."""
    generator = torch.Generator().manual_seed(0)
    queries = torch.randn(rows, width, generator=generator)
    keys = torch.randn(rows, width, generator=generator).add_(queries)  # in place: the peak counts
    return queries.requires_grad_(), keys, torch.tensor(1 / 0.07).log().requires_grad_()


def peak_resident() -> int:
    """Return the largest resident size of this process so far, in bytes. Linux alone.

    Not getrusage's, which in a child begins with the size of the process that started it.
    """
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    found = re.search(r"^VmHWM:\s*(\d+) kB", status, re.MULTILINE)
    if not found:
        raise OSError("/proc/self/status has no VmHWM")
    return 1024 * int(found.group(1))


def measure(name: str, rows: int, width: int) -> dict[str, Any]:
    """Run one forward and backward pass in this process: bytes above the inputs, seconds, results."""

    def step(inputs: tuple[Tensor, Tensor, Tensor]) -> float:
        loss = RUNS[name](*inputs, "content")
        loss.backward()
        return loss.item()

    step(make_inputs(64, width))  # threads and libraries
    inputs = make_inputs(rows, width)
    before = peak_resident()
    start = time.perf_counter()
    loss = step(inputs)
    seconds = time.perf_counter() - start
    grown = peak_resident() - before
    queries, _, log_scale = inputs
    assert queries.grad is not None
    assert log_scale.grad is not None
    return {
        "bytes": grown,
        "seconds": seconds,
        "results": [loss, queries.grad.double().norm().item(), log_scale.grad.item()],
    }


def in_a_process(name: str, rows: int, width: int) -> dict[str, Any]:
    """Call :func:`measure` in a fresh process."""
    command = [sys.executable, "-m", "benchmarks.bench_contrast_memory", "--only", name]
    command += ["--rows", str(rows), "--width", str(width)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout)


def measure_rows(count: int, width: int, repeats: int) -> list[Row]:
    """Measure each way to compute it, taking turns; nothing is timed unless loss and gradients agree."""
    rounds = [{name: in_a_process(name, count, width) for name in RUNS} for _ in range(repeats)]
    case, shape = f"N={count} D={width}", {"rows": count, "width": width}
    common: dict[str, Any] = {"direction": "forward_backward", "dtype": "float32", "shape": shape}
    for one in rounds:
        ours, plain = (torch.tensor(one[name]["results"]) for name in RUNS)
        try:
            torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-6)
        except AssertionError as error:
            return [Row("contrast_memory", case, OURS, **common, unavailable=WRONG + first_line(error))]
    seconds = {name: [one[name]["seconds"] for one in rounds] for name in RUNS}
    return [
        Row(
            "contrast_memory",
            case,
            name,
            **common,
            peak_memory=max(one[name]["bytes"] for one in rounds),
            **figures(seconds, name),
        )
        for name in RUNS
    ]


def rows(device: torch.device, quick: bool) -> list[Row]:
    """Measure for a run of all benchmarks; the device is the CPU whatever is asked for."""
    repeats = 2 if quick else 5
    return [row for count in (4096, 16384) for row in measure_rows(count, 256, repeats)]


def main() -> int:
    """Run the command; returns the exit code."""

    def add_options(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--rows", type=int, default=16384)
        parser.add_argument("--width", type=int, default=256)
        parser.add_argument("--rounds", type=int, default=5)

    if "--only" in sys.argv:  # in a process of its own
        parser = argparse.ArgumentParser()
        parser.add_argument("--only", choices=RUNS)
        parser.add_argument("--rows", type=int)
        parser.add_argument("--width", type=int)
        options = parser.parse_args()
        print(json.dumps(measure(options.only, options.rows, options.width)))
        return 0
    return command(
        lambda options: measure_rows(options.rows, options.width, options.rounds),
        __doc__ or "",
        add_options=add_options,
    )


if __name__ == "__main__":
    sys.exit(main())
