"""Estimate what a step takes of a GPU's memory, on shapes alone: nothing is allocated."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, astuple, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from meduet_fast.kernels.backend import triton
from meduet_fast.kernels.launch import record_launches

from .config import EngineConfig
from .dry_run import Rows, si

ARCHITECTURE = 90  # whose kernels are counted; they keep the same on all
_IN_BFLOAT16 = {F.linear, F.conv3d, F.conv_transpose3d}
_IN_FLOAT32 = {F.layer_norm, F.rms_norm, F.group_norm}


def _count(modules: Sequence[nn.Module]) -> int:
    return sum(item.numel() for module in modules for item in module.parameters())


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on one GPU at the peak of a step.

    Attributes:
        weights: float32, of what is trained.
        averages: the same of each average of it, such as a teacher.
        gradients: float32.
        optimizer: AdamW's two moments, float32.
        copies: weights to compute with: in bfloat16, or put together from shards.
        activations: what backward needs, and what it makes of one block.
    """

    weights: int
    averages: int
    gradients: int
    optimizer: int
    copies: int
    activations: int

    @classmethod
    def of(
        cls, network: nn.Module, blocks: Sequence[nn.Module], averages: int, activations: int, shards: int = 1
    ) -> MemoryEstimate:
        """Estimate memory of one GPU at the peak of a step.

        An estimate for bfloat16 autocast; compilation saves some. The CUDA context, libraries and what the
        allocator can't use come on top: count 2 GB.

        Args:
            network: what is trained; may be on the meta device.
            blocks: of the network, what is sharded one by one.
            averages: of the network, each sharded alike.
            activations: bytes that a step keeps beside the weights.
            shards: GPUs that share one copy, see :func:`~.parallel.shard_count`.
        """
        count = _count([network])
        part = -(-count // shards)
        copies = 2 * count
        if shards > 1:
            # Whole at any time: what is in no block, in float32, of what is trained in bfloat16 too; the
            # block at work and the next one in bfloat16; the gradients of one block, in bfloat16 and float32.
            outside = count - _count(blocks)
            copies = (4 * (1 + averages) + 2) * outside + 10 * max(_count([block]) for block in blocks)
        return cls(
            weights=4 * part,
            averages=4 * part * averages,
            gradients=4 * part,
            optimizer=8 * part,
            copies=copies,
            activations=activations,
        )

    @property
    def total(self) -> int:
        """Return their sum."""
        return sum(astuple(self))


def describe_memory(
    estimate: MemoryEstimate, network: nn.Module, averages: int, config: EngineConfig
) -> Rows:
    """Return what a run takes of a GPU's memory and of the disk, in rows of a heading and a text.

    Args:
        estimate: of the memory.
        network: what is trained; may be on the meta device.
        averages: of the network.
        config: of the run.
    """
    listed = ", ".join(f"{name} {si(value, 'B')}" for name, value in asdict(estimate).items())
    # In float32: the network, its averages, AdamW's two moments, and all networks once more, to be used.
    checkpoint = 4 * (2 + 2 * (1 + averages)) * _count([network])
    return [
        ("memory", f"{si(estimate.total, 'B')} a GPU: {listed} (estimated; CUDA takes 2 GB more)"),
        ("disk", f"{config.keep_checkpoints} checkpoints of {si(checkpoint, 'B')}"),
    ]


class _Autocast(TorchFunctionMode):
    """Cast as autocast to bfloat16 does on CUDA, and take flash attention: the meta device has neither."""

    def __torch_function__(
        self,
        function: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Call a function of PyTorch."""
        if function is F.scaled_dot_product_attention:
            return torch.ops.aten._scaled_dot_product_flash_attention(*args)[0]
        kwargs = kwargs or {}
        if function in _IN_BFLOAT16 or function in _IN_FLOAT32:
            dtype = torch.bfloat16 if function in _IN_BFLOAT16 else torch.float32
            args = [item.to(dtype) if isinstance(item, Tensor) else item for item in args]
            kwargs = {
                key: item.to(dtype) if isinstance(item, Tensor) else item for key, item in kwargs.items()
            }
        return function(*args, **kwargs)


def activation_bytes(
    network: nn.Module,
    blocks: Sequence[nn.Module],
    call: Callable[[int], object],
    batch: int,
    recompute: bool,
) -> int:
    """Count what a step in bfloat16 keeps for backward on CUDA, uncompiled, and makes of a block, in bytes.

    Args:
        network: on the meta device.
        blocks: of it, what is recomputed one by one.
        call: calls the network for so many samples; the rest of a step keeps little.
        batch: samples at once.
        recompute: whether only the inputs of blocks are kept.
    """
    # The difference: copies of weights in bfloat16 are kept too, but once.
    few, more = (_kept(network, blocks, call, size) for size in (2, 3))
    kept, inputs, largest = (b - a for a, b in zip(few, more, strict=True))
    # Backward makes as much of one block as that keeps, and that itself if it was not kept.
    return batch * (inputs + 2 * largest if recompute else kept + largest)


def _kept(
    network: nn.Module, blocks: Sequence[nn.Module], call: Callable[[int], object], size: int
) -> tuple[int, int, int]:
    """Return the bytes kept of a pass, those with blocks that keep their inputs alone, and of one block."""
    seen = {item.untyped_storage()._cdata for item in (*network.parameters(), *network.buffers())}
    alive: list[torch.UntypedStorage] = []  # so that no address is given away twice
    within = [0]  # of each block in the order of the pass; first what is around them
    inputs: dict[int, int] = {}
    at = 0

    def keep(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage._cdata not in seen:
            seen.add(storage._cdata)
            alive.append(storage)
            within[at] += storage.nbytes()
        return x

    def enter(_: nn.Module, arguments: tuple[Any, ...]) -> None:
        nonlocal at
        within.append(0)
        at = len(within) - 1
        for x in arguments:
            if isinstance(x, Tensor):
                storage = x.untyped_storage()
                alive.append(storage)
                inputs[storage._cdata] = storage.nbytes()

    def leave(*_: object) -> None:
        nonlocal at
        at = 0

    with ExitStack() as stack:
        for block in blocks:
            stack.callback(block.register_forward_pre_hook(enter).remove)
            stack.callback(block.register_forward_hook(leave).remove)
        if triton is not None:
            stack.enter_context(record_launches(ARCHITECTURE))
        stack.enter_context(torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x))
        stack.enter_context(torch.autocast("cpu", torch.bfloat16))  # kernels ask whether there is autocast
        stack.enter_context(_Autocast())
        call(size)
    return sum(within), within[0] + sum(inputs.values()), max(within[1:])
