"""A line of progress at any width: step, rate and ETA stay, losses go first; none of no work."""

from __future__ import annotations

import io
import time

import pytest
from rich.console import Console

from meduet_fast import progress
from meduet_fast.engine.metrics import summary_line
from meduet_fast.progress import ProgressBar, track

RECORD = {"samples_per_s": 12.2, "data_wait_percent": 2.0, "memory_mb": 459.0, "total": 5.428, "rec": 2.007}
TEXT = summary_line(RECORD, {"total": "loss", "rec": "rec"})


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds that ``time.monotonic`` says."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def drawn(bar: ProgressBar, width: int) -> str:
    console = Console(width=width, file=io.StringIO(), color_system=None)
    console.print(bar)
    assert isinstance(console.file, io.StringIO)
    [line] = console.file.getvalue().splitlines()
    assert len(line) <= width
    return line.rstrip()


FIGURES = "1234/200000, 12.3 step/s, ETA 4:29:31"


@pytest.mark.parametrize(
    ("width", "before", "bar", "behind"),
    [
        (20, "", 0, "1234/200000"),
        (40, "", 0, FIGURES),
        (80, "Pretraining", 16, f"{FIGURES}, 1:40 elapsed"),
        (120, "Pretraining", 24, f"{FIGURES}, 1:40 elapsed, 12.2 samples/s, data wait 2 %"),
        (200, "Pretraining", 24, f"{FIGURES}, 1:40 elapsed, {TEXT}"),
    ],
)
def test_what_does_not_fit_is_left_out_whole(
    clock: list[float], width: int, before: str, bar: int, behind: str
) -> None:
    shown = ProgressBar("Pretraining", 200_000, "step", shown=False)
    clock[0] = 100.4
    shown.update(1234, TEXT)
    assert shown.layout(width) == (before, bar, behind)
    assert drawn(shown, width) == f"{before} {' ' * (bar + 1)}{behind}".strip()
    shown.update(99_000)
    assert bar // 2 <= drawn(shown, width).count("━") <= bar // 2 + 1


def test_a_rate_and_an_eta_are_said_when_there_are_some(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    with ProgressBar("Decoding", 4, "pair", initial=1) as bar:
        assert drawn(bar, 80).startswith("Decoding ━━━━━━")
        assert drawn(bar, 80).endswith(" 1/4, 0:00 elapsed")
        clock[0] = 6
        bar.update(text="ct, mr")
        assert capsys.readouterr().err == "Decoding: 2/4, 0.167 pair/s, ETA 0:12, 0:06 elapsed, ct, mr\n"
        bar.update(2)
    assert capsys.readouterr().err == "Decoding: 4/4, 0.5 pair/s, 0:06 elapsed, ct, mr\n"


def test_of_no_work_nothing_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    with ProgressBar("Decoding", 0, "pair"):
        pass
    assert list(track([], "Decoding", "pair")) == []
    assert capsys.readouterr().err == ""


def test_on_a_terminal_the_line_is_drawn_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "80")
    with ProgressBar("Encoding", 3, "volume") as bar:
        for _ in range(3):
            time.sleep(0.001)
            bar.update()
    assert "3/3, " in terminal.getvalue()
    assert "volume/s" in terminal.getvalue()
