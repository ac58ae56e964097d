"""Weights of a run, exported."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from meduet_fast.cli import main
from meduet_fast.errors import UserError
from meduet_fast.models import MeDUET
from meduet_fast.pretraining import PretrainConfig, pretrain
from meduet_fast.pretraining.export import Weights, export_run


def test_teacher_and_student_of_the_last_checkpoint(
    tiny_store: Path, tiny_config: PretrainConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    pretrain(tiny_store, run, replace(tiny_config, steps=2))
    weights: Weights
    for weights in ("teacher", "student"):
        output = tmp_path / weights
        assert main(["export", str(run), "--output", str(output), "--weights", weights]) == 0
        assert f"{output}/model.safetensors: written" in capsys.readouterr().out
        expected = MeDUET.from_pretrained(run / "checkpoints" / "2" / f"{weights}.safetensors").state_dict()
        found = MeDUET.from_pretrained(output).state_dict()
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)
        config = json.loads((output / "config.json").read_text())
        assert (config["weights"], config["step"]) == (weights, 2)
        assert ("teacher_keeps_of_start" in config) == (weights == "teacher")


def test_a_teacher_near_its_start_is_named(
    tiny_store: Path, tiny_config: PretrainConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    slow = replace(tiny_config.optimizer, teacher_momentum=0.9, final_teacher_momentum=0.9)
    pretrain(tiny_store, tmp_path / "run", replace(tiny_config, steps=2, optimizer=slow))
    capsys.readouterr()
    export_run(tmp_path / "run", tmp_path / "out")
    assert "warning: the teacher keeps 81 % of what it began with over the 2 steps" in capsys.readouterr().err
    assert json.loads((tmp_path / "out" / "config.json").read_text())["teacher_keeps_of_start"] == 0.81
    export_run(tmp_path / "run", tmp_path / "student", weights="student")
    assert "warning" not in capsys.readouterr().err


def test_a_folder_without_checkpoints_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no checkpoint found"):
        export_run(tmp_path, tmp_path / "out")
