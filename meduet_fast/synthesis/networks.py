"""Write and read one network of synthesis: safetensors, with its class and sizes in the metadata."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from meduet_fast.errors import UserError
from meduet_fast.models.transformer3d import MeDUETTransformer3D
from meduet_fast.models.unet3d import MeDUETUNet3D
from meduet_fast.weight_files import METADATA, misfit, read_file, weight_file

Network = MeDUETTransformer3D | MeDUETUNet3D
CLASSES: dict[str, type[MeDUETTransformer3D] | type[MeDUETUNet3D]] = {
    "MeDUETTransformer3D": MeDUETTransformer3D,
    "MeDUETUNet3D": MeDUETUNet3D,
}


def network_config(network: Network) -> dict[str, Any]:
    """Return the arguments that build a network, as JSON values."""
    return {name: value for name, value in network.config.items() if not name.startswith("_")}


def save_network(network: Network, path: Path, state: Mapping[str, Tensor] | None = None) -> None:
    """Write a network.

    Args:
        network: gives class and sizes; its weights, too, if ``state`` is None.
        path: the file.
        state: weights on the CPU.
    """
    tensors = {
        name: value.detach().cpu().contiguous() for name, value in (state or network.state_dict()).items()
    }
    metadata = {"network": type(network).__name__, "config": json.dumps(network_config(network))}
    save_file(tensors, path, {"format": "pt", **metadata})


def load_network(path: Path | str) -> Network:
    """Read a network that :func:`save_network` wrote, onto the CPU, in eval mode.

    Raises:
        UserError: naming the file, if it is absent, damaged or no network of synthesis.
    """
    file = weight_file(Path(path))
    content = dict(read_file(file))
    metadata = content.pop(METADATA, None)
    metadata = metadata if isinstance(metadata, Mapping) else {}
    kind, config = metadata.get("network"), metadata.get("config")
    if kind not in CLASSES or not isinstance(config, dict):
        raise UserError(
            f"{file}: not a network of synthesis: expected one of {', '.join(CLASSES)} in its metadata"
        )
    try:
        network = CLASSES[kind](**config)
        if problems := misfit(content, network.state_dict()):
            raise ValueError(problems)
    except (ValueError, TypeError, RuntimeError) as error:
        raise UserError(f"{file}: not a readable {kind}: {error}") from error
    network.load_state_dict(content)
    return network.eval()
