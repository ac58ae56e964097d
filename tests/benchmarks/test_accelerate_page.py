"""The page of accelerated models, of one small model and one that is not installed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks import accelerate
from benchmarks.bench_accelerate import Example


def _small() -> tuple[nn.Module, tuple[Any, ...]]:
    return nn.Sequential(nn.GroupNorm(2, 4), nn.SiLU(), nn.Conv3d(4, 2, 1)), (torch.randn(1, 4, 2, 2, 2),)


def _absent() -> tuple[nn.Module, tuple[Any, ...]]:
    raise ModuleNotFoundError(name="nowhere")


def test_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(accelerate, "EXAMPLES", (Example("small", _small), Example("absent", _absent)))
    monkeypatch.setattr(accelerate.logging, "disable", lambda level: None)
    output = tmp_path / "accelerate.md"
    assert accelerate.main(["--seconds", "0", "--output", str(output)]) == 0
    lines = output.read_text(encoding="utf-8").splitlines()
    cells = next(line for line in lines if line.startswith("| small")).strip("| ").split(" | ")
    assert cells[1] == "1 Sequential"
    assert max(float(cells[2]), float(cells[3])) < 1e-12
    assert all(cell.endswith("(3)") and float(cell.split()[0]) > 0 for cell in cells[4:])
    assert any(line.startswith("| absent | nowhere is not installed |") for line in lines)
    assert "small" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        accelerate.main(["--only", "unknown"])
