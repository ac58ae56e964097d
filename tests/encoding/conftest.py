"""A small network, a tokenizer that is easy to check, scans, and what a run leaves behind."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from nibabel.nifti1 import Nifti1Image, save
from torch import Tensor

from meduet_fast.autoencoder import Tokenizer
from meduet_fast.autoencoder.autoencoder import Architecture
from meduet_fast.autoencoder.weights import load_tokenizer, save_safetensors
from meduet_fast.data.intensity import IntensityRule
from meduet_fast.data.store_writer import StoreWriter, VolumeRecord
from meduet_fast.models import MeDUET, MeDUETConfig
from tests.networks import moved_network

RULE = IntensityRule("ct_window", 0.0, 1000.0)
CONFIG = MeDUETConfig(
    latent_size=8, patch_size=2, embed_dim=24, depth=1, num_heads=2, decoder_embed_dim=12, decoder_depth=1,
    decoder_num_heads=2, num_domains=3,
)  # fmt: skip


@pytest.fixture(autouse=True)
def _one_thread(one_thread: None) -> None:
    """Every test here."""


def network(config: MeDUETConfig = CONFIG) -> MeDUET:
    """Every parameter is away from its first value."""
    return moved_network(config)


class PoolingTokenizer(Tokenizer):
    """Average pooling: as fast as can be, and easy to check."""

    channels, compression, identity = 4, 4, "pooling-1"

    def __init__(self) -> None:
        pass

    def encode(
        self, volume: Tensor, sample: bool = False, generator: torch.Generator | None = None
    ) -> Tensor:
        return F.avg_pool3d(volume, 4).repeat(1, 4, 1, 1, 1) * torch.tensor([1, 2, 3, 4]).view(4, 1, 1, 1)

    def decode(self, latents: Tensor) -> Tensor:
        return F.interpolate(latents[:, :1].float(), scale_factor=4)


def write_scan(
    path: Path, size: tuple[int, int, int], seed: int = 0, affine: np.ndarray | None = None
) -> None:
    voxels = np.random.default_rng(seed).uniform(1, 1000, size).astype(np.float32)
    save(Nifti1Image(voxels, np.diag([1.5, 1.5, 1.5, 1.0]) if affine is None else affine), path)


def write_tokenizer(path: Path, seed: int = 0) -> str:
    """Write a tokenizer file, and return its identity."""
    torch.manual_seed(seed)
    architecture = Architecture((4, 4, 4), (1, 1, 1), 2)
    save_safetensors(path, architecture, architecture.build(), {}, {})
    return load_tokenizer(str(path)).identity


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., Path]:
    """``make_run(tokenizer, spec)`` leaves behind a run, and its store with latents of that identity."""

    def make(tokenizer: str, spec: str, spacing: float = 1.5) -> Path:
        store, run = tmp_path / "store", tmp_path / "run"
        with StoreWriter(
            store, tokenizer=tokenizer, tokenizer_spec=spec, channels=4, compression=4
        ) as writer:
            record = VolumeRecord(
                name="a", domain="a", body_part="none", content_key="a", source="a", affine=np.eye(4),
                latent=torch.zeros(4, 8, 8, 8), spacing=(spacing, spacing, spacing), intensity={},
            )  # fmt: skip
            writer.add(record)
        for step in (4, 12):
            checkpoint = run / "checkpoints" / str(step)
            checkpoint.mkdir(parents=True)
            (checkpoint / "run.json").write_text(json.dumps({"config": {}, "data": "", "step": step}))
            network().save_pretrained(checkpoint / "teacher.safetensors")
        (run / "checkpoints" / "4" / "teacher.safetensors").write_bytes(b"an old one")
        (run / "run.json").write_text(json.dumps({"config": {}, "data": str(store)}))
        return run

    return make
