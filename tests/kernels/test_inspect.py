"""Ahead-of-time inspection: what it finds, and that it fails where it must."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from meduet_fast.kernels import inspect, pool
from meduet_fast.kernels.inspect import Compiled, compile_workload, floors, main
from meduet_fast.kernels.launch import record_launches
from meduet_fast.kernels.workloads import workloads

GOOD = Compiled("op", "sizes", "kernel", "config", 90, 100, 0, 1024, 4, 2, True, "")


def test_every_kernel_of_a_workload_is_compiled_without_a_gpu() -> None:
    found = compile_workload(pool.workloads()[1], 90)
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
        normed, plain, count = pool._launch_forward(torch.empty(1, 1, 16, device="meta"), None, 1e-5)
        pool._launch_backward(normed, plain, torch.empty(1, 1, 16, device="meta"), None, count, 1e-5)
    for launch in launches:
        assert inspect.compile_launch(launch, pool.workloads()[0], 90).problem == ""


def test_a_spill_and_too_much_shared_memory_are_problems(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(inspect.CHIPS, 90, {"small": (1e12, 1e12, 16)})
    assert "bytes of shared memory, the chip has 16" in compile_workload(pool.workloads()[1], 90)[0].problem


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
    monkeypatch.setattr(inspect, "compile_all", lambda archs: [replace(GOOD, registers=101)])
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
