"""Patches, projection, positions and the choice between a sample and its partner, beside other embeddings.

``python -m benchmarks.bench_patch_embed [--device cpu] [--quick] [--only NAME] [--json PATH]``
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import Parameter

from meduet_fast.kernels.patchify import Triple
from meduet_fast.kernels.workloads import volume_workload

from .command import cases_command
from .harness import Case, Variant
from .operations import Run, op_cases, standard_peers


def _finish(tokens: Tensor, source_mask: Tensor | None, num_prefix_tokens: int) -> Tensor:
    """Choose between partners, and make room for CLS."""
    if source_mask is not None:
        tokens = torch.where(source_mask.unsqueeze(-1), tokens.flip(0), tokens)
    return F.pad(tokens, (0, 0, num_prefix_tokens, 0))


def conv3d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    position: Tensor,
    num_prefix_tokens: int,
    source_mask: Tensor | None = None,
) -> Tensor:
    """Embed as most 3D transformers do: a convolution whose kernel is its stride."""
    tokens = F.conv3d(x, weight, bias, stride=weight.shape[2:]).flatten(2).transpose(1, 2)
    return _finish(tokens + position, source_mask, num_prefix_tokens)


def monai_block(shape: tuple[int, ...], patch: int) -> Run:
    """Build MONAI's ``PatchEmbeddingBlock`` for (B, C, X, Y, Z), on the weights that it is called with."""
    from monai.networks.blocks.patchembedding import PatchEmbeddingBlock

    block = PatchEmbeddingBlock(
        shape[1],
        shape[2:],
        patch,
        hidden_size=768,
        num_heads=12,
        proj_type="conv",
        pos_embed_type="learnable",
    )
    convolution = block.patch_embeddings

    def run(
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        position: Tensor,
        num_prefix_tokens: int,
        source_mask: Tensor | None = None,
    ) -> Tensor:
        # Behind nn.Module's back, whose parameters would not be those that the gradient is asked of.
        for name, value in (("weight", weight), ("bias", bias)):
            convolution._parameters[name] = cast(Parameter, value)
        block._parameters["position_embeddings"] = cast(Parameter, position.unsqueeze(0))
        return _finish(block(x), source_mask, num_prefix_tokens)

    return run


def cases(device: torch.device, quick: bool) -> Iterator[Case]:
    """Yield latents as MeDUET embeds them, over the batch; many small patches; images with patch 16."""
    gpu = device.type == "cuda"
    latents: Triple = (24, 24, 24)
    sizes: list[tuple[int, int, Triple, int, bool]] = [
        (batch, 4, latents, 4, True) for batch in ((16, 64, 256) if gpu else (4, 8, 16))
    ]
    sizes += [(16, 4, latents, 2, False), (8, 1, (96, 96, 96), 16, False)] if gpu else []
    for batch, channels, size, patch, masked in sizes[:1] if quick else sizes:
        workload = volume_workload(batch, channels, size, patch, masked)
        peers: dict[str, Callable[[], Run]] = standard_peers(workload, with_compiler=gpu or batch == 4)
        shape = (batch, channels, *size)
        peers["Conv3d"] = lambda: conv3d
        peers["MONAI PatchEmbeddingBlock"] = partial(monai_block, shape, patch)
        yield from op_cases(
            "patch_embed",
            f"B={batch} {channels}x{size[0]}^3 patch {patch}{' mixed' if masked else ''}",
            workload,
            device,
            {"batch": batch, "edge": size[0], "patch": patch},
            peers,
        )


def test_patch_embed(benchmark: Any, variant: Variant) -> None:
    benchmark(variant.call)


if __name__ == "__main__":
    sys.exit(cases_command(cases, __doc__ or ""))
