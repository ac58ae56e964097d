"""Volumes that other processes load are the same, and what happens to one of them stays its own."""

from __future__ import annotations

import inspect
import os
import signal
import subprocess
import time
from contextlib import closing
from pathlib import Path
from threading import Thread
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch

from meduet_fast.data.intensity import IntensityRule
from meduet_fast.data.sources import VolumeEntry
from meduet_fast.data.transforms import TransformConfig
from meduet_fast.errors import UserError, VolumeError
from meduet_fast.prepare import load_ahead as load_ahead_module
from meduet_fast.prepare.load_ahead import Loader, load_ahead
from meduet_fast.prepare.update import one_by_one

LOADER = Loader(TransformConfig(spacing=1.5, max_size=(64, 64, 64), min_size=16), "tokenizer")


def entry(path: Path) -> VolumeEntry:
    return VolumeEntry(path, "ct", "chest", IntensityRule("ct_window", 0.0, 1000.0), path.name)


@pytest.fixture
def volumes(tmp_path: Path) -> list[VolumeEntry]:
    """Two volumes of oblique grids, whose interpolation has every kind of rounding."""
    found = []
    for seed in range(2):
        voxels = np.random.default_rng(seed).integers(1, 1000, (40, 44, 38)).astype(np.int16)
        affine = np.diag([0.9, 1.1, 1.7, 1])
        affine[0, 1], affine[2, 0] = 0.1, -0.05
        path = tmp_path / f"{seed}.nii.gz"
        nib.save(nib.Nifti1Image(voxels, affine), path)
        found.append(entry(path))
    return found


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[subprocess.Popen[bytes]]:
    """The processes that were started."""
    processes: list[subprocess.Popen[bytes]] = []
    start = subprocess.Popen

    def record(*arguments: Any, **more: Any) -> subprocess.Popen[bytes]:
        processes.append(start(*arguments, **more))
        return processes[-1]

    monkeypatch.setattr(load_ahead_module.subprocess, "Popen", record)
    return processes


def has_reader(fifo: Path) -> bool:
    try:
        os.close(os.open(fifo, os.O_WRONLY | os.O_NONBLOCK))
    except OSError:
        return False
    return True


def test_volumes_are_the_same_and_a_killed_process_loses_its_own_alone(
    tmp_path: Path, volumes: list[VolumeEntry], started: list[subprocess.Popen[bytes]]
) -> None:
    stuck, bad = entry(tmp_path / "stuck.nii"), entry(tmp_path / "bad.nii")
    os.mkfifo(stuck.path)  # whoever opens it waits
    bad.path.write_bytes(b"no scan")

    def kill() -> None:
        while not has_reader(stuck.path):
            time.sleep(0.05)
        os.kill(started[0].pid, signal.SIGKILL)

    Thread(target=kill, daemon=True).start()
    found = dict(load_ahead([bad, volumes[0], stuck, volumes[1]], LOADER, 1))
    assert len(started) == 2
    assert all(process.poll() is not None for process in started)

    killed, refused = found[stuck], found[bad]
    assert isinstance(killed, VolumeError)
    assert str(killed) == (
        f"{stuck.path}: the process that read it was killed by SIGKILL "
        "(out of memory? fewer --workers need less)"
    )
    assert isinstance(refused, VolumeError)
    assert str(refused) == f"{bad.path}: not a NIfTI file"
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        expected = dict(one_by_one(LOADER.load)(volumes))
    finally:
        torch.set_num_threads(threads)
    for volume in volumes:
        there, here = found[volume], expected[volume]
        assert not isinstance(there, VolumeError)
        assert not isinstance(here, VolumeError)
        assert there[0] == here[0]
        assert torch.equal(there[1].image, here[1].image)
        assert np.array_equal(there[1].affine, here[1].affine)
        assert (there[1].spacing, there[1].scan) == (here[1].spacing, here[1].scan)


def test_processes_end_with_the_iterator(tmp_path: Path, started: list[subprocess.Popen[bytes]]) -> None:
    stuck = entry(tmp_path / "stuck.nii")
    os.mkfifo(stuck.path)
    bad = entry(tmp_path / "bad.txt")
    with closing(load_ahead([bad, stuck, stuck], LOADER, 1)) as loaded:  # type: ignore[type-var]
        volume, outcome = next(loaded)
        assert volume == bad
        assert isinstance(outcome, VolumeError)
        assert [process.poll() for process in started] == [None]
    assert [process.poll() for process in started] == [-signal.SIGKILL]


WATCHED = f"""
import os, sys, threading, time
{inspect.getsource(load_ahead_module._end_with_parent)}
threading.Thread(target=_end_with_parent, daemon=True).start()
time.sleep(0.1)
raise SystemExit(3)
"""


@pytest.mark.parametrize("program", ["raise SystemExit(3)", WATCHED])
def test_processes_that_cannot_work_end_the_run(
    volumes: list[VolumeEntry], monkeypatch: pytest.MonkeyPatch, program: str
) -> None:
    monkeypatch.setattr(load_ahead_module, "PROGRAM", program)
    with pytest.raises(UserError, match=r"ended with exit code 3 \(see above\); try --workers 0"):
        list(load_ahead(volumes, LOADER, 2))


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (KeyError("a\nb"), r"unexpected KeyError in test_load_ahead\.py:\d+: 'a\\nb'"),
        (ValueError("two\nlines"), r"unexpected ValueError in test_load_ahead\.py:\d+: two lines"),
        (MemoryError(), "does not fit into memory"),
        (VolumeError("else", "is bad"), "is bad"),
        (UserError("found 0, expected 1"), "0.nii.gz: found 0, expected 1"),
    ],
)
def test_what_nobody_foresaw_is_one_volumes_failure(
    volumes: list[VolumeEntry], monkeypatch: pytest.MonkeyPatch, error: Exception, reason: str
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(load_ahead_module, "load_volume", fail)
    with pytest.raises(VolumeError, match=reason) as caught:
        LOADER.load(volumes[0])
    assert caught.value.path == (Path("else") if isinstance(error, VolumeError) else volumes[0].path)
    monkeypatch.setattr(load_ahead_module, "content_key", fail)
    with pytest.raises(VolumeError, match=reason):
        LOADER.key(volumes[0])
