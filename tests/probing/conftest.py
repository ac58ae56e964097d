"""Stores whose latents are known places seen by known acquisitions, and a network to match."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from meduet_fast.data.store import LatentStore
from meduet_fast.data.store_writer import StoreWriter, VolumeRecord
from meduet_fast.models import MeDUETConfig

Volume = tuple[str, str, str, tuple[int, int, int], tuple[float, float, float]]
MakeStore = Callable[..., LatentStore]


@pytest.fixture(autouse=True)
def _one_thread(one_thread: None) -> None:
    """Every test here."""


@pytest.fixture
def config() -> MeDUETConfig:
    return MeDUETConfig(
        latent_size=8, patch_size=2, embed_dim=24, depth=1, num_heads=2, decoder_embed_dim=12,
        decoder_depth=1, decoder_num_heads=2, num_domains=3,
    )  # fmt: skip


@pytest.fixture
def make_store(tmp_path: Path) -> MakeStore:
    """Of (name, domain, body part, grid, origin in mm). Volumes of a body part share one random anatomy; a
    domain adds its own offset. From ``empty_above`` on, along the third axis, all latents are zero."""

    def make(volumes: Sequence[Volume], empty_above: int | None = None) -> LatentStore:
        path = tmp_path / "store"
        domains = sorted({domain for _, domain, *_ in volumes})
        with StoreWriter(path, tokenizer="t-1", tokenizer_spec="t", channels=4, compression=4) as writer:
            for name, domain, part, grid, origin in volumes:
                anatomy = torch.Generator().manual_seed(len(part))
                affine = np.diag([1.5, 1.5, 1.5, 1.0])
                affine[:3, 3] = origin
                latent = torch.randn(4, *grid, generator=anatomy) + domains.index(domain)
                if empty_above is not None:
                    latent[..., empty_above:] = 0
                record = VolumeRecord(
                    name=name,
                    domain=domain,
                    body_part=part,
                    content_key=f"key-{name}",
                    source=f"{name}.nii.gz",
                    latent=latent,
                    affine=affine,
                    spacing=(1.5, 1.5, 1.5),
                    intensity={"kind": "ct_window", "low": 0.0, "high": 1.0},
                )
                writer.add(record)
        return LatentStore.open(path)

    return make
