"""A factory of small latent stores with random latents; SimpleITK."""

from __future__ import annotations

import locale
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from meduet_fast.data.crops import CropBatches
from meduet_fast.data.store import LatentStore
from meduet_fast.data.store_writer import StoreWriter, VolumeRecord

MakeStore = Callable[..., tuple[LatentStore, dict[str, Tensor]]]
THREE_DOMAINS = {
    "a0": ("a", (12, 9, 8)),
    "a1": ("a", (13, 8, 8)),
    "a2": ("a", (12, 8, 10)),
    "b0": ("b", (14, 8, 8)),
    "c0": ("c", (12, 8, 9)),
    "c1": ("c", (12, 8, 8)),
}


def small(store: LatentStore, **changes: Any) -> CropBatches:
    return CropBatches(store, **{"crop_size": 4, "batch_size": 8, "seed": 5, **changes})


def record(name: str, domain: str, latent: Tensor) -> VolumeRecord:
    return VolumeRecord(
        name=name,
        domain=domain,
        body_part="chest",
        content_key=f"key-{name}",
        source=f"/input/{name}.nii.gz",
        latent=latent,
        affine=np.diag([1.5, 1.5, 1.5, 1.0]),
        spacing=(1.5, 1.5, 1.5),
        intensity={"kind": "ct_window", "low": -175.0, "high": 250.0},
    )


@pytest.fixture
def make_store(tmp_path: Path) -> MakeStore:
    """``make_store({"name": ("domain", (X, Y, Z))})`` gives the open store and the latents by name."""

    def make(
        volumes: dict[str, tuple[str, tuple[int, int, int]]], path: Path = tmp_path / "store"
    ) -> tuple[LatentStore, dict[str, Tensor]]:
        generator = torch.Generator().manual_seed(0)
        latents = {}
        with StoreWriter(
            path, tokenizer="fake-1", tokenizer_spec="fake", channels=4, compression=4
        ) as writer:
            for name, (domain, grid) in volumes.items():
                latents[name] = torch.randn(4, *grid, generator=generator).bfloat16()
                writer.add(record(name, domain, latents[name]))
        return LatentStore.open(path), latents

    return make


@pytest.fixture
def sitk() -> Iterator[Any]:
    before = locale.setlocale(locale.LC_ALL)
    yield pytest.importorskip("SimpleITK")
    locale.setlocale(locale.LC_ALL, before)  # which DICOM's writer changes
