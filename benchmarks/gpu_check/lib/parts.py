"""Run the parts one after the other, each within its share of the time, and tell what was found.

Started by ``measure.sh``. A part's share is that of its weight among those still to come, so that what one
leaves the next ones get. A part that reaches its limit is interrupted, and killed if it does not end.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import IO, NamedTuple

from .common import LOGS, NO_GPU, OUT, WORK, emit
from .table import Ended, records, table

RESERVE = 12.0  # seconds for the table and packing
GRACE = 5.0  # from the interrupt to the kill
LEAST = 8.0  # in less no part gets anywhere
CACHES = 16_500_000  # bytes of packed caches that are worth carrying


class Part(NamedTuple):
    """One thing to look at.

    Attributes:
        weight: seconds that it wants, where all fit.
        command: arguments of Python; its time limit is in the environment, ``KIT_DEADLINE``.
        least: seconds below which it isn't cut while there is time.
    """

    weight: float
    command: tuple[str, ...]
    least: float = LEAST


def module(name: str, *arguments: str) -> tuple[str, ...]:
    """Return the command of a module of this folder."""
    return "-m", f"{__package__}.{name}", *arguments


PARTS = {
    "env": Part(30, module("environment"), 30),
    "smoke": Part(60, module("smoke"), 40),
    "tests": Part(125, module("gpu_tests")),
    "step": Part(150, module("bench", "step")),
    "probe": Part(80, module("probe")),
    "pretrain": Part(90, module("pretrain_run")),
    "synthesis": Part(120, module("synthesis_run")),
    "kernels": Part(110, module("bench", "kernels")),
    "attention": Part(45, module("bench", "attention")),
    "official": Part(450, module("bench", "official")),
    "sanitize": Part(60, module("smoke", "--sanitize")),
}
DEFAULT = "env,smoke,tests,step,probe,pretrain,synthesis,kernels,attention"


def copy_lines(source: IO[bytes], log: Path) -> None:
    """Copy a part's output to its log, to the log of all and to the screen."""
    with log.open("ab") as own, (OUT / "live.log").open("ab") as live:
        for line in source:
            for target in (own, live, sys.stdout.buffer):
                target.write(line)
                target.flush()


def say(text: str) -> None:
    """Print a line, and add it to the log of all."""
    print(text, flush=True)
    with (OUT / "live.log").open("a", encoding="utf-8") as file:
        file.write(text + "\n")


