"""FLOPs and memory of a network of synthesis, on shapes alone: nothing is allocated."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from meduet_fast.engine.memory import MemoryEstimate, activation_bytes

from .config import SynthesisConfig
from .networks import Network, network_config


def _on_meta(network: Network) -> Network:
    """Build a network anew: compiled blocks would work on their own weights, sharded ones can't be copied."""
    with torch.device("meta"):
        return type(network)(**network_config(network))


def _call(network: Network, size: int, patch: int) -> Tensor:
    """Call a network on the meta device for so many crops; content has a token for each patch."""
    sizes = network.config
    tokens = [edge // patch for edge in sizes.sample_size] if sizes.content == "tokens" else []
    shapes = ((sizes.in_channels, *sizes.sample_size), (), (*tokens, sizes.content_dim), (sizes.style_dim,))
    predicted: Tensor = network(*(torch.empty(size, *shape, device="meta") for shape in shapes))
    return predicted  # (B, C, x, y, z)


def flops_per_crop(network: Network, patch: int) -> int:
    """Count the FLOPs of a crop, forward and backward, without the alignment's head.

    Args:
        network: on any device, compiled or sharded.
        patch: edge of the encoder's patches, each a token of content, in latent voxels.
    """
    with FlopCounterMode(display=False) as counter:
        _call(_on_meta(network), 2, patch).sum().backward()
    return counter.get_total_flops() // 2


def memory_estimates(
    config: SynthesisConfig, network: Network, patch: int, shards: Sequence[int]
) -> list[MemoryEstimate]:
    """Estimate memory of one GPU at the peak of a step, without the alignment's head.

    Args:
        config: of the run.
        network, patch: see :func:`flops_per_crop`.
        shards: GPUs that share one copy, one number for each estimate.
    """
    network = _on_meta(network)
    blocks = network.transformer_blocks()
    activations = activation_bytes(
        network, blocks, lambda size: _call(network, size, patch), config.batch_size, config.recompute
    )
    return [MemoryEstimate.of(network, blocks, config.averages, activations, count) for count in shards]
