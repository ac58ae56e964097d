"""What a run leaves behind, also where it is cut short, and how it is named."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import run
from benchmarks.results import Results, Row, commit, provenance


def test_rows_are_saved_as_they_come_and_a_lost_device_ends_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    unfinished = tmp_path / run.UNFINISHED
    saved: list[int] = []

    class Steps:
        @staticmethod
        def rows(device: torch.device, quick: bool) -> Iterator[Row]:
            for name in ("ours", "eager"):
                saved.append(len(Results.load(unfinished).rows) if unfinished.exists() else 0)
                yield Row("step", "a", name)

    monkeypatch.setattr(run, "importlib", SimpleNamespace(import_module=lambda name, package: Steps))
    monkeypatch.setattr(run, "measure_peaks", lambda device: {"copy_bytes_per_s": 1e9})
    monkeypatch.setattr(run, "lost", lambda device: True)
    assert run.main(["--set", "cpu", "--output", str(tmp_path), "--only", "step", "pool"]) == run.LOST
    assert saved == [0, 1]
    assert [row.variant for row in Results.load(unfinished).rows] == ["ours", "eager"]
    assert "cpu can't be used any more: step broke it" in capsys.readouterr().err


def test_a_run_survives_a_machine_without_git_and_nvidia_smi(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MEDUET_COMMIT", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    found = provenance(torch.device("cuda"))
    assert found["commit"] == "unknown"
    assert found["driver, clock, power"] == "unknown"


def test_a_copy_is_named_as_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MEDUET_COMMIT", raising=False)
    assert commit() != "0123456789ab"
    monkeypatch.setenv("MEDUET_COMMIT", "0123456789ab")
    assert commit() == "0123456789ab"
