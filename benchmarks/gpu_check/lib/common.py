"""What the parts share: findings as they are made, the time left, a GPU or its stand-in."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

OUT = Path(os.environ.get("OUT", "."))
WORK = Path(os.environ.get("KIT_WORK", "/tmp/gpu-check"))
LOGS = WORK / "logs"
REHEARSE = os.environ.get("KIT_REHEARSE") == "1"
NO_GPU = 4  # exit code


def emit(name: str, status: str, text: str = "", part: str = "", **figures: Any) -> None:
    """Tell one finding: a line on the screen and a line of JSON in ``$OUT/results.jsonl``.

    Args:
        name: of what was looked at.
        status: "ok", "fail", "skip" or "note".
        text: what is to be said of it.
        part: that found it; this process's if not given.
        figures: by name with unit, ``seconds=3``.
    """
    part = part or os.environ.get("KIT_PART", "")
    record = {"part": part, "name": name, "status": status, "text": text, **figures}
    with (OUT / "results.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(record, default=str) + "\n")
    shown = " ".join(f"{key}={value}" for key, value in figures.items())
    print(f"{status.upper():5} {part} {name} {shown} {text[:400]}".rstrip(), flush=True)


def left() -> float:
    """Return the seconds until the part is ended."""
    return float(os.environ.get("KIT_DEADLINE", "inf")) - time.time()


def first_lines(error: BaseException) -> str:
    """Return the type and the first three lines of an error."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: " + " | ".join(lines[:3])[:600]


def require_cuda() -> None:
    """Exit where torch sees no GPU, in a process that starts others which use it; a rehearsal needs none."""
    if not REHEARSE:
        start_cuda()


def start_cuda() -> None:
    """Exit where torch sees no GPU; in a rehearsal, put the stand-in in its place."""
    try:
        import torch
    except Exception as error:
        emit("import torch", "fail", first_lines(error))
        sys.exit(NO_GPU)
    if REHEARSE:
        from .fake_cuda import install

        install()
    if not torch.cuda.is_available():
        emit("cuda", "fail", "torch sees no CUDA device")
        sys.exit(NO_GPU)


def run_command(command: Sequence[str], log: Path) -> tuple[str, list[str]]:
    """Run a command within the part's time, its output in a file.

    Returns:
        Why it failed, empty if it did not; and the lines that it printed.
    """
    how: int | str
    with log.open("w") as file:
        try:
            limit = max(left() - 4, 5)
            how = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, timeout=limit).returncode
        except subprocess.TimeoutExpired:
            how = "stopped, no time left"
    lines = [line.strip() for line in log.read_text(errors="replace").replace("\r", "\n").splitlines()]
    return (f"{how}: " + " | ".join(line for line in lines if line)[-500:] if how else ""), lines
