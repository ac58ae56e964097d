"""Load tokenizers from files, and save them. Nothing here runs code that a file brings along."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from meduet_fast.errors import UserError
from meduet_fast.files import atomic_path

from .autoencoder import MAISI, Architecture, Tokenizer

BUILTIN = "builtin"
BUILTIN_WEIGHTS = Path(__file__).with_name("builtin.safetensors")
FORMAT = "meduet-fast tokenizer 1"
# What training programs wrap a state dict in.
_WRAPPERS = ("unet_state_dict", "autoencoder_state_dict", "state_dict", "model")
_SHOWN = 3


def load_tokenizer(spec: str = BUILTIN, device: torch.device | str = "cpu") -> Tokenizer:
    """Load the tokenizer that ``spec`` names.

    Args:
        spec: "builtin", or the path of a ``.safetensors`` file written by ``meduet-fast train-tokenizer``,
            or of MAISI's ``autoencoder.pt``.
        device: where its weights go and its work is done.

    Raises:
        UserError: if there is no such file, or it holds no weights of the expected kind.
    """
    if spec == BUILTIN:
        return load_safetensors(BUILTIN_WEIGHTS, name=BUILTIN).to(device)
    path = Path(spec).expanduser()
    if not path.is_file():
        raise UserError(f"tokenizer {spec!r}: expected 'builtin' or the path of a file, found no such file")
    return (load_safetensors(path) if path.suffix == ".safetensors" else load_maisi(path)).to(device)


def load_maisi(path: Path) -> Tokenizer:
    """Load MAISI's tokenizer from ``autoencoder.pt`` of MONAI's maisi_ct_generative bundle (spec section 1).

    The state dict may be wrapped in a dict, as training programs do. Every key and shape is checked.

    Raises:
        UserError: if the file cannot be read, holds anything but tensors and plain values, or other weights.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from error
    except Exception as error:  # the unpickler fails in many ways on a foreign file; all mean the same
        raise UserError(
            f"{path}: expected a PyTorch file with nothing but weights (MAISI's autoencoder.pt), found none: "
            + str(error).partition("\n")[0]
        ) from error
    for wrapper in _WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
            break
    network = MAISI.build()
    _load_weights(network, content, path, "MAISI's autoencoder")
    # Four times the work per voxel of the built-in one, and the memory with it.
    return Tokenizer(MAISI, network, "maisi", window=96)


def save_safetensors(
    path: Path,
    architecture: Architecture,
    network: nn.Module,
    metrics: Mapping[str, Any],
    training: Mapping[str, Any],
) -> None:
    """Write a tokenizer, whole or not at all, that :func:`load_safetensors` reads.

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


def load_safetensors(path: Path, name: str = "trained") -> Tokenizer:
    """Load a tokenizer that :func:`save_safetensors` wrote.

    Args:
        path: the file.
        name: first part of the tokenizer's identity.

    Raises:
        UserError: if the file cannot be read, is none of ours, or is damaged.
    """
    metadata = read_metadata(path)
    try:
        sizes = json.loads(metadata["architecture"])
        values: Any = {item.name: sizes[item.name] for item in fields(Architecture)}
        values |= {name: tuple(values[name]) for name in ("num_channels", "num_res_blocks")}
        architecture = Architecture(**values)
        network = architecture.build()
    except (KeyError, TypeError, ValueError, RuntimeError, ZeroDivisionError) as error:
        raise UserError(f"{path}: damaged tokenizer file, unusable architecture: {error!r}") from error
    with safe_open(path, framework="pt") as stored:
        weights = {key: stored.get_tensor(key) for key in stored.keys()}  # noqa: SIM118 (it is no dict)
    _load_weights(network, weights, path, "the architecture in its header")
    return Tokenizer(architecture, network, name)


def read_metadata(path: Path) -> dict[str, str]:
    """Read a tokenizer file's header: format, architecture, metrics and training, the last three as JSON.

    Raises:
        UserError: if the file cannot be read or is none of ours.
    """
    try:
        with safe_open(path, framework="pt") as stored:
            metadata = dict(stored.metadata() or {})
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: cannot be read as safetensors: {error}") from error
    if metadata.get("format") != FORMAT:
        raise UserError(
            f"{path}: expected a tokenizer written by train-tokenizer ({FORMAT!r} in its header), "
            f"found {metadata.get('format')!r}"
        )
    return metadata


def _load_weights(network: nn.Module, weights: Any, path: Path, expected: str) -> None:
    """Copy ``weights`` into ``network`` if every key and shape is right, else say which are not."""
    if not isinstance(weights, Mapping):
        raise UserError(
            f"{path}: expected a dict with the weights of {expected}, found {type(weights).__name__}"
        )
    own = network.state_dict()
    found = {str(key): value for key, value in weights.items()}
    what = {
        key: str(tuple(value.shape)) if isinstance(value, Tensor) else type(value).__name__
        for key, value in found.items()
    }
    problems = {
        "missing": [key for key in own if key not in found],
        "unexpected": [key for key in found if key not in own],
        "wrong": [
            f"{key} ({what[key]}, expected {tuple(weight.shape)})"
            for key, weight in own.items()
            if key in found and what[key] != str(tuple(weight.shape))
        ],
        "not finite": [
            key
            for key in own
            if key in found and isinstance(found[key], Tensor) and not found[key].isfinite().all()
        ],
    }
    said = [
        f"{len(keys)} {kind}: {', '.join(keys[:_SHOWN])}{', ...' if len(keys) > _SHOWN else ''}"
        for kind, keys in problems.items()
        if keys
    ]
    if said:
        raise UserError(f"{path}: these are not the weights of {expected}; keys {'; '.join(said)}")
    network.load_state_dict(found)
