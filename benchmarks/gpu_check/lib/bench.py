"""Run the project's own benchmarks, and tell their rows as they come.

Rows of all calls are in one file, ``$OUT/benchmarks.json``, in the format of ``benchmarks/results``. If the
GPU's context is lost or the process dies, another one goes on behind the benchmark at which that happened.
"""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks import run
from benchmarks.harness import OUT_OF_TIME, WRONG
from benchmarks.results import Results, Row

from .common import LOGS, OUT, REHEARSE, WORK, emit, left, require_cuda, start_cuda
from .probe import DATA_SHEET

RESULTS = OUT / "benchmarks.json"
ALONE = ("step", "attention")  # parts of their own
LEAST = 8.0  # seconds in less than which no benchmark begins


def tell(row: Row, results: Results) -> None:
    """Tell a row in one line."""
    name = f"{row.bench}: {row.case} {row.direction} {row.dtype}, {row.variant}"
    if row.unavailable:
        emit(name, "fail" if row.unavailable.startswith(WRONG) else "skip", row.unavailable)
        return
    assert row.median_us is not None
    step, share = row.bench.startswith("step"), results.share_of_peak(row)
    figures: dict[str, Any] = (
        {"ms": round(row.median_us / 1e3, 2)} if step else {"us": round(row.median_us, 1)}
    )
    if step and row.flops:
        figures["mfu_989"] = round(1e8 * row.flops / row.median_us / DATA_SHEET, 1)
    elif share:
        figures["peak_percent"] = round(100 * share, 1)
    if row.cold_us:
        figures["cold_us"] = round(row.cold_us, 1)
    if row.host_us and not step:
        figures["host_us"] = round(row.host_us, 1)
    if "samples_per_s" in row.extra:
        figures["samples_per_s"] = round(row.extra["samples_per_s"], 1)
    if row.peak_memory:
        figures["memory_gb"] = round(row.peak_memory / 1e9, 2)
    if row.variant == "ours" and row.ratios:
        figures["ours_is_x"] = {key: round(value, 2) for key, value in row.ratios.items()}
    emit(name, "ok", **figures)


class Follower:
    """Tells the rows of a call as they come, and adds them to those of the calls before."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._told = folder, 0
        self.out_of_time: Counter[str] = Counter()  # rows by benchmark
        self._before = Results.load(RESULTS).rows if RESULTS.exists() else []

    def look(self) -> None:
        """Read what the call has written until now."""
        try:
            path = max(self._folder.glob("*.json"), key=lambda path: path.stat().st_mtime)
            results = Results.load(path)
        except (OSError, ValueError):  # none yet, or just replaced
            return
        for row in results.rows[self._told :]:
            if row.unavailable == OUT_OF_TIME:
                self.out_of_time[row.bench] += 1
            else:
                tell(row, results)
        if len(results.rows) > self._told:
            replace(results, rows=[*self._before, *results.rows]).save(RESULTS)
            self._told = len(results.rows)


def measure(part: str, names: Sequence[str]) -> int:
    """Run benchmarks until all are through; return the exit code."""
    call, code = 0, 0
    while names and left() > 2 * LEAST:
        folder, log = WORK / "benchmarks" / f"{part}-{call}", LOGS / f"{part}-{call}.txt"
        command = [sys.executable, "-m", __spec__.name, "--child", "--set", "gpu", "--only", *names]
        # The command's start comes on top, and the last case may take longer than it was given.
        command += ["--seconds", f"{0.9 * left() - LEAST:.0f}", "--output", str(folder)]
        follower = Follower(folder)
        with log.open("w") as file:
            process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)
            try:
                while process.poll() is None:
                    time.sleep(0.5)
                    follower.look()
            finally:  # interrupted, too
                follower.look()
                for bench, count in follower.out_of_time.items():
                    emit(f"{bench}: {count} rows", "skip", OUT_OF_TIME)
        text = log.read_text(errors="replace")
        # What the command says of each benchmark that is over, the lost one's included.
        over = re.findall(r"^(\w+): \d+ s$", text, re.MULTILINE)
        names, call = [name for name in names if name not in over], call + 1
        code = max(code, abs(process.returncode))
        if process.returncode in (0, 1):
            return code
        if process.returncode != run.LOST and names:
            *_, last = [line for line in text.splitlines() if line.strip()] or [""]
            emit(names[0], "fail", f"the process ended with {process.returncode}: {last}")
            names = names[1:]
    for name in names:
        emit(name, "skip", OUT_OF_TIME)
    return code


def main() -> int:
    """Run the part that is named; return the exit code."""
    part, *rest = sys.argv[1:]
    if part == "--child":
        start_cuda()
        if REHEARSE:
            from .fake_cuda import small_benchmarks

            small_benchmarks()
        return run.main(rest)
    require_cuda()
    names = [share.name for share in run.SETS["gpu"]]
    kernels = [share.name for share in run.SETS["gpu"] if share.seconds and share.name not in ALONE]
    return measure(part, {"official": names, "kernels": kernels}.get(part, [part]))


if __name__ == "__main__":
    sys.exit(main())
