"""Whether a run may begin or go on: what its folder, its settings and its data say."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from meduet_fast.data.store import LatentStore
from meduet_fast.errors import UserError
from meduet_fast.pretraining.config import PretrainConfig

from .checkpoint import checkpoint_steps, latest_checkpoint, read_run


def data_identity(store: LatentStore) -> str:
    """Changes whenever the store's latents do."""
    text = json.dumps([(entry.name, entry.domain, entry.content_key) for entry in store.entries])
    return hashlib.sha256(text.encode()).hexdigest()


def check_store(store: LatentStore, config: PretrainConfig) -> None:
    """Refuse a store that the configured network can't be trained on.

    Raises:
        UserError: naming the store and the setting that does not fit.
    """
    if store.channels != config.model.in_channels:
        raise UserError(
            f"{store.path}: latents have {store.channels} channels, model.in_channels is "
            f"{config.model.in_channels}"
        )
    if len(store.domains) > config.model.num_domains:
        raise UserError(
            f"{store.path}: {len(store.domains)} domains ({', '.join(store.domains)}), model.num_domains is "
            f"{config.model.num_domains}; raise it"
        )


def find_start(output: Path, identity: dict[str, Any], data: str, resume: bool) -> Path | None:
    """The checkpoint to go on from, if any.

    Raises:
        UserError: if the folder holds a run and resuming was not asked for, or was made by another setting.
    """
    if not checkpoint_steps(output / "checkpoints"):
        return None
    if not resume:
        raise UserError(
            f"{output}: holds a run already; continue it with --resume, or choose another --output"
        )
    checkpoint = latest_checkpoint(output)
    saved = read_run(checkpoint)
    settings = PretrainConfig().identity() | saved["config"]  # older runs lack newer settings
    differing = [key for key in identity if settings.get(key) != identity[key]]
    if differing:
        first = differing[0]
        raise UserError(
            f"{output}: can't resume with other settings: {', '.join(differing)} differ "
            f"({first} was {settings.get(first)}, now {identity[first]})"
        )
    if saved["data"] != data:
        raise UserError(f"{output}: can't resume: the latent store is not the one that the run began with")
    return checkpoint
