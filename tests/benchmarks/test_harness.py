"""Nothing wrong is timed, variants take turns, and what a run leaves behind can be read again."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import command, harness, operations, run
from benchmarks.harness import OUT_OF_TIME, WRONG, Case, Sample, Variant, failures, time_case, time_cases
from benchmarks.results import Results, Row
from meduet_fast.kernels.workloads import Workload, pool_workload

CPU = torch.device("cpu")


def made_case(*variants: Variant, **fields: Any) -> Case:
    case = Case(
        "made_up", "B=2", "float32", "forward", {"batch": 2}, 100, 200, lambda: variants, {"samples": 2}
    )
    return replace(case, **fields)


def fail(message: str = "off by 3", kind: type[Exception] = AssertionError) -> Callable[[], None]:
    def check() -> None:
        raise kind(message)

    return check


def test_a_wrong_result_is_not_timed_and_fails_the_command(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    called: list[str] = []
    wrong = Variant("ours", lambda: called.append("wrong"), fail())
    right = Variant("eager", lambda: called.append("right"))
    rows = time_case(made_case(wrong, right), CPU, 0.01)
    assert set(called) == {"right"}
    assert [row.variant for row in rows] == ["ours", "eager"]
    assert rows[0].unavailable == WRONG + "off by 3"
    assert rows[0].median_us is None
    assert rows[1].median_us is not None
    assert rows[1].ratios == {}
    assert failures(rows) == [f"made_up, B=2, ours, forward float32: {WRONG}off by 3"]

    monkeypatch.setattr(command, "measure_peaks", lambda device: {})
    cases = {"wrong": made_case(wrong), "right": made_case(right)}
    for name, code in (("wrong", 1), ("right", 0)):
        arguments = ["--device", "cpu", "--quick"]
        assert command.cases_command(lambda d, q, name=name: [cases[name]], "A benchmark.", arguments) == code
    assert "off by 3" in capsys.readouterr().err


def test_a_peer_that_cannot_run_is_said_to_and_ours_must_run() -> None:
    broken = Variant("xformers", fail("no kernel\nsecond line", RuntimeError))
    missing = Variant("flash2", unavailable="flash_attn is not installed")
    rows = time_case(made_case(Variant("ours"), broken, missing), CPU, 0.01)
    assert [row.unavailable for row in rows] == ["", "RuntimeError: no kernel", "flash_attn is not installed"]
    assert failures(rows) == []
    rows = time_case(made_case(Variant("ours", fail("no kernel", RuntimeError))), CPU, 0.01)
    assert rows[0].unavailable == WRONG + "RuntimeError: no kernel"


def test_memory_that_does_not_suffice_is_a_reason() -> None:
    def build() -> Sequence[Variant]:
        raise torch.OutOfMemoryError

    peer = Variant("eager", fail("", torch.OutOfMemoryError))
    rows = time_case(made_case(Variant("ours"), peer), CPU, 0.01)
    assert [row.unavailable for row in rows] == ["", "out of memory"]
    assert time_case(made_case(build=build), CPU)[0].unavailable == "out of memory"


def test_variants_take_turns() -> None:
    order: list[str] = []
    variants = [Variant(name, lambda name=name: order.append(name)) for name in "ABC"]
    rows = time_case(made_case(*variants), CPU, 0.0)
    warm_up, timed = order[:3], order[3:]
    assert warm_up == ["A", "B", "C"]
    assert timed == ["A", "B", "C"] * harness.MIN_ROUNDS
    assert {row.repeats for row in rows} == {harness.MIN_ROUNDS}


def test_ratios_are_those_of_neighbouring_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    # The machine becomes slower from round to round: times double, ratios stay.
    times = {"ours": itertools.cycle([1.0, 2.0, 4.0]), "eager": itertools.cycle([3.0, 6.0, 12.0])}
    monkeypatch.setattr(harness, "sample", lambda call, device: Sample(next(times[call()]), 0.0))
    ours, eager = time_case(made_case(*(Variant(name, lambda name=name: name) for name in times)), CPU, 0.0)
    assert ours.median_us == pytest.approx(2e6)
    assert ours.low_us == pytest.approx(1.2e6)
    assert ours.high_us == pytest.approx(3.6e6)
    assert ours.ratios == {"eager": pytest.approx(3.0)}
    assert ours.ratio_spread == {"eager": (pytest.approx(3.0), pytest.approx(3.0))}
    assert eager.ratios == {"ours": pytest.approx(1 / 3)}
    assert ours.extra == {"samples_per_s": pytest.approx(1.0)}
    assert (ours.bytes, ours.flops, ours.shape) == (100, 200, {"batch": 2})
    assert ours.cold_us is ours.host_us is ours.peak_memory is None


def test_cases_that_the_budget_does_not_reach_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = itertools.count(step=10.0)
    monkeypatch.setattr(
        harness, "time_case", lambda case, device, budget_s: [case.row("ours", median_us=1.0)]
    )
    monkeypatch.setattr(harness.time, "perf_counter", lambda: next(clock))
    cases = [made_case(names=("ours", "eager")) for _ in range(2)]
    rows = list(time_cases(cases, CPU, 15.0))
    assert [row.variant for row in rows] == ["ours", "ours", "eager"]
    assert [row.unavailable for row in rows] == ["", OUT_OF_TIME, OUT_OF_TIME]


@pytest.fixture
def workload() -> Workload:
    return pool_workload(2, 6, 8, masked=True)


def test_an_operation_and_its_peers_are_held_to_the_definition(workload: Workload) -> None:
    def doubled(x: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
        return tuple(2 * item for item in workload.reference(x, mask))

    def missing() -> operations.Run:
        raise ModuleNotFoundError("No module named 'xformers'", name="xformers")

    peers = {"eager": lambda: workload.reference, "doubled": lambda: doubled, "xformers": missing}
    cases = list(operations.op_cases("pool", "small", workload, CPU, {"batch": 2}, peers))
    assert [case.direction for case in cases] == ["forward", "forward_backward"]
    assert all(case.names == ("ours", "eager", "doubled", "xformers") for case in cases)
    forward, backward = workload.cost(4)
    assert [case.flops for case in cases] == [forward.flops, forward.flops + backward.flops]
    for case in cases:
        rows = time_case(case, CPU, 0.0)
        assert [bool(row.median_us) for row in rows] == [True, True, False, False]
        assert rows[2].unavailable.startswith(f"{WRONG}output 0 is off by")
        assert ("grad x is off by" in rows[2].unavailable) == (case.direction == "forward_backward")
        assert rows[3].unavailable == "xformers is not installed"


def test_only_what_asks_for_a_gradient_gets_one(workload: Workload) -> None:
    seen: list[bool] = []

    def watch(x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        seen.append(x.requires_grad)
        return workload.reference(x, mask)

    for case in operations.op_cases("pool", "small", workload, CPU, {}, {"watch": lambda: watch}):
        seen.clear()
        time_case(case, CPU, 0.0)
        assert set(seen) == {case.direction == "forward_backward"}


def test_peaks_are_rates() -> None:
    peaks = harness.measure_peaks(CPU)
    rates = {"copy_bytes_per_s", "matrix_flops_per_s_float32", "matrix_flops_per_s_bfloat16"}
    assert set(peaks) == rates
    assert all(math.isfinite(rate) and rate > 1e6 for rate in peaks.values())


def test_results_can_be_read_again(tmp_path: Path) -> None:
    rows = time_case(
        made_case(Variant("ours"), Variant("eager"), Variant("flash2", unavailable="no")), CPU, 0.0
    )
    results = Results(
        {"device": "a CPU", "date": "2026-01-01", "commit": "abc"}, {"copy_bytes_per_s": 1e9}, rows
    )
    path = results.save(tmp_path / "results.json")
    again = Results.load(path)
    assert [row.variant for row in again.rows] == ["ours", "eager", "flash2"]
    assert again.save(tmp_path / "again.json").read_text() == path.read_text()


def test_a_run_goes_on_after_a_benchmark_that_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Broken:
        @staticmethod
        def rows(device: torch.device, quick: bool) -> list[Row]:
            raise ValueError("a mistake")

    class Missing:
        @staticmethod
        def rows(device: torch.device, quick: bool) -> list[Row]:
            raise ModuleNotFoundError("No module named 'monai'", name="monai")

    class Good:
        @staticmethod
        def cases(device: torch.device, quick: bool) -> list[Case]:
            return [made_case(Variant("ours"), Variant("eager"))]

    modules = {".bench_step": Broken, ".bench_loader": Missing, ".bench_pool": Good}
    monkeypatch.setattr(run, "importlib", SimpleNamespace(import_module=lambda name, package: modules[name]))
    monkeypatch.setattr(run, "measure_peaks", lambda device: {"copy_bytes_per_s": 1e9})
    arguments = ["--set", "cpu", "--output", str(tmp_path), "--only", "step", "loader", "pool"]
    assert run.main(arguments) == 1
    (path,) = tmp_path.glob("*.json")
    rows = Results.load(path).rows
    assert [(row.bench, row.unavailable) for row in rows] == [
        ("step", f"{WRONG}ValueError: a mistake"),
        ("loader", "monai is not installed"),
        ("made_up", ""),
        ("made_up", ""),
    ]
    assert (tmp_path / "table.txt").is_file()
    assert "a mistake" in capsys.readouterr().err
    assert run.main([*arguments[:-3], "pool"]) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--only", "poool"], "no benchmark poool in the set cpu"), (["--set", "gpu"], "needs a CUDA device")],
)
def test_bad_arguments_are_named(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as stop:
        run.main(arguments)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_a_device_that_is_not_there_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        command.cases_command(lambda device, quick: [], "A benchmark.", ["--device", "gpu0"])
    assert stop.value.code == 2
    assert "gpu0" in capsys.readouterr().err
