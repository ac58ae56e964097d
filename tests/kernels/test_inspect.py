"""Ahead-of-time inspection: what it finds, and that it fails where it must."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl

from meduet_fast.kernels import inspect, pooled_layer_norm
from meduet_fast.kernels.inspect import Compiled, compile_launch, compile_workload, floors, main, summarize
from meduet_fast.kernels.launch import Launch, record_launches
from meduet_fast.kernels.verify import outputs_and_gradients
from meduet_fast.kernels.workloads import pool_workload, workloads

GOOD = Compiled("op", "sizes", "kernel", "config", 90, 100, 0, 1024, 4, 2, True, "")
POOL = pool_workload(64, 216, 192, masked=True)
BFLOAT16 = torch.bfloat16


def test_every_kernel_of_a_workload_is_compiled_without_a_gpu() -> None:
    found = compile_workload(POOL, BFLOAT16, 90)
    assert [item.kernel for item in found] == [
        "pool_forward_kernel",
        "pool_reduce_kernel",
        "pool_backward_kernel",
    ]
    for item in found:
        assert 16 <= item.registers <= 255
        assert item.spill_bytes == 0
        assert item.problem == ""


def test_lengths_of_one_compile_too() -> None:
    """An integer argument of 1 becomes a constant of the kernel, which is another type there."""
    with record_launches(90) as launches:
        x = torch.empty(1, 1, 16, device="meta", requires_grad=True)
        outputs_and_gradients(pooled_layer_norm, {"x": x})
    assert len(launches) == 3
    for launch in launches:
        assert compile_launch(launch, POOL, BFLOAT16, 90).problem == ""


def test_a_spill_and_too_much_shared_memory_are_problems(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(inspect.CHIPS, 90, {"small": (1e12, 1e12, 16)})
    assert "bytes of shared memory, the chip has 16" in compile_workload(POOL, BFLOAT16, 90)[0].problem


@triton.jit
def product_kernel(x, y, out, depth, SIZE: tl.constexpr, DEPTH: tl.constexpr):
    # out = x y, x (SIZE, depth), y (depth, SIZE); where x is float32 it is converted in registers.
    row, k = tl.arange(0, SIZE), tl.arange(0, DEPTH)
    total = tl.zeros((SIZE, SIZE), tl.float32)
    for first in range(0, depth, DEPTH):
        left = tl.load(x + row[:, None] * depth + first + k[None, :]).to(tl.bfloat16)
        right = tl.load(y + (first + k)[:, None] * SIZE + row[None, :])
        total = tl.dot(left, right, total)
    tl.store(out + row[:, None] * SIZE + row[None, :], total)


@pytest.mark.parametrize(
    ("dtype", "stages", "wrong"), [(torch.float32, 3, True), (torch.float32, 1, False), (BFLOAT16, 3, False)]
)
def test_a_converted_left_factor_in_a_pipelined_loop_is_a_problem(
    dtype: torch.dtype, stages: int, wrong: bool
) -> None:
    """On sm_90 its registers are overwritten by the next tile while the product still reads them."""
    x, y, out = torch.empty(64, 512, dtype=dtype), torch.empty(512, 64, dtype=BFLOAT16), torch.empty(64, 64)
    constants, options = {"SIZE": 64, "DEPTH": 64}, {"num_warps": 4, "num_stages": stages}
    launch = Launch(product_kernel, (1,), (x, y, out, 512), constants, "product", options)
    found = compile_launch(launch, POOL._replace(matrix=True), BFLOAT16, 90)
    assert found.tensor_core > 0
    assert ("a left factor in registers while products are in flight" in found.problem) is wrong


def test_the_summary_has_a_line_for_what_is_noteworthy() -> None:
    plain = replace(GOOD, config="plain", tensor_core=0)
    large = replace(GOOD, shared_bytes=48 * 1024 + 1)
    assert summarize([plain, GOOD, large, replace(plain, arch=80, spill_bytes=8)]) == {
        "config sm_90": "of 2 launches 2 use tensor cores, 1 take over 48 KiB",
        "plain sm_80": "of 1 launches 1 spill",
    }
    assert summarize([replace(GOOD, registers=200, wide_loads=9)]) == summarize([GOOD])


@pytest.mark.parametrize("problem", ["", "spills 8 bytes"])
def test_a_problem_fails_the_command(
    problem: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(inspect, "compile_all", lambda archs: [replace(GOOD, problem=problem)])
    snapshot = tmp_path / "inspect.json"
    assert main(["--arch", "90", "--json", str(snapshot)]) == (1 if problem else 0)
    shown = capsys.readouterr()
    assert "kernel" in shown.out
    assert (problem in shown.err) if problem else not shown.err
    assert main(["--arch", "90", "--check", str(snapshot)]) == (1 if problem else 0)
    monkeypatch.setattr(inspect, "compile_all", lambda archs: [replace(GOOD, tensor_core=0)])
    assert main(["--arch", "90", "--check", str(snapshot)]) == 1
    assert "differs" in capsys.readouterr().err


def test_every_workload_states_what_it_costs() -> None:
    seen = set()
    for workload in workloads():
        row = json.loads(json.dumps(floors(workload)))
        assert row["forward"]["megabytes"] > 0
        assert row["forward"]["H100_us"] > 0
        assert (workload.op, workload.label) not in seen
        seen.add((workload.op, workload.label))
