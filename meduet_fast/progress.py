"""Show progress: a rich bar with rate and ETA on a terminal, plain lines otherwise."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

T = TypeVar("T")
PLAIN_INTERVAL_S = 5.0


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


class ProgressBar:
    """Count ``total`` units of work: ``with ProgressBar("Encoding", 10, "volume") as bar: bar.update()``.

    Args:
        description: what is being done.
        total: how many units there are; the attribute may change as more is known.
        unit: name of one unit, for the rate.
        initial: units that were done before (a resumed run); they do not count towards the rate.
        shown: of several processes one shows the display.
    """

    def __init__(
        self, description: str, total: int, unit: str = "it", initial: int = 0, shown: bool = True
    ) -> None:
        self.description, self.total, self.unit = description, total, unit
        self.done = self.initial = initial
        self.text = ""
        self._shown = shown
        self._start = self._last_line = time.monotonic()
        self._task: TaskID | None = None
        self._progress: Progress | None = None
        if shown and sys.stderr.isatty():
            # Imported here: without a terminal (batch jobs, benchmarks on a bare machine) rich is not needed.
            from rich import progress
            from rich.console import Console

            self._progress = progress.Progress(
                progress.TextColumn("{task.description}"),
                progress.BarColumn(bar_width=24),
                progress.TextColumn("{task.completed}/{task.total}"),
                progress.TextColumn("{task.fields[rate]}"),
                progress.TimeElapsedColumn(),
                progress.TextColumn("ETA"),
                progress.TimeRemainingColumn(),
                progress.TextColumn("{task.fields[text]}"),
                console=Console(file=sys.stderr),
            )

    def __enter__(self) -> ProgressBar:
        if self._progress is not None:
            self._progress.start()
            self._task = self._progress.add_task(
                self.description, total=self.total, completed=self.done, rate="", text=""
            )
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._progress is not None:
            self._progress.stop()
        elif kind is None and self._shown:
            self._print_line()

    @property
    def rate(self) -> float:
        """Return units a second since the start."""
        return (self.done - self.initial) / max(time.monotonic() - self._start, 1e-9)

    def update(self, advance: int = 1, text: str | None = None) -> None:
        """Count ``advance`` units as done and show ``text`` beside the bar."""
        self.done += advance
        if text is not None:
            self.text = text
        if self._progress is not None and self._task is not None:
            self._progress.update(
                self._task, completed=self.done, total=self.total, text=self.text,
                rate=f"{self.rate:.3g} {self.unit}/s",
            )  # fmt: skip
        elif self._shown and time.monotonic() - self._last_line >= PLAIN_INTERVAL_S:
            self._print_line()

    def _print_line(self) -> None:
        self._last_line = time.monotonic()
        elapsed = _duration(self._last_line - self._start)
        remaining = (self.total - self.done) / self.rate if self.done > self.initial else float("nan")
        eta = _duration(remaining) if remaining == remaining else "?"
        print(
            f"{self.description}: {self.done}/{self.total} {self.unit}, {self.rate:.3g} {self.unit}/s, "
            f"{elapsed} elapsed, ETA {eta}" + (f" | {self.text}" if self.text else ""),
            file=sys.stderr,
            flush=True,
        )


def track(items: Sequence[T], description: str, unit: str) -> Iterator[T]:
    """Iterate with a progress display; nothing is shown of no items."""
    if not items:
        return
    with ProgressBar(description, len(items), unit) as bar:
        for item in items:
            yield item
            bar.update()