def run_part(name: str, command: Sequence[str], limit: float) -> tuple[int, bool]:
    """Run a part in a process group of its own; nothing that it starts outlives it.

    Args:
        name: of the part.
        command: arguments of Python.
        limit: seconds from now to the interrupt.

    Returns:
        its exit code, and whether it was ended at its limit.
    """
    process = subprocess.Popen(
        [sys.executable, *command],
        env=os.environ | {"KIT_PART": name, "KIT_DEADLINE": str(time.time() + limit)},
        start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert process.stdout is not None
    reader = threading.Thread(target=copy_lines, args=(process.stdout, LOGS / f"{name}.log"), daemon=True)
    at_limit = False
    try:  # from here on a signal may come
        reader.start()
        process.wait(limit)
    except subprocess.TimeoutExpired:
        at_limit = True
        os.killpg(process.pid, signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):
            process.wait(GRACE)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        code = process.wait()
        if reader.is_alive():  # it must not write while the interpreter ends
            reader.join(2)
    return code, at_limit


def pack(path: Path, folders: Sequence[str], seconds: float, size: float = float("inf")) -> None:
    """Write folders of the working folder as one file, if it takes no more than this time and size."""
    partial = WORK / path.name
    present = [folder for folder in folders if (WORK / folder).exists()]
    command = ["tar", "czf", str(partial), "--exclude=*.lock", "--exclude=*.pt", "-C", str(WORK), *present]
    with suppress(subprocess.SubprocessError, OSError):
        subprocess.run(command, timeout=max(seconds, 0.1), check=True, capture_output=True)
        if partial.stat().st_size < size:
            shutil.move(partial, path)


def measure(names: Sequence[str], budget: float, parts: Mapping[str, Part]) -> None:
    """Run parts; after each of them ``summary.txt`` and ``logs.tgz`` hold all that was found so far.

    Args:
        names: of the parts, in their order.
        budget: seconds for all of it.
        parts: what the names mean.
    """
    deadline = time.monotonic() + budget
    done: list[Ended] = []
    for number, name in enumerate(names):
        left = deadline - RESERVE - time.monotonic()
        share = left * parts[name].weight / sum(parts[other].weight for other in names[number:])
        limit = min(max(share, parts[name].least), left)
        if limit < LEAST:
            done.append(Ended(name, "not begun", 0.0, limit))
            say(f"== {name}: not begun, {left:.0f} s left")
        else:
            say(f"== {name}: up to {limit:.0f} s of {left:.0f}")
            began = time.monotonic()
            code, at_limit = run_part(name, parts[name].command, limit)
            how = "ENDED at its limit" if at_limit else f"exit code {code}" if code else "done"
            seconds = time.monotonic() - began
            done.append(Ended(name, how, seconds, limit))
            told = any((record["part"], record["status"]) == (name, "fail") for record in records())
            if code and (at_limit or code not in (1, NO_GPU) or not told):
                log = (LOGS / f"{name}.log").read_text(encoding="utf-8", errors="replace")
                last = [line.strip() for line in log.splitlines() if line.strip()][-3:]
                text = f"{how}, {limit:.0f} s" if at_limit else f"{how}: {' | '.join(last)}"
                emit("the part", "fail", text, part=name)
            say(f"== {name}: {how} after {seconds:.0f} s")
        (OUT / "summary.txt").write_text(table(done), encoding="utf-8")
        pack(OUT / "logs.tgz", ["logs", "benchmarks"], 10)
    # For a later call on a fresh machine.
    pack(OUT / "caches.tgz", ["cache"], deadline - time.monotonic() - 3, CACHES)
    print((OUT / "summary.txt").read_text(encoding="utf-8"))


def stop(number: int, frame: FrameType | None) -> None:
    """End at a signal as at Ctrl-C: the part that runs is killed."""
    raise KeyboardInterrupt


def main(arguments: Sequence[str] | None = None, parts: Mapping[str, Part] = PARTS) -> int:
    """Run the command; return the exit code, 1 if anything failed."""
    parser = argparse.ArgumentParser(prog="measure.sh", description=__doc__)
    parser.add_argument("--budget", type=float, default=540, help="seconds for all parts, default 540")
    parser.add_argument("--parts", default=DEFAULT, help=f"of {', '.join(parts)}; default {DEFAULT}")
    parser.add_argument(
        "--rehearse", action="store_true", help="small sizes on a CPU; no figure means anything"
    )
    options = parser.parse_args(arguments)
    names = options.parts.split(",")
    unknown = [name for name in names if name not in parts]
    if unknown:
        parser.error(f"no part {', '.join(unknown)}; there are {', '.join(parts)}")
    if options.rehearse:
        os.environ["KIT_REHEARSE"] = "1"
    signal.signal(signal.SIGTERM, stop)
    for folder in (LOGS, WORK / "benchmarks"):  # of a call before
        shutil.rmtree(folder, ignore_errors=True)
    LOGS.mkdir(parents=True)
    for name in (
        "results.jsonl",
        "summary.txt",
        "live.log",
        "tests.xml",
        "benchmarks.json",
        "logs.tgz",
        "caches.tgz",
    ):
        (OUT / name).unlink(missing_ok=True)
    try:
        measure(names, options.budget, parts)
    except KeyboardInterrupt:
        say("interrupted")
        print(table([]))
        return 130
    return int(any(record["status"] == "fail" for record in records()))


if __name__ == "__main__":
    sys.exit(main())
