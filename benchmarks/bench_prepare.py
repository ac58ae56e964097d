"""Seconds to prepare a scan, read in this process and ahead of it, where no encoder is the limit.

``python -m benchmarks.bench_prepare [--data SCANS] [--workers 2] [--repeats 3] [--json PATH]``

The tokenizer is a mean over 4^3 voxels. Starting the processes counts: it takes some seconds of a core each,
so the scans should be many, or large. CPU seconds tell what a busy machine hides: this process's own,
and all.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from meduet_fast.autoencoder import Tokenizer
from meduet_fast.data.intensity import CT
from meduet_fast.data.sources import VolumeEntry, find_volumes
from meduet_fast.prepare.prepare import PrepareConfig, prepare_volumes

from .command import command
from .harness import figures
from .results import Row
from .tables import OURS

MADE = 24


class Pooling(Tokenizer):
    """Means over 4^3 voxels: next to no work."""

    channels, compression, scale, identity = 4, 4, 1.0, "pooling"

    def __init__(self) -> None: ...

    def encode(
        self, volume: Tensor, sample: bool = False, generator: torch.Generator | None = None
    ) -> Tensor:
        """Return (1, 4, x, y, z) of an image (1, 1, X, Y, Z)."""
        return F.avg_pool3d(volume, 4).repeat(1, 4, 1, 1, 1)

    def decode(self, latents: Tensor) -> Tensor:
        """Return (1, 1, X, Y, Z) of latents (1, 4, x, y, z)."""
        return F.interpolate(latents[:, :1].float(), scale_factor=4).clamp(0, 1)


def make_scans(folder: Path) -> list[VolumeEntry]:
    """Write noise in the shape of abdominal CTs with thick slices."""
    for number in range(MADE):
        noise = np.random.default_rng(number).normal(0, 100, (512, 512, 60)).astype(np.int16)
        nib.Nifti1Image(noise, np.diag([0.8, 0.8, 5, 1])).to_filename(folder / f"{number}.nii.gz")
    return find_volumes(folder, intensity=CT).volumes


def measure_rows(data: Path | None, workers: int, repeats: int) -> list[Row]:
    """Measure reading ahead and reading in this process, which take turns; times are of one scan."""
    times: dict[str, list[float]] = {OURS: [], "read in one process": []}
    own: dict[str, list[float]] = {name: [] for name in times}
    everyone: dict[str, list[float]] = {name: [] for name in times}
    with tempfile.TemporaryDirectory() as temporary:
        scans = Path(temporary, "scans")
        scans.mkdir()
        volumes = find_volumes(data).volumes if data else make_scans(scans)
        for repeat in range(repeats):
            for name, count in zip(times, (workers, 0), strict=True):
                config = replace(PrepareConfig(device="cpu"), workers=count)
                started, before = time.perf_counter(), os.times()
                summary = prepare_volumes(volumes, Path(temporary, f"{repeat}-{count}"), Pooling(), config)
                after = os.times()
                assert not summary.failed, summary.failed
                times[name].append((time.perf_counter() - started) / len(volumes))
                mine = after.user + after.system - before.user - before.system
                theirs = (
                    after.children_user
                    + after.children_system
                    - before.children_user
                    - before.children_system
                )
                own[name].append(mine / len(volumes))
                everyone[name].append((mine + theirs) / len(volumes))
    rows = []
    for name in times:
        fields: dict[str, Any] = figures(times, name)
        fields["extra"] = {
            "own_cpu_s": float(np.median(own[name])),
            "cpu_s": float(np.median(everyone[name])),
        }
        case = f"{len(volumes)} scans, {workers} workers"
        rows.append(Row("prepare", case, name, direction="read", shape={"scans": len(volumes)}, **fields))
    return rows


def main(arguments: list[str] | None = None) -> int:
    """The command; returns the exit code."""

    def add_options(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--data", type=Path, help=f"input of prepare; {MADE} scans of noise if not given")
        parser.add_argument("--workers", type=int, default=2, help="processes that read ahead")
        parser.add_argument("--repeats", type=int, default=3, help="measurements of each")

    return command(
        lambda options: measure_rows(options.data, options.workers, options.repeats),
        __doc__ or "",
        arguments,
        add_options,
    )


if __name__ == "__main__":
    sys.exit(main())
