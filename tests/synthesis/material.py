"""A small network, a store of random latents, and what a run leaves behind."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from meduet_fast.data.store import LatentStore
from meduet_fast.data.store_writer import StoreWriter, VolumeRecord
from meduet_fast.models import MeDUET, MeDUETConfig
from tests.networks import moved_network

CONFIG = MeDUETConfig(
    latent_size=4, patch_size=2, embed_dim=12, depth=1, num_heads=2, decoder_embed_dim=12, decoder_depth=1,
    decoder_num_heads=2, num_domains=3,
)  # fmt: skip
PATCH_4 = replace(CONFIG, patch_size=4, latent_size=8)
Volumes = dict[str, tuple[str, tuple[int, int, int]]]  # domain and grid, by name
VOLUMES: Volumes = {
    "a0": ("a", (13, 8, 8)), "a1": ("a", (12, 9, 8)), "b0": ("b", (14, 8, 8)), "c0": ("c", (12, 8, 6)),
}  # fmt: skip


def network(config: MeDUETConfig = CONFIG) -> MeDUET:
    """Every parameter is away from its first value."""
    return moved_network(config)


def write_store(path: Path, volumes: Volumes = VOLUMES, tokenizer: str = "fake-1") -> LatentStore:
    """Latents are random, those of a domain about its own mean."""
    generator = torch.Generator().manual_seed(0)
    with StoreWriter(path, tokenizer=tokenizer, tokenizer_spec="fake", channels=4, compression=4) as writer:
        for name, (domain, grid) in volumes.items():
            record = VolumeRecord(
                name=name, domain=domain, body_part="chest", content_key=f"key-{name}", source=f"{name}.nii",
                latent=torch.randn(4, *grid, generator=generator) + ord(domain) - ord("a"), affine=np.eye(4),
                spacing=(1.5, 1.5, 1.5), intensity={},
            )  # fmt: skip
            writer.add(record)
    return LatentStore.open(path)


def write_run(path: Path, store: Path, lambda_whole: float = 1.0, config: MeDUETConfig = CONFIG) -> Path:
    """Leave behind a run's last checkpoint."""
    settings = {"config": {"objective": {"lambda_whole": lambda_whole}}, "data": str(store)}
    checkpoint = path / "checkpoints" / "12"
    checkpoint.mkdir(parents=True)
    (path / "run.json").write_text(json.dumps(settings))
    (checkpoint / "run.json").write_text(json.dumps({**settings, "step": 12}))
    network(config).save_pretrained(checkpoint / "teacher.safetensors")
    return path
