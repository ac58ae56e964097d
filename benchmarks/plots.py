"""Pictures of results; each function gives None where the rows that it would show are absent."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from meduet_fast.plotting import COLORS, GREY, MARKERS, save_png, styled, subplots

from .results import Results, Row
from .tables import DIRECTIONS, OURS, headlines, si, three, without_batch

ABLATION = "step_ablation"


class Plot(NamedTuple):
    """A picture of one device's results: file name without ending, text below it, and who draws it."""

    name: str
    caption: str
    draw: Callable[[Results], Figure | None]


def _measured(rows: Iterable[Row]) -> list[Row]:
    return [row for row in rows if row.median_us is not None]


def _what(row: Row) -> str:
    """Direction and dtype, for titles."""
    return ", ".join(item for item in (DIRECTIONS.get(row.direction, row.direction), row.dtype) if item)


def _legend(ax: Axes) -> None:
    ax.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))


def _look(number: int) -> dict[str, Any]:
    """Colour and marker: pairs repeat only after 42 entries."""
    return {"color": COLORS[number % len(COLORS)], "marker": MARKERS[number % len(MARKERS)]}


def _panels(count: int, height: float) -> tuple[Figure, list[Axes]]:
    columns = min(count, 2)
    rows = -(-count // columns)
    figure, axes = subplots(height * rows, rows, columns)
    for ax in axes[count:]:
        ax.set_visible(False)
    return figure, axes


def _roofline_point(row: Row) -> tuple[float, float] | None:
    """FLOPs a byte, and GFLOP/s."""
    if not (row.bytes and row.flops and row.median_us):
        return None
    return row.flops / row.bytes, row.flops / row.median_us / 1e3


@styled
def roofline(results: Results) -> Figure | None:
    """Our operations below what this machine was measured to reach, one panel a dtype."""
    bandwidth = results.peaks.get("copy_bytes_per_s")
    points: dict[str, dict[tuple[str, str], list[tuple[float, float]]]] = {}
    for row in results.rows:
        point = _roofline_point(row)
        if point and row.variant == OURS and f"matrix_flops_per_s_{row.dtype}" in results.peaks:
            points.setdefault(row.dtype, {}).setdefault((row.bench, row.direction), []).append(point)
    if not bandwidth or not points:
        return None
    looks = {bench: _look(n) for n, bench in enumerate(dict.fromkeys(row.bench for row in results.rows))}
    figure, axes = subplots(4.6 * len(points), len(points), 1)
    for ax, (dtype, groups) in zip(axes, points.items(), strict=True):
        rate = results.peaks[f"matrix_flops_per_s_{dtype}"]
        ends = [rate / bandwidth, *(intensity for group in groups.values() for intensity, _ in group)]
        x = np.geomspace(min(ends) / 3, max(ends) * 3, 200)
        label = f"measured: {si(bandwidth, 'B/s')} copied, {si(rate, 'FLOP/s')}"
        ax.plot(x, np.minimum(x * bandwidth, rate) / 1e9, color=GREY, label=label)
        for (bench, direction), group in groups.items():
            ax.plot(
                *zip(*group, strict=True), linestyle="none", markersize=6, **looks[bench],
                label=f"{bench}, {DIRECTIONS.get(direction, direction)}",
                markerfacecolor="white" if direction == "forward" else looks[bench]["color"],
            )  # fmt: skip
        ax.set(xscale="log", yscale="log", title=f"Roofline, {dtype}")
        ax.set(xlabel="FLOPs a byte that must be moved", ylabel="GFLOP/s")
        _legend(ax)
    return figure


def _line_plot(
    ax: Axes, lines: Mapping[str, Sequence[Row]], x: str, y: Callable[[Row], float | None]
) -> None:
    """A line a variant over the size ``x``, a logarithmic axis."""
    for number, (name, rows) in enumerate(lines.items()):
        points = sorted((row.shape[x], value) for row in rows if (value := y(row)) is not None)
        if points:
            width = 2.4 if name == OURS else 1.4
            ax.plot(*zip(*points, strict=True), label=name, linewidth=width, **_look(number))
    ax.set_xscale("log", base=2)
    ticks = sorted({row.shape[x] for rows in lines.values() for row in rows})
    ax.set_xticks(ticks, [str(tick) for tick in ticks], rotation=45 if len(ticks) > 6 else 0)
    ax.minorticks_off()


@styled
def throughput(results: Results) -> Figure | None:
    """Samples a second against the batch size; a panel for whatever was measured at two sizes or more."""
    families: dict[tuple[str, str], dict[str, list[Row]]] = {}
    for row in _measured(results.rows):
        if "batch" in row.shape and "samples_per_s" in row.extra:
            title = f"{row.bench}: {without_batch(row)}".rstrip(": ")
            family = families.setdefault((title, _what(row)), {})
            family.setdefault(row.variant, []).append(row)
    shown = {
        title: lines
        for title, lines in families.items()
        if len({row.shape["batch"] for rows in lines.values() for row in rows}) > 1
    }
    if not shown:
        return None
    figure, axes = subplots(3.4 * len(shown), len(shown), 1)
    for ax, ((title, what), lines) in zip(axes, shown.items(), strict=True):
        _line_plot(ax, lines, "batch", lambda row: row.extra["samples_per_s"])
        ax.set(title=f"{title} ({what})", xlabel="batch size (samples)", ylabel="samples/s")
        ax.set_ylim(bottom=0)
        _legend(ax)
    return figure


@styled
def contrast(results: Results) -> Figure | None:
    """Time and memory of the contrast against its number of rows."""
    families: dict[str, dict[str, list[Row]]] = {}
    for row in _measured(results.rows):
        if row.bench.startswith("contrast") and "rows" in row.shape:
            sizes = (f"{name} {size}" for name, size in row.shape.items() if name != "rows")
            # The first call of a process (contrast_memory) is no point on the line of warm ones.
            title = ", ".join((row.bench, *sizes)) + "\n" + _what(row)
            families.setdefault(title, {}).setdefault(row.variant, []).append(row)
    quantities: tuple[tuple[str, Callable[[Row], float | None]], ...] = (
        ("time (ms)", lambda row: row.median_us and row.median_us / 1e3),
        ("memory above the inputs (MB)", lambda row: row.peak_memory and row.peak_memory / 1e6),
    )
    panels = [
        (title, label, value, lines)
        for title, lines in families.items()
        for label, value in quantities
        if len({row.shape["rows"] for rows in lines.values() for row in rows if value(row)}) > 1
    ]
    if not panels:
        return None
    figure, axes = _panels(len(panels), 3.9)
    for ax, (title, label, value, lines) in zip(axes, panels, strict=False):
        _line_plot(ax, lines, "rows", value)
        ax.set(yscale="log", title=title, xlabel="rows N", ylabel=label)
        ax.legend(loc="upper left")
    return figure


@styled
def ablation(results: Results) -> Figure | None:
    """The pretraining step, change by change: one panel a case, a bar a row in the order measured."""
    groups: dict[str, list[Row]] = {}
    for row in _measured(results.rows):
        if row.bench == ABLATION and "samples_per_s" in row.extra:
            groups.setdefault(row.case, []).append(row)
    groups = {case: rows for case, rows in groups.items() if len(rows) > 1}
    if not groups:
        return None
    figure, axes = subplots(sum(0.9 + 0.38 * len(rows) for rows in groups.values()), len(groups), 1)
    for ax, (case, rows) in zip(axes, groups.items(), strict=True):
        rates = [row.extra["samples_per_s"] for row in rows]
        bars = ax.barh([row.variant for row in rows], rates, color=COLORS[0], height=0.65)
        labels = [f"{three(rate)}  ({three(rate / rates[0])} x)" for rate in rates]
        ax.bar_label(bars, labels, padding=4, color=GREY)
        ax.set(title=f"Pretraining step: {case}", xlabel="samples/s", xlim=(0, 1.2 * max(rates)))
        ax.invert_yaxis()
        ax.set_axisbelow(True)
        ax.grid(visible=False, axis="y")
    return figure


@styled
def history(runs: Sequence[Results]) -> Figure | None:
    """Headline figures over the runs of one device, oldest first; None if no benchmark ran twice."""
    ratios: dict[str, list[tuple[int, float]]] = {}
    rates: dict[str, list[tuple[int, float]]] = {}
    for number, results in enumerate(runs):
        for line in headlines(results):
            ratios.setdefault(line.bench, []).append((number, line.ratio))
            if line.samples_per_s:
                rates.setdefault(line.bench, []).append((number, line.samples_per_s))
    panels = [(ratios, "Ours against the strongest peer", "times as fast (geometric mean)")]
    if rates:
        panels.append((rates, "Throughput of ours, best case", "samples/s"))
    if all(len(points) < 2 for points in ratios.values()):
        return None
    figure, axes = subplots(3.6 * len(panels), len(panels), 1)
    looks = {bench: _look(number) for number, bench in enumerate(ratios)}
    for ax, (series, title, unit) in zip(axes, panels, strict=True):
        for bench, points in series.items():
            ax.plot(*zip(*points, strict=True), label=bench, **looks[bench])
        labels = [f"{run.provenance['commit']}\n{run.provenance['date'][:10]}" for run in runs]
        ax.set_xticks(range(len(runs)), labels, rotation=45, ha="right")
        ax.set(title=title, xlabel="commit, date of the run", ylabel=unit)
        values = [value for points in series.values() for _, value in points]
        if max(values) > 10 * min(values):
            ax.set_yscale("log")
            ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            ax.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
            ax.yaxis.set_minor_locator(NullLocator())
        else:
            ax.set_ylim(bottom=0)
    axes[0].axhline(1, color=GREY, linestyle="--", linewidth=1, label="as fast as the strongest peer")
    for ax in axes:
        _legend(ax)
    return figure


PLOTS = (
    Plot(
        "roofline",
        "Our operations (points) below what this machine was measured to reach (line): FLOPs and bytes are "
        "those that the operation has to do and to move.",
        roofline,
    ),
    Plot("throughput", "Samples a second against the batch size.", throughput),
    Plot("contrast", "Time and memory of the contrast against its number of rows.", contrast),
    Plot("ablation", "The pretraining step with one change after the other, cumulative.", ablation),
)
HISTORY_CAPTION = "All runs of this device that are kept."


def write_plots(runs: Sequence[Results], folder: Path, prefix: str = "") -> list[tuple[str, str]]:
    """Draw the latest of a device's runs, and their history.

    Args:
        runs: of one device, oldest first.
        folder: gets ``<prefix><name>.png``.
        prefix: of the file names.

    Returns:
        (file name, caption) of every picture written.
    """
    figures = [(plot.name, plot.caption, plot.draw(runs[-1])) for plot in PLOTS]
    figures.append(("history", HISTORY_CAPTION, history(runs)))
    written = []
    for name, caption, figure in figures:
        if figure is not None:
            save_png(figure, folder / f"{prefix}{name}.png")
            written.append((f"{prefix}{name}.png", caption))
    return written
