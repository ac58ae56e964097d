"""Both U-Nets at a size that takes no time; nothing is compiled."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from benchmarks import bench_diffusion_unet as bench
from benchmarks.harness import time_case

pytest.importorskip("diffusers", reason="diffusers is not installed")

CPU = torch.device("cpu")
TINY = bench.Setting(4, 2, (8, 16), (False, True), 1, 2, 4)


@pytest.fixture(autouse=True)
def _no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nn.Module, "compile", lambda self, **options: None)
    monkeypatch.setattr(bench, "SMALL", TINY)


def test_both_are_timed_forward_and_in_a_step() -> None:
    for case in bench.cases(CPU, quick=True):
        rows = time_case(case, CPU, 0.0)
        assert [row.variant for row in rows if row.median_us] == list(bench.NAMES) == list(case.names)
        assert rows[0].ratios["MONAI, compiled"] > 0
        rates = {"samples_per_s", "steps_per_s"} if case.direction == bench.BOTH else {"samples_per_s"}
        assert rows[0].extra.keys() == rates


def test_equal_widths_are_about_equal_work() -> None:
    parameters = [
        sum(item.numel() for name, item in build(TINY)[0].named_parameters() if "embed" not in name)
        for build in (bench.our_network, bench.monai_network)
    ]
    assert parameters[0] == pytest.approx(parameters[1], rel=0.35)


def test_what_is_not_right_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    def off(run: nn.Module, inputs: tuple[torch.Tensor, ...], low: bool) -> dict[str, torch.Tensor]:
        found = results(run, inputs, low)
        wrong = {"output": found["output"] * (1 + next(noise)), "gradient": found["gradient"] / 0}
        return {**found, **wrong}

    results, noise = bench.results, iter(range(9))
    monkeypatch.setattr(bench, "results", off)
    rows = time_case(next(bench.cases(CPU, quick=True)), CPU, 0.0)
    assert not any(row.median_us for row in rows)
    assert "is off by" in rows[0].unavailable
    assert "is not finite" in rows[-1].unavailable
