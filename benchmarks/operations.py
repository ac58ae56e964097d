"""From the standard workload of an operation to cases: beside its definition, that compiled, and peers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from meduet_fast.kernels.verify import NEIGHBOURS, Expected, compare_to, expect, refuse
from meduet_fast.kernels.workloads import Workload

from .harness import Case, Variant, not_importable
from .tables import OURS

Run = Callable[..., Any]
FORWARD, BOTH = "forward", "forward_backward"
EAGER, COMPILED = "eager", "compiled eager"
# Measuring PyTorch's own error on more inputs takes too long where one call does more than this.
_MANY_FLOPS = 10**9


def compiled(run: Run) -> Run:
    """Compile by ``torch.compile``, for these sizes alone."""
    return torch.compile(run, fullgraph=True, dynamic=False)


def standard_peers(workload: Workload, with_compiler: bool) -> dict[str, Callable[[], Run]]:
    """Return the eager definition, and that compiled."""
    peers = {EAGER: lambda: workload.reference}
    return peers | {COMPILED: lambda: compiled(workload.reference)} if with_compiler else peers


def main_dtype(device: torch.device) -> torch.dtype:
    """Return bfloat16 on CUDA, as in training; float32 on the CPU."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def _caller(run: Run, inputs: Mapping[str, Any]) -> Callable[[], object]:
    """Run forward, and backward if an input asks for a gradient; what flows in is made in the first call."""
    wanted = [value for value in inputs.values() if isinstance(value, Tensor) and value.requires_grad]
    incoming: list[Tensor] = []

    def both() -> object:
        result = run(**inputs)
        outputs = [result] if isinstance(result, Tensor) else list(result)
        if not incoming:
            incoming.extend(torch.randn_like(output) for output in outputs)
        return torch.autograd.grad(outputs, wanted, incoming)

    return both if wanted else lambda: run(**inputs)


def op_cases(
    bench: str,
    name: str,
    workload: Workload,
    device: torch.device,
    shape: dict[str, int],
    peers: Mapping[str, Callable[[], Run]],
    dtype: torch.dtype | None = None,
    directions: Sequence[str] = (FORWARD, BOTH),
) -> Iterator[Case]:
    """Yield cases of one workload, a case for each direction.

    Args:
        bench: name of the benchmark.
        name: of the case.
        workload: inputs, the operation, its definition and its costs.
        device: where it runs.
        shape: sizes by name; "batch" gives samples a second.
        peers: by variant, a function that makes what is called like the operation. It is called when it is
            the case's turn; an ImportError means "not installed".
        dtype: of the inputs; :func:`main_dtype` if None.
        directions: "forward" without gradients, "forward_backward".
    """
    dtype = dtype or main_dtype(device)
    forward, backward = workload.cost(dtype.itemsize)

    def build(direction: str) -> list[Variant]:
        torch.compiler.reset()  # the compiler takes only so many sizes of one function
        torch.manual_seed(0)
        inputs = workload.inputs(str(device), dtype)
        if direction == FORWARD:
            inputs = {key: x.detach() if isinstance(x, Tensor) else x for key, x in inputs.items()}
        neighbours = NEIGHBOURS if forward.flops < _MANY_FLOPS else 2

        @cache
        def expected() -> dict[str, Expected]:
            return expect(workload.reference, inputs, neighbours=neighbours)

        def variant(name: str, make: Callable[[], Run]) -> Variant:
            try:
                run = make()
            except ImportError as error:
                return Variant(name, unavailable=not_importable(error))
            check = None if run is workload.reference else lambda: refuse(compare_to(run, expected(), inputs))
            return Variant(name, _caller(run, inputs), check)

        return [variant(OURS, lambda: workload.run), *(variant(*peer) for peer in peers.items())]

    for direction in directions:
        both = direction == BOTH
        yield Case(
            bench,
            name,
            str(dtype).removeprefix("torch."),
            direction,
            shape,
            forward.bytes + (backward.bytes if both else 0),
            forward.flops + (backward.flops if both else 0),
            partial(build, direction),
            {"samples": shape["batch"]} if "batch" in shape else {},
            names=(OURS, *peers),
        )
