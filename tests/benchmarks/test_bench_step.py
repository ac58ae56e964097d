"""The step benchmark and the profiler on a network so small that it takes seconds; nothing is compiled."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from benchmarks import bench_step, profile_step, step_parts
from benchmarks.harness import OUT_OF_TIME, time_case
from benchmarks.profile_step import Usage, usage
from benchmarks.step_parts import Setting
from meduet_fast.kernels import kernel_backend
from meduet_fast.models import MeDUETConfig
from meduet_fast.pretraining import ObjectiveConfig
from meduet_fast.pretraining.cost import flops_per_sample

CPU = torch.device("cpu")
TINY = Setting(
    "tiny",
    MeDUETConfig(
        latent_size=8, patch_size=2, embed_dim=24, depth=1, num_heads=2, decoder_embed_dim=12,
        decoder_depth=1, decoder_num_heads=2, num_domains=3,
    ),
)  # fmt: skip


@pytest.fixture(autouse=True)
def _no_compiler(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(bench_step, "compile_blocks", lambda blocks: None)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_step_rows_and_the_ablation() -> None:
    rows = time_case(bench_step.step_case(TINY, 4, True, CPU, stages=True), CPU, 0.1)
    measured = {row.variant for row in rows if row.median_us}
    assert measured == {"ours", "published", "published, compiled", "ours, redundant work removed"}
    ours = rows[0]
    assert ours.ratios.keys() == measured - {"ours"}
    assert ours.extra["samples_per_s"] == pytest.approx(4e6 / ours.median_us)  # type: ignore[operator]
    assert ours.flops == 4 * flops_per_sample(TINY.model, ObjectiveConfig())
    stages = bench_step.ablation(rows)
    assert [row.variant for row in stages][:2] == ["published", "redundant work removed"]
    assert [row.variant for row in stages if row.unavailable] == [
        "fused kernels", "bf16, nothing waits", "CUDA graph",
    ]  # fmt: skip
    assert {row.bench for row in stages} == {"step_ablation"}


def test_cases_that_the_time_does_not_reach_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_step, "SMALL", TINY)
    rows = list(bench_step.rows(CPU, quick=True, seconds=-1))
    assert [row.variant for row in rows] == ["ours"] * 2
    assert {row.unavailable for row in rows} == {OUT_OF_TIME}


def test_a_wrong_loss_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    original = bench_step.pretraining_losses

    def wrong(*arguments: object, **options: object) -> dict[str, torch.Tensor]:
        losses = original(*arguments, **options)  # type: ignore[arg-type]
        return losses | {"total": 1.001 * losses["total"]}

    monkeypatch.setattr(bench_step, "pretraining_losses", wrong)
    rows = time_case(bench_step.step_case(TINY, 4, True, CPU, stages=False), CPU, 0.1)
    assert rows[0].median_us is None
    assert "not correct: " in rows[0].unavailable
    assert "differ from the published step" in rows[0].unavailable


def test_waiting_for_data_is_told() -> None:
    (row,) = bench_step.loading_rows(TINY, 4, CPU)
    assert row.median_us
    assert 0 < row.extra["data_wait_percent"] < 100


def test_plain_kernels_are_put_back() -> None:
    before = kernel_backend()
    with step_parts.plain_kernels():
        assert kernel_backend() == "eager"
    assert kernel_backend() == before


def test_usage_of_a_device() -> None:
    assert usage([]) == Usage(0.0, 0.0, 0, 0.0)
    assert usage([(5, 8), (0, 2), (1, 3), (6, 7), (9, 10)]) == Usage(10, 7, 2, 2)


def test_profile_writes_a_trace_and_says_what_takes_time(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trace = tmp_path / "traces" / "step.json"
    arguments = ["--device", "cpu", "--batch", "2", "--steps", "1", "--trace", str(trace)]
    assert profile_step.main(arguments, TINY) == 0
    assert json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
    printed = capsys.readouterr().out
    assert "samples/s" in printed
    assert "aten::mm" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batch", "3"], "--batch is 3, expected an even number"),
        (["--steps", "0"], "'0', expected a whole"),
    ],
)
def test_profile_refuses_bad_arguments(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        profile_step.main(["--device", "cpu", *arguments], TINY)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_a_folder_without_the_published_code_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        bench_step.main(["--device", "cpu", "--peer", str(tmp_path)])
    assert stopped.value.code == 2
    assert f"{tmp_path}: no checkout of the published code" in capsys.readouterr().err
