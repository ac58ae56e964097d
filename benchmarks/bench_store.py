"""What a latent store costs at scale: to open, to add to, to read a crop of, to load from.

``python -m benchmarks.bench_store [--quick] [--json PATH]``

Stores are made up, on the disk of the temporary folder. "Version 1" is how older stores are: (C, X, Y, Z)
and an index of one JSON object; "mapped" reads such files as was done then, through a map of the whole file.

- *open*: each time in a new process; memory is the peak of what opening adds to it, in 1e6 bytes.
- *add*: a small volume to a store that lists n; the two stores take turns.
- *crop, cold*: the file's pages are thrown out of memory before each crop; what the process then reads from
  the disk is counted (``/proc/self/io``), the worst of all crops too. *Warm*: with all in memory.
- *loader*: random crops of few and of many volumes on one core, all in memory; the two take turns.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from meduet_fast.data.crops import CropBatches
from meduet_fast.data.latent_file import PAGE
from meduet_fast.data.store import LatentStore, check_file
from meduet_fast.data.store_index import FORMAT, INDEX_NAME, INDEX_NAME_1, LATENTS, StoreEntry, StoreIndex
from meduet_fast.data.store_writer import StoreWriter, VolumeRecord

from .command import command
from .harness import WRONG, figures
from .results import Row
from .tables import OURS

LISTED = 100_000
LOADED = 1500
GRID = (60, 60, 56)  # latent voxels, of a chest CT
CROP, BATCH = 24, 16
VERSION_1, MAPPED = "ours, version 1", "version 1, mapped"
ADDED_TO, LOADED_FROM = "ours, 10 volumes", "ours, 8 volumes"
OPEN = """
import json, sys, time
from pathlib import Path
from meduet_fast.data.store import LatentStore

def kilobytes(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name + ":"))

Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
before, begin, cpu = kilobytes("VmRSS"), time.perf_counter(), time.process_time()
store = LatentStore.open(sys.argv[1])
seconds, cpu = time.perf_counter() - begin, time.process_time() - cpu
megabytes = (kilobytes("VmHWM") - before) * 1024 / 1e6
print(json.dumps({"seconds": seconds, "cpu": cpu, "megabytes": megabytes, "volumes": len(store.entries)}))
"""


def made_up_index(volumes: int) -> StoreIndex:
    """List volumes that have no files, with names, keys and paths as long as real ones."""
    return StoreIndex(
        "noise",
        "noise",
        4,
        4,
        tuple(
            StoreEntry(
                f"hospital-{number % 40:02d}_patient-{number:07d}_ct",
                f"hospital-{number % 40:02d}",
                "chest",
                (4, 50 + number % 30, 50 + number % 20, 40 + number % 50),
                f"{number:064x}",
                f"/data/scans/hospital-{number % 40:02d}/patient-{number:07d}/ct.nii.gz",
                (1.5, 1.5, 1.5),
            )
            for number in range(volumes)
        ),
    )


def new_writer(path: Path) -> StoreWriter:
    """A writer of noise."""
    return StoreWriter(path, tokenizer="noise", tokenizer_spec="noise", channels=4, compression=4)


def volume(name: str, domain: str, latent: Tensor) -> VolumeRecord:
    """A volume to add."""
    return VolumeRecord(
        name=name,
        domain=domain,
        body_part="chest",
        content_key=name,
        source="noise",
        latent=latent,
        affine=np.diag([1.5, 1.5, 1.5, 1.0]),
        spacing=(1.5, 1.5, 1.5),
        intensity={},
    )


def open_rows(folder: Path, repeats: int) -> list[Row]:
    """Open an index of many volumes, of both versions."""
    index = made_up_index(LISTED)
    paths = {OURS: folder / "listed", VERSION_1: folder / "listed-1"}
    for path in paths.values():
        path.mkdir()
    with (paths[OURS] / INDEX_NAME).open("wb") as file:
        file.writelines(index.lines())
    whole = json.dumps({"format": FORMAT, "version": 1, **asdict(index)}, indent=1)
    (paths[VERSION_1] / INDEX_NAME_1).write_text(whole)
    seconds: dict[str, list[float]] = {name: [] for name in paths}
    further: dict[str, list[tuple[float, float]]] = {name: [] for name in paths}
    for _ in range(repeats):
        for name, path in paths.items():
            done = subprocess.run(
                [sys.executable, "-c", OPEN, path], capture_output=True, text=True, check=True
            )
            found = json.loads(done.stdout)
            if found["volumes"] != LISTED:
                raise AssertionError(f"{found['volumes']} volumes of {name}")
            seconds[name].append(found["seconds"])
            further[name].append((found["megabytes"], found["cpu"]))
    rows = []
    for name in paths:
        megabytes, cpu = np.median(further[name], axis=0).tolist()
        extra = {"megabytes_added": megabytes, "CPU_seconds": cpu}
        fields = {"shape": {"volumes": LISTED}, "extra": extra, **figures(seconds, name)}
        rows.append(Row("store", f"open, {LISTED} volumes", name, "read", **fields))
    return rows


def add_rows(folder: Path, repeats: int) -> list[Row]:
    """Add volumes to a store that lists few, and to one that lists many."""
    latent = torch.randn(4, 16, 16, 16, generator=torch.Generator().manual_seed(0))
    seconds: dict[str, list[float]] = {}
    with ExitStack() as stack:
        writers: dict[str, StoreWriter] = {}
        for name, count in ((OURS, LISTED), (ADDED_TO, 10)):
            path = folder / f"added-{count}"
            path.mkdir()
            with (path / INDEX_NAME).open("wb") as file:
                file.writelines(made_up_index(count).lines())
            writers[name] = stack.enter_context(new_writer(path))
            seconds[name] = []
        for number in range(repeats):
            for name, writer in writers.items():
                record = volume(f"volume-{number}", "ct", latent)
                begin = time.perf_counter()
                writer.add(record)
                seconds[name].append(time.perf_counter() - begin)
    return [
        Row(
            "store", f"add a volume to {LISTED}", name, "write", shape={"volumes": count},
            **figures(seconds, name),
        )
        for name, count in ((OURS, LISTED), (ADDED_TO, 10))
    ]  # fmt: skip


def read_mapped(store: LatentStore, index: int, start: tuple[int, int, int]) -> Tensor:
    """Read a crop through a new map of a file of version 1, that all of its pages may be thrown out again."""
    entry = store.entries[index]
    _, layout = check_file(store.path, entry)
    file = np.memmap(store.path / entry.file, np.int16, "r", layout.first, entry.shape)
    x, y, z = start
    crop = np.ascontiguousarray(file[:, x : x + CROP, y : y + CROP, z : z + CROP])
    return torch.from_numpy(crop).view(torch.bfloat16)


def disk_bytes() -> int:
    """What this process has had read from disks so far."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("read_bytes"))


