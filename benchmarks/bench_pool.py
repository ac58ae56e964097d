"""LayerNorm and the token means of both sources, beside ``F.layer_norm`` with masked means.

``python -m benchmarks.bench_pool [--device cpu] [--quick] [--only NAME] [--json PATH]``
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import torch

from meduet_fast.kernels.workloads import pool_workload

from .command import cases_command
from .harness import Case, Variant
from .operations import op_cases, standard_peers


def cases(device: torch.device, quick: bool) -> Iterator[Case]:
    """Yield content of a ViT-B step by source, over the batch; style of one batch."""
    gpu = device.type == "cuda"
    sizes = [(batch, 768) for batch in ((16, 64, 256) if gpu else (4, 8, 16))] + [(64 if gpu else 16, 192)]
    for batch, width in sizes[:1] if quick else sizes:
        workload = pool_workload(batch, 216, width, masked=True)
        yield from op_cases(
            "pool",
            f"B={batch} L=216 D={width} by source",
            workload,
            device,
            {"batch": batch, "tokens": 216, "width": width},
            standard_peers(workload, with_compiler=gpu or batch == 4),
        )


def test_pool(benchmark: Any, variant: Variant) -> None:
    benchmark(variant.call)


if __name__ == "__main__":
    sys.exit(cases_command(cases, __doc__ or ""))
