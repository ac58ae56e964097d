"""Spreads a step over processes, from outside the model: PyTorch's DDP, FSDP2, and both together (HSDP)."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from meduet_fast.models import MeDUET
from meduet_fast.pretraining.config import PretrainConfig
from meduet_fast.pretraining.cost import shard_count
from meduet_fast.pretraining.task import PretrainStep

from .distributed import World
from .precision import low_precision, use_float8


def _blocks(model: MeDUET) -> list[nn.Module]:
    return [*model.blocks, *model.decoder_blocks]


def compile_blocks(*models: MeDUET) -> None:
    """Compile every transformer block in place, for any batch size; most of a step's work is in them.

    With sizes fixed, each of the three batch sizes that a step has would be compiled on its own. The hooks of
    FSDP are around ``forward`` and stay outside. Copy models before, not after.
    """
    for model in models:
        for block in _blocks(model):
            block.forward = torch.compile(block.forward, fullgraph=True, dynamic=True)


def _recompute(model: MeDUET) -> None:
    """Keep only the input of every block for backward. Parameter names stay, unlike with a wrapper."""
    for block in _blocks(model):
        block.forward = partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)


def _mesh(config: PretrainConfig, world: World) -> DeviceMesh:
    """All processes in a row for FSDP; rows of ``shard_size`` for HSDP.

    Raises:
        UserError: if rows do not come out even.
    """
    row = shard_count(config, world.size, world.local_size)
    if config.parallel == "fsdp":
        return init_device_mesh(world.device.type, (row,), mesh_dim_names=("shard",))
    return init_device_mesh(
        world.device.type, (world.size // row, row), mesh_dim_names=("replicate", "shard")
    )


def parallelize(step: PretrainStep, config: PretrainConfig, world: World) -> nn.Module:
    """What to call instead of ``step``, whose student and teacher change in place.

    The order matters: recomputation, float8, compilation and sharding of each block, then of the rest. Build
    the optimiser afterwards: sharded parameters are new ones.

    Raises:
        UserError: for a ``shard_size`` that does not fit; for float8 where it can't be, see
            :func:`meduet_fast.engine.precision.use_float8`.
    """
    models = (step.student, step.teacher)
    if config.recompute:
        _recompute(step.student)
    if config.precision == "float8":
        use_float8((block for model in models for block in _blocks(model)), world.device)
    if config.compile:
        compile_blocks(*models)
    if not world.grouped:
        return step
    if config.parallel == "ddp":
        with warnings.catch_warnings():  # the new name of broadcast_buffers is unknown before torch 2.13
            warnings.simplefilter("ignore", FutureWarning)
            return DistributedDataParallel(step, broadcast_buffers=False, gradient_as_bucket_view=True)
    # LayerNorm on the CPU refuses bfloat16 weights for float32 tokens.
    low = world.device.type == "cuda" and low_precision(config.precision, world.device)
    _shard(step, _mesh(config, world), low)
    return step


def _shard(step: PretrainStep, mesh: DeviceMesh, low: bool) -> None:
    """Each block alone, the rest together.

    Blocks hold most of the weights: these travel and are used in bfloat16, their gradients are reduced in
    float32. The rest stays float32, and inputs are left alone: autocast does with them as on one device.
    """
    param, reduce = (torch.bfloat16, torch.float32) if low else (None, None)
    for block in _blocks(step.student):
        fully_shard(
            block, mesh=mesh, mp_policy=MixedPrecisionPolicy(param, reduce, cast_forward_inputs=False)
        )
    for block in _blocks(
        step.teacher
    ):  # no gradients: with a type to reduce them in, torch would look for some
        fully_shard(block, mesh=mesh, mp_policy=MixedPrecisionPolicy(param, cast_forward_inputs=False))
    fully_shard(step, mesh=mesh, mp_policy=MixedPrecisionPolicy(cast_forward_inputs=False))


def plain_step(step: nn.Module) -> PretrainStep:
    """The module that :func:`parallelize` was given, to reach student and teacher."""
    inner = step.module if isinstance(step, DistributedDataParallel) else step
    assert isinstance(inner, PretrainStep)
    return inner


@contextmanager
def _unreduced(step: FSDPModule) -> Iterator[None]:
    step.set_requires_gradient_sync(False)
    try:
        yield
    finally:
        step.set_requires_gradient_sync(True)


def without_reduction(step: nn.Module) -> AbstractContextManager[None]:
    """Within it gradients stay in their process: all batches of a step but the last need no reduction."""
    if isinstance(step, DistributedDataParallel):
        return step.no_sync()
    return _unreduced(step) if isinstance(step, FSDPModule) else nullcontext()
