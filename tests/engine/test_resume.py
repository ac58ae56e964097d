"""Going on: from where, with what changed, to another end; with all moments, or not at all."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from meduet_fast.data.store import LatentStore
from meduet_fast.engine.checkpoint import (
    checkpoint_steps,
    describe_start,
    find_start,
    latest_checkpoint,
    load_checkpoint,
)
from meduet_fast.engine.checkpoint_index import INDEX_FILE
from meduet_fast.engine.distributed import World
from meduet_fast.engine.loop import fit
from meduet_fast.engine.metrics import read_metrics
from meduet_fast.engine.optimizer import build_optimizer
from meduet_fast.errors import UserError
from meduet_fast.lock import FolderLock
from meduet_fast.pretraining import MeDUETPretraining, PretrainConfig, pretrain

CPU = World(torch.device("cpu"))


@pytest.fixture(scope="module")
def done(tiny_store: Path, tiny_settings: PretrainConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four steps, which ended as planned."""
    run = tmp_path_factory.mktemp("done") / "run"
    before = os.umask(0o022)
    try:
        pretrain(tiny_store, run, replace(tiny_settings, steps=4))
    finally:
        os.umask(before)
    return run


@pytest.fixture
def four(tiny_config: PretrainConfig) -> PretrainConfig:
    """Its settings."""
    return replace(tiny_config, steps=4)


def test_files_of_a_run_may_be_read_by_others(done: Path) -> None:
    files = [path for path in done.rglob("*") if path.is_file()]
    assert {path.name for path in files} >= {"student.safetensors", "teacher.safetensors", INDEX_FILE}
    assert {path.name: path.stat().st_mode & 0o777 for path in files} == {path.name: 0o644 for path in files}


@pytest.mark.parametrize("gradients", [False, True], ids=["", "gradients"])
def test_moments_are_loaded_whether_gradients_exist_or_not(
    done: Path, four: PretrainConfig, gradients: bool
) -> None:
    """A CUDA graph makes gradients before the first step."""
    task = MeDUETPretraining(four)
    optimizer = build_optimizer(task.student, four.optimizer)
    made = [torch.ones_like(parameter) for parameter in task.student.parameters()] if gradients else []
    for parameter, gradient in zip(task.student.parameters(), made, strict=False):
        parameter.grad = gradient
    load_checkpoint(latest_checkpoint(done), task, optimizer, CPU)
    trained = [parameter for parameter in task.student.parameters() if parameter.requires_grad]
    assert len(optimizer.state) == len(trained)
    assert all(state["step"] == 4 for state in optimizer.state.values())
    assert sum(bool(state["exp_avg"].any()) for state in optimizer.state.values()) > len(trained) / 2
    for parameter, gradient in zip(task.student.parameters(), made, strict=False):
        assert parameter.grad is gradient  # a graph writes to this very memory
        assert (gradient == 1).all()
    if not gradients:
        assert all(parameter.grad is None for parameter in trained)


@pytest.mark.parametrize("kept", [0, 5])
def test_a_checkpoint_that_lacks_moments_is_refused(
    done: Path, four: PretrainConfig, tmp_path: Path, kept: int
) -> None:
    checkpoint = tmp_path / "4"
    shutil.copytree(latest_checkpoint(done), checkpoint)
    path = checkpoint / "state" / INDEX_FILE
    index = json.loads(path.read_text())
    moments = sorted(name for name in index if name.startswith("optimizer.") and name.endswith(".exp_avg"))
    kept_names = {name.removesuffix("exp_avg") for name in moments[:kept]}
    left = {
        name: entry
        for name, entry in index.items()
        if not name.startswith("optimizer.") or name.rpartition(".")[0] + "." in kept_names
    }
    path.write_text(json.dumps(left))
    task = MeDUETPretraining(four)
    message = rf"4: has the optimizer's moments of {kept} of {len(moments)} parameters: .* or begin anew"
    with pytest.raises(UserError, match=message):
        load_checkpoint(checkpoint, task, build_optimizer(task.student, four.optimizer), CPU)


def find(run: Path, config: PretrainConfig, processes: int = 1) -> Path | None:
    return find_start(run, config, processes, None, resume=True)


