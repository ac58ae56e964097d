"""Losses of several runs beside each other."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks.loss_curves import draw, load, main
from meduet_fast.pretraining.losses import LOSSES


def write(folder: Path, scale: float, steps: int = 40) -> Path:
    """A run whose losses are ``scale`` times 1, 2, ... at the end; SiQC sets in at half of it."""
    folder.mkdir(parents=True)
    lines = []
    for step in range(steps):
        losses = {name: scale * (number + 1) * (1 + (step < 4)) for number, name in enumerate(LOSSES)}
        losses["siqc"] *= step >= steps // 2
        lines.append(json.dumps({"step": step, **losses}) + "\n")
    (folder / "metrics.jsonl").write_text("".join(lines))
    return folder


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    return [write(tmp_path / "float32", 1.0), write(tmp_path / "float8", 1.1)]


def test_a_picture_and_differences_from_the_first(
    runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "curves.png"
    assert main([*map(str, runs), "--output", str(output)]) == 0
    assert output.read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert "float32" in printed
    row = next(line for line in printed.splitlines() if "domain_content" in line)
    assert "2.0000" in row
    assert "2.2000 (+0.2000, +10.0 %)" in row


def test_lines_are_named_and_leave_out_what_is_off(runs: list[Path]) -> None:
    axes = draw(load(runs)).axes
    assert len(axes) == len(LOSSES)
    assert [text.get_text() for text in axes[0].get_legend().get_texts()] == ["float32", "float8"]
    siqc = next(ax for ax in axes if "SiQC" in ax.get_title(loc="left"))
    for line, value in zip(siqc.get_lines(), (5.0, 5.5), strict=True):
        assert line.get_xdata()[0] == 20
        np.testing.assert_allclose(line.get_ydata(), value)


def test_a_loss_that_is_off_has_no_share(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = [write(tmp_path / name, 0.0) for name in "ab"]
    assert main([*map(str, folders), "--output", str(tmp_path / "curves.png")]) == 0
    assert "0.0000 (+0.0000)" in capsys.readouterr().out


def fails(arguments: list[object], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as stop:
        main(list(map(str, arguments)))
    assert stop.value.code == 2
    return capsys.readouterr().err


def test_bad_input_is_named(runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "curves.png"
    ending = ["--output", output]
    assert "RUN" in fails([runs[0], *ending], capsys)
    assert f"{tmp_path}/none/metrics.jsonl: cannot be read" in fails(
        [runs[0], tmp_path / "none", *ending], capsys
    )
    short = write(tmp_path / "short", 1.0, steps=20)
    assert "float32 at 39, short at 19" in fails([runs[0], short, *ending], capsys)
    assert "two runs are called float32" in fails([runs[0], runs[0], *ending], capsys)
    (short / "metrics.jsonl").write_text("")
    assert "no records" in fails([runs[0], short, *ending], capsys)
    (short / "metrics.jsonl").write_text("{\n{}\n")
    assert "line 1 is damaged" in fails([runs[0], short, *ending], capsys)
    assert not output.exists()
    assert "error: --output" in fails([*runs, "--output", short / "metrics.jsonl" / "curves.png"], capsys)
