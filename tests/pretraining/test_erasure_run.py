"""Erasure in the loop: it reaches both models and survives a resume."""

from __future__ import annotations

import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from meduet_fast.engine.checkpoint import latest_checkpoint
from meduet_fast.engine.metrics import RunLog, read_metrics
from meduet_fast.pretraining import PretrainConfig, erasure, pretrain
from meduet_fast.pretraining.losses import LOSSES

CONTENT = "disentangled_factorizer.proj_c.weight"


@pytest.fixture
def config(tiny_config: PretrainConfig, monkeypatch: pytest.MonkeyPatch) -> PretrainConfig:
    monkeypatch.setattr(erasure, "FIRST", 2)
    return replace(tiny_config, objective=replace(tiny_config.objective, content_adversary="erasure"))


def test_content_loses_directions_and_a_resumed_run_loses_the_same(
    tiny_store: Path, config: PretrainConfig, tmp_path: Path
) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    pretrain(tiny_store, whole, config)
    for name in ("student", "teacher"):
        weight = load_file(latest_checkpoint(whole) / f"{name}.safetensors")[CONTENT].squeeze(-1)
        width, lost = len(weight), 2 * 2  # three domains: two directions each of mixed and of whole crops
        values = torch.linalg.svdvals(weight.double())
        assert values[width - lost] < 1e-5 * values[0] < values[width - lost - 1]

    original = RunLog.report

    def report_then_stop(self: RunLog, step: int, *rest: Any) -> str | None:
        if step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, step, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunLog, "report", report_then_stop)
        assert not pretrain(tiny_store, parts, config).finished
    pretrain(tiny_store, parts, config, resume=True)
    whole_losses, part_losses = (
        [[item[name] for name in LOSSES] for item in read_metrics(run)] for run in (whole, parts)
    )
    assert part_losses == whole_losses
    for name in ("student", "teacher"):
        a, b = (load_file(latest_checkpoint(run) / f"{name}.safetensors") for run in (whole, parts))
        assert all(torch.equal(a[key], b[key]) for key in a)
