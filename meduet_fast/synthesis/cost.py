"""FLOPs and memory of a network of synthesis, on shapes alone: nothing is allocated."""

from __future__ import annotations

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
    """Call a network on the meta device for crops (B, C, x, y, z); content has a token for each patch."""
    sizes = network.config
    tokens = [edge // patch for edge in sizes.sample_size] if sizes.content == "tokens" else []
    with torch.device("meta"):
        sample = torch.empty(size, sizes.in_channels, *sizes.sample_size)  # (B, C, x, y, z)
        content = torch.empty(size, *tokens, sizes.content_dim)  # (B, D) or (B, X, Y, Z, D)
        predicted: Tensor = network(sample, torch.empty(size), content, torch.empty(size, sizes.style_dim))
    return predicted


def flops_per_crop(network: Network, patch: int) -> int:
    """Count the FLOPs of a crop, forward and backward, without the alignment's head.

    Args:
        network: on any device, compiled or sharded.
        patch: edge of the encoder's patches, each a token of content, in latent voxels.
    """
    with FlopCounterMode(display=False) as counter:
        _call(_on_meta(network), 2, patch).sum().backward()
    return counter.get_total_flops() // 2


def memory_estimate(config: SynthesisConfig, network: Network, patch: int, shards: int = 1) -> MemoryEstimate:
    """Estimate memory of one GPU at the peak of a step, without the alignment's head.

    Args:
        config: of the run.
        network, patch: see :func:`flops_per_crop`.
        shards: GPUs that share one copy, see :func:`meduet_fast.engine.parallel.shard_count`.
    """
    network = _on_meta(network)
    blocks = network.transformer_blocks()
    activations = activation_bytes(
        network, blocks, lambda size: _call(network, size, patch), config.batch_size, config.recompute
    )
    return MemoryEstimate.of(network, blocks, config.averages, activations, shards)
