"""Parameters, FLOPs and memory of a run. Everything is worked out on shapes: nothing is allocated."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import torch
from torch.utils.flop_counter import FlopCounterMode

from meduet_fast.engine.memory import MemoryEstimate
from meduet_fast.models import MeDUET, MeDUETConfig

from .config import PretrainConfig
from .losses import ObjectiveConfig, pretraining_losses

# Bytes that autograd keeps for backward under bfloat16 autocast on CUDA, per token and width:
# of a block, without its MLP's hidden layer: the inputs of both LayerNorms (float32, which autocast has them
# compute in) and of both projections behind them, queries, keys and values, the attended values;
_BLOCK_BYTES = 2 * 4 + 2 * 2 + 3 * 2 + 2
# of the hidden layer, per unit of mlp_ratio: before and after GELU;
_HIDDEN_BYTES = 2 * 2
# of a block whose forward pass is done again in backward: its input;
_RECOMPUTED_BYTES = 4
# of what surrounds the blocks (last LayerNorm, factors, pooling, streams, predictions): measured.
_AROUND_BYTES = 14


def _on_meta(config: MeDUETConfig) -> MeDUET:
    with torch.device("meta"):
        return MeDUET(config)


def count_parameters(config: MeDUETConfig) -> int:
    """Count the student's parameters; the teacher has as many."""
    return sum(item.numel() for item in _on_meta(config).parameters())


def counted_flops(config: MeDUETConfig, objective: ObjectiveConfig) -> int:
    """Compute :func:`flops_per_sample` by counting all of a step; a second for each ten blocks."""
    model = _on_meta(config)  # its own teacher: the passes are the same
    with torch.device("meta"):
        latents = torch.empty(2, config.in_channels, *[config.latent_size] * 3)
        domain = torch.empty(2, dtype=torch.int64)
        mask = torch.empty(2, config.num_tokens, dtype=torch.bool)
    with FlopCounterMode(display=False) as counter:
        losses = pretraining_losses(model, model, latents, domain, mask, objective, check_values=False)
        losses["total"].backward()
    return counter.get_total_flops() // 2


@cache
def flops_per_sample(config: MeDUETConfig, objective: ObjectiveConfig) -> int:
    """Count the FLOPs of one sample in a step, forward and backward: matrix products, attention's too.

    Counted by :class:`torch.utils.flop_counter.FlopCounterMode` on the meta device, with one and with two
    blocks, since all blocks cost the same. The contrast's products, which grow with the square of the batch,
    are left out: below one in ten thousand for a batch of 64. So is what ``recompute`` does again, as MFU is
    counted.
    """
    shallow = replace(config, depth=1, decoder_depth=1)
    flops = counted_flops(shallow, objective)
    block = counted_flops(replace(shallow, depth=2), objective) - flops
    decoder_block = counted_flops(replace(shallow, decoder_depth=2), objective) - flops
    return flops + (config.depth - 1) * block + (config.decoder_depth - 1) * decoder_block


def _block_bytes(config: MeDUETConfig) -> float:
    return _BLOCK_BYTES + _HIDDEN_BYTES * config.mlp_ratio


def activation_bytes(
    config: MeDUETConfig, objective: ObjectiveConfig, batch: int, recompute: bool = False
) -> int:
    """Estimate the bytes that autograd keeps of a batch for backward on CUDA, in bfloat16, uncompiled.

    A formula, held to what autograd saves in the tests; the teacher keeps nothing.

    Args:
        config: sizes.
        objective: which losses are on.
        batch: crops at once.
        recompute: whether only the inputs of blocks are kept.
    """
    # Passes of the batch: mixed; unmixed; then straight and exchanged streams, two of each.
    whole = objective.lambda_whole > 0
    encoded = 1 + whole + 2 * objective.mftd + 2 * objective.siqc
    decoded = 2 + whole + 2 * objective.siqc
    per_block = _RECOMPUTED_BYTES if recompute else _block_bytes(config)
    encoder = encoded * config.embed_dim * (config.depth * per_block + _AROUND_BYTES)
    decoder = decoded * config.decoder_embed_dim * (config.decoder_depth * per_block + _AROUND_BYTES)
    return int(batch * (1 + config.num_tokens) * (encoder + decoder))


def memory_estimate(config: PretrainConfig, shards: int = 1) -> MemoryEstimate:
    """Estimate memory of one GPU at the peak of a step, with every loss on that the run will have.

    Args:
        config: of the run.
        shards: GPUs that share one copy, see :func:`meduet_fast.engine.parallel.shard_count`.
    """
    model = _on_meta(config.model)
    kept = activation_bytes(config.model, config.objective, config.batch_size, config.recompute)
    # Backward's own: as much as a block of the largest pass keeps, and that itself if it was not kept.
    streams = max(1, 2 * (config.objective.mftd + config.objective.siqc))
    rows = streams * config.batch_size * (1 + config.model.num_tokens)
    at_work = int(rows * config.model.embed_dim * _block_bytes(config.model))
    activations = kept + (1 + config.recompute) * at_work
    return MemoryEstimate.of(model, model.transformer_blocks(), 1, activations, shards)
