"""Memory of a step: what is counted on shapes is what autograd keeps; it adds up and shards."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from meduet_fast.engine import EngineConfig
from meduet_fast.engine.memory import MemoryEstimate, activation_bytes, describe_memory
from meduet_fast.kernels.backend import triton
from meduet_fast.models.transformer3d import MeDUETTransformer3D
from meduet_fast.models.unet3d import ResidualBlock
from tests.kept import kept_bytes


def transformer() -> MeDUETTransformer3D:
    return MeDUETTransformer3D(
        sample_size=(8, 8, 8), content_dim=12, style_dim=6, patch_size=2, hidden_size=96, depth=3, num_heads=3
    )


def call(network: MeDUETTransformer3D, size: int) -> Tensor:
    predicted: Tensor = network(torch.rand(size, 4, 8, 8, 8), *map(torch.rand, (size, (size, 12), (size, 6))))
    return predicted


def slope(network: MeDUETTransformer3D) -> int:
    """Bytes that autograd really keeps of four samples on the CPU."""
    few, more = (kept_bytes(network, partial(call, network, size)) for size in (2, 6))
    return more - few


@pytest.mark.parametrize("recompute", [False, True])
def test_what_is_counted_is_what_autograd_keeps(recompute: bool) -> None:
    """And what backward makes of a block."""
    network = transformer()
    whole = slope(network)
    for block in network.blocks if recompute else ():
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)  # type: ignore[method-assign]
    kept = slope(network)
    assert (kept < whole / 2) == recompute
    norms, products, hidden = 4 * 4, 2 * (2 + 4 + 2), 2 * 2 * 4  # products: inputs, q k v and sum, outputs
    block_bytes = 4 * 64 * 96 * (norms + products + hidden)  # of 4 samples of 64 tokens
    on_meta = transformer().to("meta")

    def on_shapes(size: int) -> None:
        with torch.device("meta"):
            call(on_meta, size)

    counted = activation_bytes(on_meta, list(on_meta.blocks), on_shapes, 4, recompute)
    assert counted == pytest.approx(kept + (1 + recompute) * block_bytes, rel=0.05)


@pytest.mark.skipif(triton is None, reason="triton is not installed")
def test_a_norm_by_kernels_keeps_its_input_alone() -> None:
    """Float32 into the first norm, bfloat16 into the second one and into both convolutions."""
    block = ResidualBlock(32, 32, 12, 8).to("meta")

    def on_shapes(size: int) -> None:
        with torch.device("meta"):
            block(torch.rand(size, 32, 8, 8, 8), torch.rand(size, 12), torch.rand(size, 12))

    kept = 8**3 * 32 * (4 + 3 * 2)
    assert activation_bytes(block, [block], on_shapes, 1, False) == pytest.approx(2 * kept, rel=0.02)


def test_memory_adds_up_and_shards() -> None:
    network = transformer()
    count = sum(item.numel() for item in network.parameters())
    block = sum(item.numel() for item in network.blocks[0].parameters())
    whole, part = (MemoryEstimate.of(network, list(network.blocks), 3, 1000, shards) for shards in (1, 4))
    assert (whole.weights, whole.averages, whole.optimizer) == (4 * count, 12 * count, 8 * count)
    assert whole.total == 30 * count + 1000
    assert part.averages == 12 * -(-count // 4)
    assert part.copies == (4 * 4 + 2) * (count - 3 * block) + 10 * block
    (_, memory), (_, disk) = describe_memory(whole, network, 3, EngineConfig(keep_checkpoints=2))
    assert memory.endswith("activations 1 kB (estimated; CUDA takes 2 GB more)")
    assert disk == f"2 checkpoints of {4 * 10 * count / 1e6:.4g} MB"
