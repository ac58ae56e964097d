"""Crops a second from the latent store, beside a MONAI PersistentDataset of gzip latents, on one core.

``python -m benchmarks.bench_loader [--data STORE] [--repeats 5] [--seconds 2] [--json PATH]``

The peer is built as the published MeDUET code builds it: four files a volume, PersistentDataset with its
cache filled, random crop, three flips, a quarter turn. It is timed twice. As published, it writes its cache
with pickle's highest protocol, which today's torch refuses to read: every read unpacks the gzip file again.
With the default protocol the cache works. Ours is timed twice, too: the crops alone, which is what loading
costs in training (flips and turns happen on the GPU), and with flips and turns on this CPU, which is the same
work as the peer's. Nothing is timed before our crops are shown to be slices of the peer's volumes.
"""

from __future__ import annotations

import argparse
import itertools
import logging
import pickle
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.serialization import DEFAULT_PROTOCOL
from torch.utils.data import DataLoader, RandomSampler

from meduet_fast.data.augment import augment
from meduet_fast.data.crops import CropBatches
from meduet_fast.data.loader import crop_loader
from meduet_fast.data.store import LatentStore
from meduet_fast.data.store_writer import StoreWriter, VolumeRecord

from .command import command
from .harness import WRONG, figures
from .results import Row
from .tables import OURS

CROP, BATCH = 24, 16
ENDLESS = 2**40
OURS_AUGMENTED = "ours, with flips and turns"
PUBLISHED = "MONAI as published, with flips and turns"
MENDED = "MONAI, cache working, with flips and turns"


def make_store(
    path: Path,
    volumes: int = 8,
    grid: tuple[int, int, int] = (60, 60, 56),
    tokenizer: str = "noise",
    spec: str = "noise",
) -> LatentStore:
    """A store of noise, by default its volumes as large as those of a chest CT; a tokenizer is its maker."""
    generator = torch.Generator().manual_seed(0)
    with StoreWriter(path, tokenizer=tokenizer, tokenizer_spec=spec, channels=4, compression=4) as writer:
        for number in range(volumes):
            record = VolumeRecord(
                name=f"volume_{number}",
                domain=f"domain_{number % 3}",
                body_part="chest",
                content_key=str(number),
                source="noise",
                latent=torch.randn(4, *grid, generator=generator),
                affine=np.diag([1.5, 1.5, 1.5, 1.0]),
                spacing=(1.5, 1.5, 1.5),
                intensity={},
            )
            writer.add(record)
    return LatentStore.open(path)


def write_published_cache(store: LatentStore, folder: Path) -> list[dict[str, str]]:
    """The store's volumes in the published layout; one dict of paths per volume."""
    import nibabel as nib

    items = []
    for index, entry in enumerate(store.entries):
        base = str(folder / entry.name)
        latent = store.read_volume(index).float().permute(1, 2, 3, 0).numpy()
        nib.save(nib.Nifti1Image(latent, np.eye(4)), f"{base}_latent.nii.gz")
        np.save(f"{base}_domain.npy", np.array([store.domain_id(index)]))
        np.save(f"{base}_voxel.npy", np.array([entry.spacing]))
        np.save(f"{base}_bp.npy", np.array([0]))
        endings = {"latent": "nii.gz", "domain": "npy", "voxel": "npy", "bp": "npy"}
        items.append({key: f"{base}_{key}.{ending}" for key, ending in endings.items()})
    return items


def peer_batches(items: list[dict[str, str]], cache: Path, pickle_protocol: int) -> Iterator[Tensor]:
    """Endless batches (B, 4, s, s, s) of the MONAI loader, its cache filled."""
    from monai.data import PersistentDataset
    from monai.transforms import (
        Compose,
        EnsureChannelFirstd,
        EnsureTyped,
        LoadImaged,
        RandFlipd,
        RandRotate90d,
        RandSpatialCropd,
    )

    transform = Compose(
        [
            LoadImaged(keys=["latent", "domain", "voxel", "bp"]),
            EnsureChannelFirstd(keys=["latent"], channel_dim=-1),
            RandSpatialCropd(keys=["latent"], roi_size=[CROP] * 3, random_size=False),
            *(RandFlipd(keys=["latent"], prob=0.2, spatial_axis=axis) for axis in range(3)),
            RandRotate90d(keys=["latent"], prob=0.2, max_k=3),
            EnsureTyped(keys=["latent"], dtype=torch.float32),
        ]
    )
    dataset = PersistentDataset(items, transform, cache_dir=cache, pickle_protocol=pickle_protocol)
    for index in range(len(items)):
        dataset[index]
    sampler = RandomSampler(dataset, replacement=True, num_samples=ENDLESS)
    for batch in DataLoader(dataset, batch_size=BATCH, sampler=sampler):
        yield batch["latent"]


