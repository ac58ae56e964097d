"""GroupNorm and SiLU on 3D maps, in both memory formats, beside PyTorch's two calls; adaptive, too.

``python -m benchmarks.bench_group_norm [--device cpu] [--quick] [--only NAME] [--json PATH]``
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from meduet_fast.kernels.workloads import group_norm_workload

from .command import cases_command
from .harness import Case, Variant
from .operations import COMPILED, compiled, op_cases, standard_peers


def two_calls(x: Tensor, num_groups: int, weight: Tensor, bias: Tensor) -> Tensor:
    """Normalise as models write it."""
    return F.silu(F.group_norm(x, num_groups, weight, bias))


def cases(device: torch.device, quick: bool) -> Iterator[Case]:
    """Yield a MAISI decoder's widest map and a diffusion U-Net's middle, then a map with scale and shift."""
    gpu = device.type == "cuda"
    sizes = [(1, 64, 64), (4, 256, 16)] if gpu else [(1, 64, 32), (2, 128, 16)]
    for batch, channels, edge in sizes[:1] if quick and not gpu else sizes:
        for last in (False, True):
            peers = {"GroupNorm + SiLU": lambda: two_calls}
            if gpu:
                peers[COMPILED] = lambda: compiled(two_calls)
            yield from op_cases(
                "group_norm",
                f"B={batch} {channels}x{edge}^3{' channels last' if last else ''}",
                group_norm_workload(batch, channels, edge, last),
                device,
                {"batch": batch, "channels": channels, "edge": edge},
                peers,
            )
    batch, channels, size = (4, 256, (16, 16, 8)) if gpu else (2, 64, (16, 16, 8))
    for last in (False, True):
        adaptive = group_norm_workload(batch, channels, size, last, adaptive=True)
        yield from op_cases(
            "group_norm",
            f"B={batch} {channels}x16x16x8 adaptive{' channels last' if last else ''}",
            adaptive,
            device,
            {"batch": batch, "channels": channels},
            # Compiled for a CPU it adds gradients of channels-last maps less exactly than is allowed.
            standard_peers(adaptive, with_compiler=gpu or not last),
        )


def test_group_norm(benchmark: Any, variant: Variant) -> None:
    benchmark(variant.call)


if __name__ == "__main__":
    sys.exit(cases_command(cases, __doc__ or ""))
