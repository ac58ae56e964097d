"""The masked loss of both demixed streams, beside its definition, which cuts the volume into patches first.

``python -m benchmarks.bench_reconstruction [--device cpu] [--quick] [--only NAME] [--json PATH]``
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import torch

from meduet_fast.kernels.workloads import reconstruction_workload

from .command import cases_command
from .harness import Case, Variant
from .operations import op_cases, standard_peers


def cases(device: torch.device, quick: bool) -> Iterator[Case]:
    """Yield latents 4x24^3 in patches of 4, over the batch."""
    gpu = device.type == "cuda"
    for batch in (16, 64, 256) if gpu else (4,) if quick else (4, 8, 16):
        workload = reconstruction_workload(batch, 4, 24, 4)
        yield from op_cases(
            "reconstruction",
            f"B={batch} 4x24^3 patch 4",
            workload,
            device,
            {"batch": batch, "tokens": 216, "width": 256},
            standard_peers(workload, with_compiler=gpu),
        )


def test_reconstruction(benchmark: Any, variant: Variant) -> None:
    benchmark(variant.call)


if __name__ == "__main__":
    sys.exit(cases_command(cases, __doc__ or ""))
