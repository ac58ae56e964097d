"""A finished run on a small store with a small real tokenizer."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from nibabel.nifti1 import Nifti1Image, save

from meduet_fast.autoencoder.autoencoder import Architecture
from meduet_fast.autoencoder.weights import save_safetensors
from meduet_fast.data.store import LatentStore
from meduet_fast.data.store_writer import StoreWriter, VolumeRecord
from meduet_fast.models import MeDUETConfig
from meduet_fast.prepare.prepare import PrepareConfig, prepare
from meduet_fast.pretraining import OptimizerConfig, PretrainConfig, pretrain

MODEL = MeDUETConfig(
    latent_size=8, patch_size=2, embed_dim=24, depth=1, num_heads=2, decoder_embed_dim=12, decoder_depth=1,
    decoder_num_heads=2, num_domains=3,
)  # fmt: skip
CONFIG = PretrainConfig(
    model=MODEL,
    optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=2),
    steps=8, batch_size=4, mftd_start_step=4, held_out_fraction=0.4, workers=0, device="cpu", log_every=1,
    checkpoint_every=4,
)  # fmt: skip


@pytest.fixture(autouse=True)
def _one_thread(one_thread: None) -> None:
    """Every test here."""


def write_tokenizer(path: Path, seed: int = 0) -> None:
    torch.manual_seed(seed)
    architecture = Architecture((4, 4, 4), (1, 1, 1), 2)
    save_safetensors(path, architecture, architecture.build(), {}, {})


def write_manifest(folder: Path) -> Path:
    """A chest scanned twice, as "sharp" and as "bright", and a "head"."""
    random = np.random.default_rng(0)
    chest = random.uniform(20, 200, (96, 64, 64)).astype(np.float32)
    head = random.uniform(20, 200, (100, 64, 64)).astype(np.float32)
    lines = ["datasets:"]
    for name, part, voxels in (
        ("sharp", "chest", chest),
        ("bright", "chest", chest + 40),
        ("head", "head", head),
    ):
        affine = np.diag([1.5, 1.5, 1.5, 1.0])
        affine[:3, 3] = (-60, -50, -40)
        save(Nifti1Image(voxels, affine), folder / f"{name}.nii")
        lines.append(
            f"- {{name: {name}, path: {name}.nii, body_part: {part}, intensity: {{ct_window: [0, 250]}}}}"
        )
    manifest = folder / "manifest.yaml"
    manifest.write_text("\n".join(lines))
    return manifest


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``store``, ``run`` and what they were made from; copy before changing it."""
    folder = tmp_path_factory.mktemp("report")
    write_tokenizer(folder / "tokenizer.safetensors")
    manifest = write_manifest(folder)
    prepare(manifest, folder / "store", PrepareConfig(tokenizer=str(folder / "tokenizer.safetensors")))
    assert len(LatentStore.open(folder / "store").entries) == 3
    pretrain(folder / "store", folder / "run", CONFIG)
    return folder


@pytest.fixture
def copied(finished: Path, tmp_path: Path) -> Path:
    """A copy of the run, on the shared store, to do harm to."""
    shutil.copytree(finished / "run", tmp_path / "run", ignore=shutil.ignore_patterns("report", "state"))
    return tmp_path / "run"


def point_to(run: Path, store: Path) -> None:
    """Make ``run`` remember another store."""
    settings = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps({**settings, "data": str(store)}))


@pytest.fixture(scope="session")
def small_volumes(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of two people, each scanned as "sharp" and as "bright", and a head; no axis holds two crops."""
    known = LatentStore.open(finished / "store")
    path = tmp_path_factory.mktemp("small") / "store"
    with StoreWriter(
        path, tokenizer=known.index.tokenizer, tokenizer_spec=known.index.tokenizer_spec, channels=4,
        compression=4,
    ) as writer:  # fmt: skip
        for index, entry in enumerate(known.entries):
            for person in range(1 if entry.domain == "head" else 2):
                affine = np.diag([1.5, 1.5, 1.5, 1.0])
                affine[:3, 3] = (-60 - person, -50, -40)
                first = 12 * person
                record = VolumeRecord(
                    name=f"{entry.domain}{person}", domain=entry.domain, body_part=entry.body_part,
                    content_key=entry.content_key, source=f"{entry.domain}{person}.nii", affine=affine,
                    latent=known.read_volume(index)[:, first : first + 12, :12, :12], spacing=entry.spacing,
                    intensity={},
                )  # fmt: skip
                writer.add(record)
    return path
