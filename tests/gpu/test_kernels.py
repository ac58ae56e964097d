"""Every standard workload on the GPU: exactness in every dtype, races, compilation with CUDA graphs.

MEDUET_HEAVY=1 in the environment adds what takes many seconds by its definition.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from meduet_fast.kernels import set_kernel_backend
from meduet_fast.kernels.verify import NEIGHBOURS, compare_to, expect, outputs_and_gradients, refuse
from meduet_fast.kernels.workloads import Workload, further_workloads, heavy_workloads, standard_workloads

STANDARD = standard_workloads()
WORKLOADS = STANDARD + further_workloads()
if os.environ.get("MEDUET_HEAVY") == "1":
    WORKLOADS += heavy_workloads()
# Measuring PyTorch's own error on more inputs takes too long where one call does more than this.
MANY_FLOPS = 10**11


def name(value: Workload | torch.dtype) -> str:
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    return f"{value.op}-{value.label}".replace(" ", "-")


def inputs(workload: Workload, dtype: torch.dtype) -> dict[str, Any]:
    torch.manual_seed(0)
    return workload.inputs("cuda", dtype)


@pytest.fixture(autouse=True, scope="module")
def triton_kernels() -> Iterator[None]:
    set_kernel_backend("triton")
    yield
    set_kernel_backend("auto")


@pytest.mark.parametrize(
    ("workload", "dtype"),
    [(workload, dtype) for workload in WORKLOADS for dtype in workload.dtypes],
    ids=name,
)
def test_exact(workload: Workload, dtype: torch.dtype) -> None:
    given = inputs(workload, dtype)
    many = workload.cost(dtype.itemsize)[0].flops > MANY_FLOPS
    expected = expect(workload.reference, given, neighbours=2 if many else NEIGHBOURS)
    refuse(compare_to(workload.run, expected, given))


@pytest.mark.parametrize("workload", WORKLOADS, ids=name)
def test_fifty_runs_are_bitwise_equal(workload: Workload) -> None:
    given = inputs(workload, torch.bfloat16)
    first = outputs_and_gradients(workload.run, given)
    for _ in range(50):
        for key, value in outputs_and_gradients(workload.run, given).items():
            assert torch.equal(value, first[key]), key


@pytest.mark.parametrize("workload", STANDARD, ids=name)
def test_compiled_with_cuda_graphs(workload: Workload) -> None:
    compiled = torch.compile(workload.run, fullgraph=True, mode="reduce-overhead")
    given = inputs(workload, torch.bfloat16)
    for _ in range(3):  # warm-up, recording, replay
        torch.compiler.cudagraph_mark_step_begin()
        replayed = {key: value.clone() for key, value in outputs_and_gradients(compiled, given).items()}
    for key, value in outputs_and_gradients(workload.run, given).items():
        assert torch.equal(value, replayed[key]), key


def test_no_operation_waits_for_the_device() -> None:
    given = [(workload, inputs(workload, torch.bfloat16)) for workload in WORKLOADS]
    for workload, arguments in given:  # kernels are compiled and loaded here, which may wait
        workload.run(**arguments)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for workload, arguments in given:
            result = workload.run(**arguments)
            outputs = [result] if isinstance(result, Tensor) else list(result)
            for output in outputs:
                if output.requires_grad:
                    output.float().sum().backward(retain_graph=True)
    finally:
        torch.cuda.set_sync_debug_mode("default")
