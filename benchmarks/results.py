"""What a benchmark leaves behind: rows of figures, and where and with what they were measured.

One file a run, ``benchmarks/results/<device>/<date>-<commit>.json``: provenance, the machine's measured
peaks, and the rows. Tables, plots, comparisons and the figures in README and docs are made from these files.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path

import torch

from meduet_fast.files import atomic_path

RESULTS = Path(__file__).parent / "results"
SCHEMA = 1
_PACKAGES = ("triton", "monai", "diffusers", "flash-attn", "xformers", "liger-kernel", "torchao", "nibabel")


@dataclass(frozen=True)
class Row:
    """One variant of one case, as measured. Times are microseconds a call.

    Attributes:
        bench: name of the benchmark, as in ``bench_<name>``.
        case: what was computed: the workload's name; equal for all variants that are compared.
        variant: who computed it; "ours" is the project's fastest form.
        direction: "forward", "forward_backward", "step" (optimiser included), "read" or "write" (data).
        dtype: of the inputs, "bfloat16" or the like; "" where none is meant.
        shape: sizes by name (batch, rows, tokens, width, ...), numbers that plots can put on an axis.
        unavailable: why nothing was measured, for example "xformers is not installed"; empty if it was.
        median_us: median over the repeats, caches warm.
        low_us: 10th percentile.
        high_us: 90th percentile.
        repeats: timed calls.
        cold_us: median with the device's L2 cache emptied before each call; None on the CPU.
        host_us: the host's time a call, without waiting for the device; None on the CPU.
        bytes: that the computation has to move, stated by the operation; None if it states none.
        flops: that it has to do; None likewise.
        peak_memory: bytes allocated above the inputs at the worst moment; None if not measured.
        ratios: by variant, the median over interleaved pairs of that variant's time over this one's: above 1,
            this one is faster.
        ratio_spread: by variant, 10th and 90th percentile of the same ratios.
        extra: further figures by name with its unit, for example ``samples_per_s``.
    """

    bench: str
    case: str
    variant: str
    direction: str = "forward"
    dtype: str = ""
    shape: dict[str, int] = field(default_factory=dict)
    unavailable: str = ""
    median_us: float | None = None
    low_us: float | None = None
    high_us: float | None = None
    repeats: int = 0
    cold_us: float | None = None
    host_us: float | None = None
    bytes: int | None = None
    flops: int | None = None
    peak_memory: int | None = None
    ratios: dict[str, float] = field(default_factory=dict)
    ratio_spread: dict[str, tuple[float, float]] = field(default_factory=dict)
    extra: dict[str, float] = field(default_factory=dict)

    @property
    def key(self) -> tuple[str, str, str, str, str]:
        """What makes rows of two runs comparable."""
        return self.bench, self.case, self.variant, self.direction, self.dtype


@dataclass(frozen=True)
class Results:
    """A run.

    Attributes:
        provenance: device, driver, versions, commit, date; see :func:`provenance`.
        peaks: what the machine reached in this run: ``copy_bytes_per_s``, and ``matrix_flops_per_s_<dtype>``.
        rows: the figures.
    """

    provenance: dict[str, str]
    peaks: dict[str, float]
    rows: list[Row]

    def share_of_peak(self, row: Row) -> float | None:
        """How much of the machine's measured peak a row reached, 0 to 1: the larger of bytes and FLOPs.

        None where the row or the peak says nothing.
        """
        if row.median_us is None:
            return None
        seconds, shares = row.median_us / 1e6, []
        if row.bytes and self.peaks.get("copy_bytes_per_s"):
            shares.append(row.bytes / seconds / self.peaks["copy_bytes_per_s"])
        rate = self.peaks.get(f"matrix_flops_per_s_{row.dtype}")
        if row.flops and rate:
            shares.append(row.flops / seconds / rate)
        return max(shares, default=None)

    def save(self, path: Path | None = None) -> Path:
        """Write to ``path``, or to the place that date, commit and device give below ``results/``."""
        if path is None:
            name = f"{self.provenance['date'][:10]}-{self.provenance['commit']}.json"
            path = RESULTS / device_folder(self.provenance["device"]) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        content = {
            "schema": SCHEMA,
            "provenance": self.provenance,
            "peaks": self.peaks,
            "rows": [
                {key: value for key, value in asdict(row).items() if value not in (None, {}, "")}
                for row in self.rows
            ],
        }
        with atomic_path(path) as temporary:
            temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        return path

    @classmethod
    def load(cls, path: Path) -> Results:
        """Read a file that :meth:`save` wrote.

        Raises:
            ValueError: naming the file, if it is not one.
        """
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if content["schema"] != SCHEMA:
                raise ValueError(f"schema {content['schema']}, expected {SCHEMA}")
            for row in content["rows"]:
                row["ratio_spread"] = {key: tuple(pair) for key, pair in row.get("ratio_spread", {}).items()}
            return cls(content["provenance"], content["peaks"], [Row(**row) for row in content["rows"]])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}: not a file of results: {error}") from error


def device_folder(device: str) -> str:
    """A device's name as a folder: "NVIDIA H100 80GB HBM3" -> "nvidia-h100-80gb-hbm3"."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


def _output(*command: str) -> str:
    """Return what a command prints, in the folder of this file; nothing where it is not installed."""
    try:
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    except FileNotFoundError:
        return ""
    return done.stdout.strip()


def commit() -> str:
    """Return the commit of the code, with "-dirty" if something was changed since.

    It is MEDUET_COMMIT where that is set: of a copy on another machine git knows nothing, or another state.
    """
    told = os.environ.get("MEDUET_COMMIT")
    return (
        told or _output("git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*") or "unknown"
    )


def device_name(device: torch.device) -> str:
    """The GPU's name, or the processor's."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text(encoding="utf-8") if cpuinfo.is_file() else ""
    found = re.search(r"^model name\s*: (.+)$", text, re.MULTILINE)
    return found.group(1) if found else platform.processor() or platform.machine()


def provenance(device: torch.device) -> dict[str, str]:
    """Device, driver, threads, versions, commit and date (UTC)."""
    found = {
        "device": device_name(device),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": str(torch.get_num_threads()),
    }
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    if device.type == "cuda":
        found["driver, clock, power"] = (
            _output(
                "nvidia-smi",
                "--query-gpu=driver_version,clocks.max.sm,power.limit",
                "--format=csv,noheader",
            )
            or "unknown"
        )
        found["cuda"] = torch.version.cuda or "none"
        found["cudnn"] = str(torch.backends.cudnn.version())
    return found


def latest(folder: Path) -> Path | None:
    """The newest results in a device's folder, by name (which begins with the date)."""
    return max(folder.glob("*.json"), default=None, key=lambda path: path.name)


def history(folder: Path) -> Sequence[Path]:
    """All results of a device, oldest first."""
    return sorted(folder.glob("*.json"), key=lambda path: path.name)
