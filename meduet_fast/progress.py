"""Show progress: a rich bar with rate and ETA on a terminal, plain lines otherwise."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult
    from rich.live import Live

T = TypeVar("T")
PLAIN_INTERVAL_S = 5.0
SHORTEST_BAR, LONGEST_BAR = 10, 24


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


class ProgressBar:
    """Count ``total`` units of work: ``with ProgressBar("Encoding", 10, "volume") as bar: bar.update()``.

    Rich draws one line of any width: what does not fit is left out whole, the text beside the bar first.

    Args:
        description: what is being done.
        total: how many units there are, which may change as more is known; nothing is shown of none.
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
        self._shown = shown and total > 0
        self._start = self._last_line = time.monotonic()
        self._live: Live | None = None
        if self._shown and sys.stderr.isatty():
            # Imported here: without a terminal (batch jobs, benchmarks on a bare machine) rich is not needed.
            from rich.console import Console
            from rich.live import Live

            self._live = Live(self, console=Console(file=sys.stderr))

    def __enter__(self) -> ProgressBar:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._live is not None:
            self._live.stop()
        elif kind is None and self._shown:
            self._print_line()

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from rich.progress_bar import ProgressBar as Bar
        from rich.table import Table
        from rich.text import Text

        before, bar, behind = self.layout(options.max_width)
        line = Table.grid(padding=(0, 1, 0, 0), pad_edge=False)
        cells = [before, Bar(self.total, self.done, width=bar) if bar else "", behind]
        line.add_row(*(Text(cell) if isinstance(cell, str) else cell for cell in cells if cell))
        yield line

    @property
    def rate(self) -> float:
        """Return units a second since the start."""
        return (self.done - self.initial) / max(time.monotonic() - self._start, 1e-9)

    def update(self, advance: int = 1, text: str | None = None) -> None:
        """Count ``advance`` units as done and show ``text``, of items that a comma and a blank separate."""
        self.done += advance
        if text is not None:
            self.text = text
        if self._live is None and self._shown and time.monotonic() - self._last_line >= PLAIN_INTERVAL_S:
            self._print_line()

    def layout(self, width: int) -> tuple[str, int, str]:
        """Share out a line: what is before the bar, the bar's width (0: there is none), what is behind it.

        Done and total, rate and ETA come first, then the description, the time that has passed and a bar, and
        then the text's items in their order.
        """
        first, *others, elapsed = self._figures()
        behind = first
        for figure in others:
            behind = longer if len(longer := f"{behind}, {figure}") <= width else behind
        before = self.description if len(self.description) + 1 + len(behind) <= width else ""
        left = width - len(behind) - (len(before) + 1 if before else 0)
        if len(elapsed) + 2 <= left - SHORTEST_BAR - 1:
            behind, left = f"{behind}, {elapsed}", left - len(elapsed) - 2
        bar = min(left - 1, LONGEST_BAR)
        bar = bar if bar >= SHORTEST_BAR else 0
        left -= bar + 1 if bar else 0
        for item in self.text.split(", ") if self.text else []:
            if len(item) + 2 > left:
                break
            behind, left = f"{behind}, {item}", left - len(item) - 2
        return before, bar, behind

    def _figures(self) -> list[str]:
        """Return done and total, rate and ETA where there is one yet, and the time that has passed."""
        figures = [f"{self.done}/{self.total}"]
        if self.done > self.initial:
            figures.append(f"{self.rate:.3g} {self.unit}/s")
            if self.done < self.total:
                figures.append(f"ETA {_duration((self.total - self.done) / self.rate)}")
        return [*figures, f"{_duration(time.monotonic() - self._start)} elapsed"]

    def _print_line(self) -> None:
        self._last_line = time.monotonic()
        text = ", ".join([*self._figures(), *([self.text] if self.text else [])])
        print(f"{self.description}: {text}", file=sys.stderr, flush=True)


def track(items: Sequence[T], description: str, unit: str) -> Iterator[T]:
    """Iterate with a progress display."""
    with ProgressBar(description, len(items), unit) as bar:
        for item in items:
            yield item
            bar.update()
