"""Spread a task over processes, from outside of it: PyTorch's DDP, FSDP2, and both together (HSDP)."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from functools import partial

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from meduet_fast.errors import UserError

from .config import EngineConfig
from .distributed import World
from .precision import low_precision, use_float8
from .task import Task


def compile_blocks(blocks: Iterable[nn.Module]) -> None:
    """Compile every block in place, for any batch size; most of a step's work is in them.

    With sizes fixed, each of the batch sizes that a step has would be compiled on its own. The hooks of FSDP
    are around ``forward`` and stay outside. Copy models before, not after.
    """
    blocks = list(blocks)
    # Blocks of one class share what was compiled of them, and a U-Net's differ in their sizes: by default the
    # ninth is refused.
    limits = torch._dynamo.config
    limits.recompile_limit = max(limits.recompile_limit, len(blocks))
    for block in blocks:
        block.forward = torch.compile(block.forward, fullgraph=True, dynamic=True)


def _is_trained(block: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in block.parameters())


def shard_count(config: EngineConfig, processes: int, local: int) -> int:
    """Return how many GPUs share one copy of weights, gradients, moments and what is not trained.

    Args:
        config: of the run.
        processes: GPUs of the run.
        local: those of one machine.

    Raises:
        UserError: if the copies of "hsdp" do not come out even.
    """
    if config.parallel == "hsdp":
        shards = config.shard_size or local
        if processes % shards:
            raise UserError(f"shard_size is {shards}, expected a divisor of the {processes} processes")
        return shards
    return processes if config.parallel == "fsdp" else 1


def parallelize(task: Task, config: EngineConfig, world: World) -> nn.Module:
    """Return what to call instead of ``task``, which changes in place.

    The order matters: recomputation, float8, compilation and sharding of each block, then of the rest. Build
    the optimiser afterwards: sharded parameters are new ones.

    Raises:
        UserError: for a ``shard_size`` that does not fit; for float8 where it can't be, see
            :func:`meduet_fast.engine.precision.use_float8`.
    """
    blocks = list(task.blocks())
    for name in ("recompute", "compile"):
        if getattr(config, name) and not blocks:
            raise UserError(f"{name} is on, expected false: {task.title.lower()} has no blocks for it")
    if config.recompute:
        # Only a block's input is kept for backward. Parameter names stay, unlike with a wrapper.
        for block in filter(_is_trained, blocks):
            block.forward = partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)
    if config.precision == "float8":
        use_float8(blocks, world.device)
    if config.compile:
        compile_blocks(blocks)
    if not world.grouped:
        return task
    if config.parallel == "ddp":
        with warnings.catch_warnings():  # the new name of broadcast_buffers is unknown before torch 2.13
            warnings.simplefilter("ignore", FutureWarning)
            return DistributedDataParallel(task, broadcast_buffers=False, gradient_as_bucket_view=True)
    shards = shard_count(config, world.size, world.local_size)
    if config.parallel == "fsdp":
        mesh = init_device_mesh(world.device.type, (shards,), mesh_dim_names=("shard",))
    else:
        names = ("replicate", "shard")
        mesh = init_device_mesh(world.device.type, (world.size // shards, shards), mesh_dim_names=names)
    # Blocks hold most of the weights: these travel and are used in bfloat16, their gradients are reduced in
    # float32. The rest stays float32, and inputs are left alone: autocast does with them as on one device.
    # LayerNorm on the CPU refuses bfloat16 weights for float32 tokens.
    low = world.device.type == "cuda" and low_precision(config.precision, world.device)
    param, reduce = (torch.bfloat16, torch.float32) if low else (None, None)
    for block in blocks:
        # Without gradients there must be no type to reduce them in: torch would look for some.
        policy = MixedPrecisionPolicy(
            param, reduce if _is_trained(block) else None, cast_forward_inputs=False
        )
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(task, mesh=mesh, mp_policy=MixedPrecisionPolicy(cast_forward_inputs=False))
    return task
