"""FLOPs and memory of a network of synthesis, on shapes alone: nothing is allocated."""

from __future__ import annotations

import copy

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from meduet_fast.engine.memory import MemoryEstimate, activation_bytes

from .config import SynthesisConfig
from .networks import Network


def _call(network: Network, size: int) -> Tensor:
    """Call a network on the meta device for crops (B, C, x, y, z); content has a token for each patch."""
    sizes = network.config
    patch = sizes.get("features_patch", sizes.patch_size)  # the encoder's, where it is known
    tokens = [edge // patch for edge in sizes.sample_size] if sizes.content == "tokens" else []
    with torch.device("meta"):
        sample = torch.empty(size, sizes.in_channels, *sizes.sample_size)  # (B, C, x, y, z)
        content = torch.empty(size, *tokens, sizes.content_dim)  # (B, D) or (B, X, Y, Z, D)
        predicted: Tensor = network(sample, torch.empty(size), content, torch.empty(size, sizes.style_dim))
    return predicted


def flops_per_crop(network: Network) -> int:
    """Count the FLOPs of a crop, forward and backward, without the alignment's head."""
    network = copy.deepcopy(network).to("meta")
    with FlopCounterMode(display=False) as counter:
        _call(network, 2).sum().backward()
    return counter.get_total_flops() // 2


def memory_estimate(config: SynthesisConfig, network: Network, shards: int = 1) -> MemoryEstimate:
    """Estimate memory of one GPU at the peak of a step, without the alignment's head.

    Args:
        config: of the run.
        network: on the meta device.
        shards: GPUs that share one copy, see :func:`meduet_fast.engine.parallel.shard_count`.
    """
    blocks = network.transformer_blocks()
    activations = activation_bytes(
        network, blocks, lambda size: _call(network, size), config.batch_size, config.recompute
    )
    return MemoryEstimate.of(network, blocks, config.averages, activations, shards)
