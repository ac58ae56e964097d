"""The quadruplet contrast over the number of rows, beside the product of all rows with its log-sum-exp.

``python -m benchmarks.bench_contrast [--device cpu] [--quick] [--only NAME] [--json PATH]``

No public kernel computes it: Inf-CL's and Liger's contrasts have one positive a row and keep a row's own key.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from meduet_fast.kernels.contrast import quadruplet_contrast_reference
from meduet_fast.kernels.workloads import quadruplet_workload

from .command import cases_command
from .harness import Case, Variant
from .operations import BOTH, COMPILED, EAGER, Run, compiled, op_cases

# The plain definition holds several N x N float32; beyond, it does not fit (N = 131 072: 69 GB each).
MOST_ROWS_PLAIN = 32768


def cases(device: torch.device, quick: bool) -> Iterator[Case]:
    """Yield rows that are queries and keys at once, of one GPU's batch or gathered from many."""
    gpu = device.type == "cuda"
    width = 768 if gpu else 256
    rows = [256, 1024, 4096] if quick else [256, 1024, 4096, 16384]
    sizes = [(count, torch.bfloat16 if gpu else torch.float32) for count in rows]
    # In training pooled rows are float32.
    sizes += [(256, torch.float32), (131072, torch.bfloat16)] if gpu else []
    for count, dtype in sizes:
        workload = quadruplet_workload(count, count, width, "content")
        plain = count <= MOST_ROWS_PLAIN
        peers: dict[str, Callable[[], Run]] = {}
        if plain:
            peers[EAGER] = lambda: quadruplet_contrast_reference
        else:
            peers["chunked eager"] = partial(getattr, workload, "reference")
        if plain and (gpu or count == 1024):
            peers[COMPILED] = lambda: compiled(quadruplet_contrast_reference)
        yield from op_cases(
            "contrast",
            f"N={count} D={width}",
            workload,
            device,
            {"rows": count, "width": width},
            peers,
            dtype,
            # What one pass computes includes the gradient; nothing but training uses it.
            directions=[BOTH],
        )


def test_contrast(benchmark: Any, variant: Variant) -> None:
    benchmark(variant.call)


if __name__ == "__main__":
    sys.exit(cases_command(cases, __doc__ or ""))