def test_what_a_resumed_run_says(done: Path, four: PretrainConfig) -> None:
    checkpoint = find(done, four)
    assert checkpoint == done / "checkpoints" / "4"
    plain = f"continues from {checkpoint} (step 4 of 4)"
    assert describe_start(checkpoint, four, four.optimizer, 1) == plain
    other = replace(four, workers=2, keep_checkpoints=9)
    wanted = f"{plain}; changed: workers 0 -> 2, keep_checkpoints 2 -> 9"
    assert describe_start(checkpoint, other, four.optimizer, 1) == wanted
    wanted = f"{plain}; changed: accumulate 1 -> 2, processes 1 -> 2"
    assert describe_start(checkpoint, replace(four, accumulate=2), four.optimizer, 2) == wanted


def test_a_checkpoint_of_before_says_what_it_can(done: Path, four: PretrainConfig, tmp_path: Path) -> None:
    """Older ones hold only what decides the result."""
    (tmp_path / "4").mkdir()
    saved = json.loads((done / "checkpoints" / "4" / "run.json").read_text())
    del saved["settings"]
    (tmp_path / "4" / "run.json").write_text(json.dumps(saved))
    text = describe_start(tmp_path / "4", replace(four, steps=9, workers=2), four.optimizer, 1)
    assert "(step 4 of 9); changed: steps 4 -> 9; the schedules now end at step 9, not 4" in text


def test_the_end_may_move_and_the_schedule_is_said(
    done: Path, four: PretrainConfig, tiny_store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(done, run)
    longer = replace(four, steps=6)
    assert pretrain(tiny_store, run, longer, resume=True).finished
    said = [line for line in capsys.readouterr().err.splitlines() if "continues" in line]
    # At 4 of 4 steps the cosine has ended, at 2e-5; of 6 it has a third to go: half of (1 + cos(2/3 pi)).
    rate = 2e-5 + (1e-3 - 2e-5) * 0.25
    assert said == [
        f"continues from {run}/checkpoints/4 (step 4 of 6); changed: steps 4 -> 6; the schedules now end at "
        f"step 6, not 4: at step 4 the learning rate is {rate:.3g}, not 2e-05"
    ]
    assert [record["step"] for record in read_metrics(run)] == list(range(6))
    assert read_metrics(run)[4]["learning_rate"] == pytest.approx(rate)
    assert checkpoint_steps(run / "checkpoints") == [4, 6]
    with pytest.raises(UserError, match="run: can't resume: 6 steps are done, --steps asks for 5"):
        pretrain(tiny_store, run, replace(four, steps=5), resume=True)
    assert pretrain(tiny_store, run, longer, resume=True).step == 6


@pytest.mark.parametrize(
    ("accumulate", "processes", "advice"),
    [
        (1, 2, "2 processes can't share 1 batches a step: use a number that divides 1"),
        (3, 1, "with 1 process use --accumulate 1"),
    ],
)
def test_another_number_of_processes_is_told_what_would_do(
    done: Path, four: PretrainConfig, accumulate: int, processes: int, advice: str
) -> None:
    with pytest.raises(UserError, match=r"accumulate x processes was 1, now") as raised:
        find(done, replace(four, accumulate=accumulate), processes)
    assert str(raised.value).endswith(advice)


def test_the_accumulation_that_would_do(done: Path, four: PretrainConfig, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints" / "4"
    folder.mkdir(parents=True)
    saved = json.loads((done / "checkpoints" / "4" / "run.json").read_text())
    saved["config"]["accumulate x processes"] = 12
    (folder / "run.json").write_text(json.dumps(saved))
    with pytest.raises(UserError, match="with 4 processes use --accumulate 3"):
        find(tmp_path, four, 4)
    assert find(tmp_path, replace(four, accumulate=3), 4) == folder


def test_a_run_holds_its_folder(
    done: Path, four: PretrainConfig, tiny_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From before it looks for a checkpoint to its end, and not longer, whatever the end."""
    run, reads = tmp_path / "run", LatentStore.read_crops
    refused: list[str] = []

    def second(self: LatentStore, *arguments: Any) -> torch.Tensor:
        with pytest.raises(UserError) as raised:
            fit(lambda: pytest.fail("begun"), four, run, resume=True)  # type: ignore[arg-type]
        refused.append(str(raised.value))
        return reads(self, *arguments)

    monkeypatch.setattr(LatentStore, "read_crops", second)
    pretrain(tiny_store, run, replace(four, steps=1))
    assert f"in use by process {os.getpid()} on {os.uname().nodename} since 20" in refused[0]
    with FolderLock(run):
        pass
    with pytest.raises(UserError, match="holds a run already"):
        pretrain(tiny_store, run, four)
    assert not list(run.glob(".*"))
