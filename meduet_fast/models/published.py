"""Find weights with the published names, in a state dict or a file, and what stands beside them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from meduet_fast.errors import UserError
from meduet_fast.weight_files import Weights, find_weights, leaves, read_file, weight_file

from .config import SHOWN_BY

CONFIG_FILE = "config.json"
_KNOWN = {key for key, _, _ in SHOWN_BY.values()}
_MONAI = "patch_embedding.patch_embeddings.weight"


def find_published(content: Mapping[str, Any]) -> Weights:
    """Find MeDUET's weights in a state dict or in what wraps it.

    The published code's dead 2D ``patch_embed`` is among the others.

    Raises:
        ValueError: if there are none, or of several networks.
    """
    weights = find_weights(content, _KNOWN)
    if any(key.endswith(_MONAI) for key in weights.tensors):
        raise ValueError(
            "the names are MONAI's, of a ViT or UNETR: meduet_fast.models.monai_names.from_monai turns them"
        )
    dead = {key: value for key, value in weights.tensors.items() if key.startswith("patch_embed.")}
    tensors = {key: value for key, value in weights.tensors.items() if key not in dead}
    return replace(weights, tensors=tensors, others={**weights.others, **dead})


def read_published(path: Path) -> tuple[Path, Weights]:
    """Find MeDUET's weights in a file, or in a folder's ``model.safetensors``.

    Where nothing in it states the heads, a ``config.json`` in the same folder may.

    Returns:
        The file, and what is in it.

    Raises:
        UserError: naming the file, if it can't be read, or holds no such weights.
    """
    file = weight_file(path)
    content = read_file(file)
    try:
        weights = find_published(content)
    except ValueError as error:
        raise UserError(f"{file}: {error}") from error
    config = file.with_name(CONFIG_FILE)
    if config.is_file() and not any(key.endswith("num_heads") for key in weights.beside):
        try:
            text = json.loads(config.read_bytes())  # whatever its encoding
            if isinstance(text, Mapping):
                weights.beside.update((f"{CONFIG_FILE}.{name}", value) for name, value in leaves(text))
        except (OSError, ValueError, RecursionError) as error:
            raise UserError(f"{config}: beside {file.name}, and not readable as JSON: {error}") from error
    return file, weights
