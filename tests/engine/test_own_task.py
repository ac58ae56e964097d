"""A task that has nothing to do with MeDUET: what the engine promises, it promises everybody."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from meduet_fast.engine import EngineConfig, cuda_graph, fit
from meduet_fast.engine.checkpoint import latest_checkpoint
from meduet_fast.engine.cuda_graph import GraphedGradients
from meduet_fast.engine.distributed import World
from meduet_fast.engine.dry_run import describe_run, format_rows
from meduet_fast.engine.metrics import losses_in, read_metrics
from meduet_fast.engine.optimizer import build_optimizer
from meduet_fast.engine.step import add_gradients, train_step
from meduet_fast.errors import UserError

from .test_cuda_graph import stand_in

SCRIPT = Path(__file__).parents[2] / "examples" / "own_task.py"
OWN: dict[str, Any] = runpy.run_path(str(SCRIPT))
CONFIG = EngineConfig(steps=8, batch_size=8, accumulate=2, device="cpu", log_every=1, checkpoint_every=3)


def losses(run: Path) -> list[list[float]]:
    return [[record[name] for name in (*losses_in(record), "grad_norm")] for record in read_metrics(run)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("own") / "run"
    assert fit(OWN["make"], CONFIG, run).finished
    return run


def test_records_and_exports(whole: Path) -> None:
    records = read_metrics(whole)
    assert losses_in(records[0]) == ["error", "slope", "total"]
    assert "tokens_per_s" not in records[0]
    assert records[-1]["error"] < records[0]["error"]
    exported = load_file(latest_checkpoint(whole) / "denoiser.safetensors")
    assert {key: tuple(value.shape) for key, value in exported.items()} == {
        "0.weight": (64, 32), "0.bias": (64,), "2.weight": (32, 64), "2.bias": (32,),
    }  # fmt: skip


def test_a_resumed_run_is_the_whole_one(whole: Path, tmp_path: Path) -> None:
    class Interrupted(OWN["Sines"]):  # type: ignore[misc]
        def read(self, *place: Any) -> Any:
            for number, batch in enumerate(super().read(*place)):
                if number == 10:
                    raise KeyboardInterrupt
                yield batch

    with pytest.raises(KeyboardInterrupt):
        fit(lambda: (OWN["Denoiser"](), Interrupted()), CONFIG, tmp_path / "run")
    with pytest.raises(UserError, match="holds a run already"):
        fit(OWN["make"], CONFIG, tmp_path / "run")
    assert fit(OWN["make"], CONFIG, tmp_path / "run", resume=True).finished
    assert losses(tmp_path / "run") == losses(whole)
    for key, value in load_file(latest_checkpoint(whole) / "denoiser.safetensors").items():
        assert torch.equal(
            load_file(latest_checkpoint(tmp_path / "run") / "denoiser.safetensors")[key], value
        )


def test_other_data_are_refused(whole: Path) -> None:
    class Others(OWN["Sines"]):  # type: ignore[misc]
        identity = "others"

    with pytest.raises(UserError, match="not those that the run began with"):
        fit(lambda: (OWN["Denoiser"](), Others()), CONFIG, whole, resume=True)


def test_a_replayed_graph_gives_the_plain_losses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_graph, "capture", stand_in)

    def run(graph: bool) -> list[dict[str, float]]:
        torch.manual_seed(0)
        task, data = OWN["make"]()
        optimizer, stream = build_optimizer(task.trained(), task.adamw), data.read(0, 16, 0, 1, False)
        config = replace(CONFIG, cuda_graph=graph)

        backward = GraphedGradients(task, 0.5) if graph else partial(add_gradients, task, share=0.5)
        world = World(torch.device("cpu"))
        return [train_step(task, backward, optimizer, stream, n, config, world).fetch() for n in range(8)]

    assert run(graph=True) == run(graph=False)


def test_what_a_dry_run_says() -> None:
    with torch.device("meta"):
        text = format_rows(describe_run(OWN["Denoiser"](), CONFIG, processes=2))
    assert "2 processes, one GPU each: a copy of all weights on each (ddp)" in text
    assert "8 samples at once x 2 accumulated x 2 = 32 samples a step" in text
    assert "24.58 kFLOP a sample from step 4 on" in text
    assert "6.291 MFLOP in all" in text


def test_compile_without_blocks_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="compile is on, expected false: denoising has no blocks"):
        fit(OWN["make"], replace(CONFIG, compile=True), tmp_path / "run")


@pytest.mark.slow
def test_two_processes_train_as_one(whole: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "0"]
    command += ["--standalone", str(SCRIPT), str(tmp_path / "run"), "--steps", "8", "--accumulate", "1"]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=120, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    for found, wanted in zip(losses(tmp_path / "run"), losses(whole), strict=True):
        assert found == pytest.approx(wanted, abs=1e-5)