def crop_rows(folder: Path, repeats: int) -> Iterator[Row]:
    """Read crops at random places, cold and warm, of a file of each layout."""
    latent = torch.randn(4, *GRID, generator=torch.Generator().manual_seed(0)).bfloat16()
    with new_writer(folder / "crop") as writer:
        writer.add(volume("a", "ct", latent))
    store = LatentStore.open(folder / "crop")
    old = LatentStore(folder / "crop-1", replace(store.index, entries=tuple(store.entries)))
    (old.path / LATENTS).mkdir(parents=True)
    save_file({"latent": latent}, old.path / old.entries[0].file, {"content_key": "a"})

    readers: dict[str, tuple[Path, Callable[[tuple[int, int, int]], Tensor]]] = {
        name: (opened.path / opened.entries[0].file, read)
        for name, opened, read in (
            (OURS, store, lambda start: store.read_crops([0], [start], (CROP,) * 3)[0]),
            (VERSION_1, old, lambda start: old.read_crops([0], [start], (CROP,) * 3)[0]),
            (MAPPED, old, lambda start: read_mapped(old, 0, start)),
        )
    }
    rng = np.random.default_rng(0)
    starts = [tuple(rng.integers(0, np.array(GRID) - CROP + 1).tolist()) for _ in range(repeats)]
    for cold in (True, False):
        seconds: dict[str, list[float]] = {name: [] for name in readers}
        read: dict[str, list[int]] = {name: [] for name in readers}
        for x, y, z in starts:
            for name, (path, reader) in readers.items():
                if cold:
                    with path.open("rb") as file:
                        os.fsync(file.fileno())
                        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                before, begin = disk_bytes(), time.perf_counter()
                crop = reader((x, y, z))
                seconds[name].append(time.perf_counter() - begin)
                read[name].append(disk_bytes() - before)
                if not torch.equal(crop, latent[:, x : x + CROP, y : y + CROP, z : z + CROP]):
                    raise AssertionError(f"{name}: crop at {(x, y, z)} is not its slice")
        if cold and min(read[OURS]) < PAGE:
            yield Row(
                "store", "crop, cold", OURS, "read", unavailable="this disk does not count what is read"
            )
            continue
        for name in readers:
            row = Row(
                "store", f"crop of 4x{CROP}^3, {'cold' if cold else 'warm'}", name, "read",
                shape={"edge": CROP}, bytes=8 * CROP**3, **figures(seconds, name),
            )  # fmt: skip
            if cold:
                row.extra["kibibytes_read"] = float(np.median(read[name])) / 1024
                row.extra["at_most"] = max(read[name]) / 1024
            yield row


def loader_rows(folder: Path, repeats: int) -> list[Row]:
    """Load batches of few and of many volumes."""
    latent = torch.randn(4, *GRID, generator=torch.Generator().manual_seed(0)).bfloat16()
    batches: dict[str, CropBatches] = {}
    counts = {OURS: LOADED, LOADED_FROM: 8}
    for name, count in counts.items():
        path = folder / f"loader-{count}"
        with new_writer(path) as writer:
            for number in range(count):
                writer.add(volume(f"volume-{number}", f"domain-{number % 3}", latent))
        store = LatentStore.open(path)
        batches[name] = CropBatches(store, CROP, BATCH)
    seconds: dict[str, list[float]] = {name: [] for name in batches}
    for number in range(repeats):
        for name, stream in batches.items():
            begin = time.perf_counter()
            stream[number]
            seconds[name].append((time.perf_counter() - begin) / BATCH)
    rows = []
    for name in batches:
        fields = figures(seconds, name)
        fields["extra"] = {"samples_per_s": 1e6 / fields["median_us"]}
        shape = {"volumes": counts[name], "batch": BATCH, "edge": CROP}
        rows.append(Row("store", f"loader, {LOADED} volumes", name, "read", shape=shape, **fields))
    return rows


def rows(device: torch.device, quick: bool) -> list[Row]:
    """For a run of all benchmarks; the device is the CPU whatever is asked for."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    found: list[Row] = []
    try:
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            found += open_rows(folder, 3)
            found += add_rows(folder, 50 if quick else 200)
            found += crop_rows(folder, 50 if quick else 200)
            found += loader_rows(folder, 200 if quick else 1000)
    except AssertionError as error:
        found.append(Row("store", "all", OURS, unavailable=f"{WRONG}{error}"))
    finally:
        torch.set_num_threads(threads)
    return found


def main(arguments: list[str] | None = None) -> int:
    """The command; returns the exit code."""
    return command(lambda options: rows(options.device, options.quick), __doc__ or "", arguments)


if __name__ == "__main__":
    sys.exit(main())
