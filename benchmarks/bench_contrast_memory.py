"""Memory and time of the quadruplet contrast on the CPU: chunks of rows beside the plain definition.

``python -m benchmarks.bench_contrast_memory [--rows N] [--width D] [--rounds R] [--json PATH]``

Every figure comes from a process of its own, float32, forward and backward. Memory is what the process's peak
resident size grows by over its inputs and a warm-up on few rows. Time is the best and the median of
interleaved rounds. Nothing is reported unless loss and gradients of both agree.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from meduet_fast.kernels.contrast_eager import quadruplet_contrast_eager, quadruplet_contrast_reference

RUNS: dict[str, Callable[..., Tensor]] = {
    "chunked": quadruplet_contrast_eager,
    "plain": quadruplet_contrast_reference,
}


def make_inputs(rows: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys that resemble them, and the scale of the published configuration."""
    generator = torch.Generator().manual_seed(0)
    queries = torch.randn(rows, width, generator=generator)
    keys = torch.randn(rows, width, generator=generator).add_(queries)  # in place: the peak counts
    return queries.requires_grad_(), keys, torch.tensor(1 / 0.07).log().requires_grad_()


def measure(name: str, rows: int, width: int) -> dict[str, Any]:
    """One forward and backward pass in this process: bytes above the inputs, seconds, results."""

    def step(inputs: tuple[Tensor, Tensor, Tensor]) -> float:
        loss = RUNS[name](*inputs, "content")
        loss.backward()
        return loss.item()

    step(make_inputs(64, width))  # threads and libraries
    inputs = make_inputs(rows, width)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    loss = step(inputs)
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    queries, _, log_scale = inputs
    assert queries.grad is not None
    assert log_scale.grad is not None
    return {
        "bytes": 1024 * (peak - before),  # Linux counts kilobytes
        "seconds": seconds,
        "results": [loss, queries.grad.double().norm().item(), log_scale.grad.item()],
    }


def in_a_process(name: str, rows: int, width: int) -> dict[str, Any]:
    """:func:`measure` in a fresh process."""
    command = [sys.executable, "-m", "benchmarks.bench_contrast_memory", "--only", name]
    command += ["--rows", str(rows), "--width", str(width)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench_contrast_memory", description=__doc__)
    parser.add_argument("--rows", type=int, default=16384)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="also write the result to this file")
    parser.add_argument("--only", choices=RUNS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.only:
        print(json.dumps(measure(options.only, options.rows, options.width)))
        return

    rounds = [
        {name: in_a_process(name, options.rows, options.width) for name in RUNS}
        for _ in range(options.rounds)
    ]
    for one in rounds:
        ours, plain = (torch.tensor(one[name]["results"]) for name in ("chunked", "plain"))
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-6)
    result: dict[str, Any] = {
        "rows": options.rows,
        "width": options.width,
        "threads": torch.get_num_threads(),
        "machine": platform.machine(),
        "torch": torch.__version__,
    }
    for name in RUNS:
        seconds = [one[name]["seconds"] for one in rounds]
        result[name] = {
            "megabytes": round(max(one[name]["bytes"] for one in rounds) / 1e6, 1),
            "best_seconds": round(min(seconds), 3),
            "median_seconds": round(statistics.median(seconds), 3),
        }
        print(f"{name:8} {result[name]}")
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