def our_batches(store: LatentStore, augmented: bool) -> Iterator[Tensor]:
    """Endless batches (B, 4, s, s, s) of the latent store."""
    generator = torch.Generator().manual_seed(0)
    loader = crop_loader(CropBatches(store, CROP, BATCH), total_steps=ENDLESS)
    for batch in loader:
        yield augment(batch["latents"], generator) if augmented else batch["latents"]


def check(store: LatentStore, items: list[dict[str, str]]) -> None:
    """Make sure that our crops are slices of the volumes that the peer reads.

    Raises:
        AssertionError: they are not.
    """
    import nibabel as nib

    latents = [
        torch.from_numpy(nib.Nifti1Image.from_filename(item["latent"]).get_fdata(dtype=np.float32)).permute(
            3, 0, 1, 2
        )
        for item in items
    ]
    for batch in crop_loader(CropBatches(store, CROP, BATCH), total_steps=8):
        for crop, volume, start in zip(
            batch["latents"], batch["volume"].tolist(), batch["start"].tolist(), strict=True
        ):
            window = [slice(None), *(slice(first, first + CROP) for first in start)]
            if not torch.equal(crop.float(), latents[volume][window]):
                raise AssertionError(f"crop at {start} of {store.entries[volume].name} is not its slice")


def measure(batches: Iterator[Tensor], seconds: float) -> float:
    """Crops a second over at least ``seconds`` and one batch."""
    begin, crops = time.perf_counter(), 0
    while crops == 0 or time.perf_counter() - begin < seconds:
        crops += len(next(batches))
    return crops / (time.perf_counter() - begin)


def measure_all(store: LatentStore, folder: Path, repeats: int, seconds: float) -> dict[str, list[float]]:
    """Crops a second of every repeat, the loaders taking turns.

    Raises:
        AssertionError: crops are not slices of the volumes.
        ImportError: for MONAI or nibabel.
    """
    items = write_published_cache(store, folder)
    check(store, items)
    batches: dict[str, Iterator[Tensor]] = {
        OURS: our_batches(store, augmented=False),
        OURS_AUGMENTED: our_batches(store, augmented=True),
        PUBLISHED: peer_batches(items, folder / "published", pickle.HIGHEST_PROTOCOL),
        MENDED: peer_batches(items, folder / "mended", DEFAULT_PROTOCOL),
    }
    for stream in batches.values():
        next(stream)
    rates: dict[str, list[float]] = {name: [] for name in batches}
    for _, (name, stream) in itertools.product(range(repeats), batches.items()):
        rates[name].append(measure(stream, seconds))
    return rates


def measure_rows(data: Path | None, repeats: int, seconds: float) -> list[Row]:
    """A row for each loader, on one core; times are those of one crop.

    Args:
        data: latent store; 8 volumes of 4x60x60x56 noise if None.
        repeats: measurements of each loader.
        seconds: length of one.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    try:
        with tempfile.TemporaryDirectory() as temporary, warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            store = LatentStore.open(data) if data else make_store(Path(temporary, "store"))
            case = f"crops of 4x{CROP}^3 of {len(store.entries)} volumes"
            common: dict[str, Any] = {"direction": "read", "shape": {"batch": BATCH, "edge": CROP}}
            cache = Path(temporary, "published")
            cache.mkdir()
            try:
                rates = measure_all(store, cache, repeats, seconds)
            except AssertionError as error:
                return [Row("loader", case, OURS, **common, unavailable=f"{WRONG}{error}")]
        refused = sum("cache file" in str(warning.message) for warning in caught)
    finally:
        logging.disable(logging.NOTSET)
        torch.set_num_threads(threads)
    times = {name: [1 / rate for rate in values] for name, values in rates.items()}
    rows = []
    for name in times:
        fields = figures(times, name)
        fields["extra"] = {"samples_per_s": 1e6 / fields["median_us"]}
        if name == PUBLISHED:
            fields["extra"]["cache_reads_refused"] = refused
        rows.append(Row("loader", case, name, **common, **fields))
    return rows


def rows(device: torch.device, quick: bool) -> list[Row]:
    """For a run of all benchmarks; the device is the CPU whatever is asked for."""
    return measure_rows(None, repeats=5, seconds=0.5 if quick else 2.0)


def main(arguments: list[str] | None = None) -> int:
    """The command; returns the exit code."""

    def add_options(parser: argparse.ArgumentParser) -> None:
        parser.add_argument(
            "--data", type=Path, help="latent store; 8 volumes of 4x60x60x56 noise if not given"
        )
        parser.add_argument("--repeats", type=int, default=5, help="measurements per loader")
        parser.add_argument("--seconds", type=float, default=2.0, help="length of one measurement")

    return command(
        lambda options: measure_rows(options.data, options.repeats, options.seconds),
        __doc__ or "",
        arguments,
        add_options,
    )


if __name__ == "__main__":
    sys.exit(main())
