"""Prepares a store over and over, each time with settings that make all of it stale, and kills every attempt.

First at random moments, then right after every single rename. After each kill the store must open and every
listed volume must read in full and be what it should be. Prints a JSON object. A program of its own, because
a process that has used torch's threads must not fork.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from meduet_fast.autoencoder import Tokenizer
from meduet_fast.data import store_writer
from meduet_fast.data.intensity import IntensityRule
from meduet_fast.data.sources import VolumeEntry
from meduet_fast.data.store import LatentStore
from meduet_fast.data.transforms import TransformConfig
from meduet_fast.prepare.prepare import PrepareConfig, prepare_volumes

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
        raise NotImplementedError


def volumes_with(folder: Path, upper: float) -> list[VolumeEntry]:
    rule = IntensityRule("ct_window", 0.0, upper)
    return [VolumeEntry(path, "ct", "chest", rule, path.stem) for path in sorted(folder.glob("*.nii"))]


def start(volumes: list[VolumeEntry], store: Path, die_after: int = -1) -> int:
    """Prepare in a child process, which ends right after its rename number ``die_after``; its process id."""
    child = os.fork()
    if child:
        return child
    replace, renames = Path.replace, 0

    def replace_and_die(source: Path, target: Path) -> Path:
        nonlocal renames
        moved = replace(source, target)
        renames += 1
        if renames == die_after:
            os._exit(DIED)
        return moved

    Path.replace = replace_and_die  # type: ignore[method-assign]
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


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    store_writer.INDEX_INTERVAL_S = 0.0  # these volumes take milliseconds; list each one at once
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
        if seen or (store / "index.json").exists():  # the very first kill may come before there is a store
            seen.append(check(store, expected))

    renames = 0
    while True:
        renames += 1
        # From a whole store whose every part is stale: what a kill leaves may be all that there is to make.
        prepare_volumes(settings[0][:3], store, PoolingTokenizer(), CONFIG)
        _, status = os.waitpid(start(settings[1][:3], store, die_after=renames), 0)
        check(store, expected)
        if os.waitstatus_to_exitcode(status) != DIED:
            break
    assert os.waitstatus_to_exitcode(status) == 0, status

    summary = prepare_volumes(settings[0], store, PoolingTokenizer(), CONFIG)
    leftovers = [path for path in store.rglob("*") if ".tmp" in path.name]
    assert not summary.failed, summary.failed
    assert not leftovers, leftovers
    final = check(store, expected)
    result = {"kills": KILLS, "entries": seen, "renames": renames, "volumes": VOLUMES, "final": final}
    print(json.dumps(result))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
