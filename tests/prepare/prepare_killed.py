"""Prepares a store over and over, each time with settings that make all of it stale, and kills every attempt.

First at random moments, then right after every single rename and every half and whole line of the index; then
so while a store of version 1 is upgraded. After each kill the store must open and every listed volume must
read in full and be what it should be. Prints a JSON object. A program of its own, because a process that has
used torch's threads must not fork.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from meduet_fast.autoencoder import Tokenizer
from meduet_fast.data.intensity import IntensityRule
from meduet_fast.data.sources import VolumeEntry
from meduet_fast.data.store import LatentStore
from meduet_fast.data.transforms import TransformConfig
from meduet_fast.prepare.prepare import PrepareConfig, prepare_volumes
from tests.conftest import rewrite_as_version_1

KILLS, VOLUMES = 20, 8
DIED = 9
CONFIG = PrepareConfig(transform=TransformConfig(spacing=1.5, max_size=(64, 64, 64), min_size=16), workers=0)


class PoolingTokenizer(Tokenizer):
    channels, compression, scale, identity = 4, 4, 1.0, "pooling"

    def __init__(self) -> None: ...

    def encode(
        self, volume: Tensor, sample: bool = False, generator: torch.Generator | None = None
    ) -> Tensor:
        return F.avg_pool3d(volume, 4).repeat(1, 4, 1, 1, 1)

    def decode(self, latents: Tensor) -> Tensor:
        return F.interpolate(latents[:, :1].float(), scale_factor=4).clamp(0, 1)


def volumes_with(folder: Path, upper: float) -> list[VolumeEntry]:
    rule = IntensityRule("ct_window", 0.0, upper)
    return [VolumeEntry(path, "ct", "chest", rule, path.stem) for path in sorted(folder.glob("*.nii"))]


def start(volumes: list[VolumeEntry], store: Path, die_after: int = -1) -> int:
    """Prepare in a child process, which ends right after change number ``die_after``; its process id."""
    child = os.fork()
    if child:
        return child
    replace, write, changes = Path.replace, os.write, 0

    def count() -> None:
        nonlocal changes
        changes += 1
        if changes == die_after:
            os._exit(DIED)

    def replace_and_count(source: Path, target: Path) -> Path:
        moved = replace(source, target)
        count()
        return moved

    def write_and_count(descriptor: int, data: memoryview) -> int:
        half = write(descriptor, data[: len(data) // 2])
        count()
        whole = half + write(descriptor, data[half:])
        count()
        return whole

    Path.replace = replace_and_count  # type: ignore[method-assign]
    os.write = write_and_count  # type: ignore[assignment]
    try:
        prepare_volumes(volumes, store, PoolingTokenizer(), CONFIG)
        os._exit(0)
    finally:
        os._exit(1)


def check(store: Path, expected: dict[str, Tensor]) -> int:
    """Read every listed volume in full; the number of them."""
    opened = LatentStore.open(store)
    for index, item in enumerate(opened.entries):
        assert torch.equal(opened.read_volume(index), expected[item.content_key]), item.name
    return len(opened.entries)


def kill_after_each(
    begin: Callable[[], object],
    volumes: list[VolumeEntry],
    store: Path,
    expected: dict[str, Tensor],
    listed: int = 0,
) -> int:
    """Kill a process that prepares after one change more each time, until all are made; how many they are."""
    for changes in itertools.count(1):
        begin()
        _, status = os.waitpid(start(volumes, store, die_after=changes), 0)
        assert check(store, expected) >= listed
        if os.waitstatus_to_exitcode(status) != DIED:
            assert os.waitstatus_to_exitcode(status) == 0, status
            return changes - 1
    raise AssertionError


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    for seed in range(VOLUMES):
        voxels = np.random.default_rng(seed).integers(1, 1000, (40, 44, 48)).astype(np.int16)
        nib.save(nib.Nifti1Image(voxels, np.diag([1.5, 1.5, 1.5, 1.0])), folder / f"v{seed}.nii")
    settings = [volumes_with(folder, upper) for upper in (1000.0, 500.0)]

    expected: dict[str, Tensor] = {}  # by content key
    for number, volumes in enumerate(settings):
        started = time.monotonic()
        prepare_volumes(volumes, folder / f"whole{number}", PoolingTokenizer(), CONFIG)
        duration = time.monotonic() - started
        whole = LatentStore.open(folder / f"whole{number}")
        expected |= {item.content_key: whole.read_volume(i) for i, item in enumerate(whole.entries)}
    assert len(expected) == 2 * VOLUMES

    store, chance = folder / "store", random.Random(0)
    seen: list[int] = []
    for kill in range(KILLS):
        child = start(settings[kill % 2], store)
        time.sleep(chance.uniform(0, 1.1 * duration))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        if seen or (store / "index.jsonl").exists():  # the very first kill may come before there is a store
            seen.append(check(store, expected))

    # From a whole store whose every part is stale: what a kill leaves may be all that there is to make.
    changes = kill_after_each(
        lambda: prepare_volumes(settings[0][:3], store, PoolingTokenizer(), CONFIG),
        settings[1][:3],
        store,
        expected,
    )
    old = folder / "version1"

    def make_old() -> None:
        prepare_volumes(settings[0][:3], old, PoolingTokenizer(), CONFIG)
        rewrite_as_version_1(old)

    upgrades = kill_after_each(make_old, settings[0][:3], old, expected, listed=3)

    summary = prepare_volumes(settings[0], store, PoolingTokenizer(), CONFIG)
    leftovers = [path for path in store.rglob("*") if ".tmp" in path.name]
    assert not summary.failed, summary.failed
    assert not leftovers, leftovers
    final = check(store, expected)
    result = {
        "kills": KILLS,
        "entries": seen,
        "changes": changes,
        "upgrades": upgrades,
        "volumes": VOLUMES,
        "final": final,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
