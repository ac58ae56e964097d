"""Load tokenizers from files, and save them. Nothing here runs code that a file brings along."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from meduet_fast.errors import UserError
from meduet_fast.files import atomic_path
from meduet_fast.weight_files import METADATA, find_weights, misfit, read_file, weight_file

from .autoencoder import MAISI, Architecture, Tokenizer

BUILTIN = "builtin"
BUILTIN_WEIGHTS = Path(__file__).with_name("builtin.safetensors")
FORMAT = "meduet-fast tokenizer 1"


def load_tokenizer(spec: str = BUILTIN, device: torch.device | str = "cpu") -> Tokenizer:
    """Load the tokenizer that ``spec`` names.

    MAISI's is ``autoencoder.pt`` of MONAI's maisi_ct_generative bundle (spec section 1), or its state dict in
    any file and wrapping that :mod:`meduet_fast.weight_files` reads.

    Args:
        spec: "builtin", or the path of a ``.safetensors`` file written by ``meduet-fast train-tokenizer``,
            or of MAISI's ``autoencoder.pt``.
        device: where its weights go and its work is done.

    Raises:
        UserError: if there is no such file, it can't be read, or it holds no weights of the expected kind.
    """
    if spec == BUILTIN:
        return _read(BUILTIN_WEIGHTS, BUILTIN).to(device)
    try:
        path = Path(spec).expanduser()
        file = weight_file(path)
    except (RuntimeError, UserError) as error:  # the former for the home of nobody
        raise UserError(f"tokenizer {spec!r}: expected 'builtin' or the path of a file: {error}") from error
    return _read(file, "trained").to(device)


def save_safetensors(
    path: Path,
    architecture: Architecture,
    network: nn.Module,
    metrics: Mapping[str, Any],
    training: Mapping[str, Any],
) -> None:
    """Write a tokenizer, whole or not at all, that :func:`load_tokenizer` reads.

    Args:
        path: the file.
        architecture: what ``network`` was built from.
        network: the autoencoder; its latents are taken to have about unit variance.
        metrics: measured quality, plain JSON values.
        training: how the weights came about, plain JSON values.

    Raises:
        OSError: if it cannot be written.
    """
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in network.state_dict().items()}
    metadata = {
        "format": FORMAT,
        "architecture": json.dumps(asdict(architecture)),
        "metrics": json.dumps(metrics),
        "training": json.dumps(training),
    }
    with atomic_path(path) as temporary:
        save_file(weights, temporary, metadata)


def _read(path: Path, name: str) -> Tokenizer:
    """Read a tokenizer of ours, whose identity begins with ``name``, or MAISI's."""
    content = dict(read_file(path))
    metadata = content.pop(METADATA, {})
    try:
        if metadata.get("format") == FORMAT:
            architecture, window = _architecture(metadata.get("architecture")), 128
            expected = "the architecture in its header"
        else:
            # Four times the work per voxel of the built-in one, and the memory with it: hence its window.
            name, architecture, window = "maisi", MAISI, 96
            expected = "MAISI's autoencoder (nor has it the header of train-tokenizer)"
        network = architecture.build()
        tensors = find_weights(content, network.state_dict().keys()).tensors
        if problems := misfit(tensors, network.state_dict()):
            raise ValueError(f"these are not the weights of {expected}: {problems}")
    except ValueError as error:
        raise UserError(f"{path}: {error}") from error
    network.load_state_dict(tensors)
    return Tokenizer(architecture, network, name, window=window)


def _architecture(sizes: Any) -> Architecture:
    """Return what the header of a tokenizer file describes.

    Raises:
        ValueError: if no network can be built of it.
    """
    try:
        values: Any = {item.name: sizes[item.name] for item in fields(Architecture)}
        values |= {name: tuple(values[name]) for name in ("num_channels", "num_res_blocks")}
        architecture = Architecture(**values)
        architecture.build()
    except (KeyError, TypeError, ValueError, RuntimeError, ZeroDivisionError) as error:
        raise ValueError(f"damaged tokenizer file, unusable architecture: {error!r}") from error
    return architecture
