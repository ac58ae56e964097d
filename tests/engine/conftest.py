"""A small latent store of random latents, and a network to match."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from meduet_fast.data.store_writer import StoreWriter, VolumeRecord
from meduet_fast.models import MeDUETConfig
from meduet_fast.pretraining import OptimizerConfig, PretrainConfig

TINY_MODEL = MeDUETConfig(
    latent_size=8, patch_size=2, embed_dim=24, depth=1, num_heads=2, decoder_embed_dim=12, decoder_depth=1,
    decoder_num_heads=2, num_domains=3,
)  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """On work this small two threads spend their time waiting for each other.

    For whole files, so that runs which tests share round as the tests' own do.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def tiny_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four volumes of three domains; each domain has an offset of its own, so that there is style to find."""
    path = tmp_path_factory.mktemp("data") / "store"
    generator = torch.Generator().manual_seed(0)
    with StoreWriter(path, tokenizer="test", tokenizer_spec="test", channels=4, compression=4) as writer:
        for number, domain in enumerate(["a", "a", "b", "c"]):
            noise = torch.randn(4, 20, 12, 10, generator=generator)
            record = VolumeRecord(
                name=f"volume{number}",
                domain=domain,
                body_part="none",
                content_key=f"key{number}",
                source=f"volume{number}.nii.gz",
                latent=noise * 0.5 + "abc".index(domain),
                affine=np.eye(4),
                spacing=(1.5, 1.5, 1.5),
                intensity={"kind": "ct_window", "low": 0.0, "high": 1.0},
            )
            writer.add(record)
    return path


@pytest.fixture(scope="session")
def tiny_settings() -> PretrainConfig:
    """Six steps: MFTD from the third on, a checkpoint every two."""
    return PretrainConfig(
        model=TINY_MODEL,
        optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=2),
        steps=6, batch_size=4, mftd_start_step=3, held_out_fraction=0.4, workers=0, device="cpu",
        log_every=1, checkpoint_every=2, keep_checkpoints=2,
    )  # fmt: skip


@pytest.fixture
def tiny_config(tiny_settings: PretrainConfig) -> PretrainConfig:
    """The same."""
    return tiny_settings
