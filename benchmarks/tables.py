"""Figures as text: units, and one table a benchmark, the ratio first."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import NamedTuple

from .results import Results, Row

OURS = "ours"
HEADLINE_HEADER = ["benchmark", "ours is x times as fast", "worst case", "best case", "cases", "samples/s"]
DIRECTIONS = {"forward_backward": "forward + backward"}


class Table(NamedTuple):
    """Cells as text; every row is as long as the header."""

    header: list[str]
    rows: list[list[str]]


class Headline(NamedTuple):
    """A benchmark in one line.

    Attributes:
        bench: its name.
        ratio: how many times as fast as the strongest peer ours is: geometric mean over the cases.
        worst: the smallest of them.
        best: the largest of them.
        cases: how many there are.
        samples_per_s: of ours in its best case; None if no case counts samples.
    """

    bench: str
    ratio: float
    worst: float
    best: float
    cases: int
    samples_per_s: float | None


def three(value: float) -> str:
    """A number to three digits, never with an exponent."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    digits = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:.{digits}f}"


def si(value: float, unit: str) -> str:
    """A quantity with a decimal prefix: 1.5e9, "B" -> "1.50 GB"."""
    for prefix, factor in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= factor:
            return f"{three(value / factor)} {prefix}{unit}"
    return f"{three(value)} {unit}"


def duration(microseconds: float) -> str:
    """A time in the unit that suits it."""
    for unit, factor in (("s", 1e6), ("ms", 1e3)):
        if microseconds >= factor:
            return f"{three(microseconds / factor)} {unit}"
    return f"{three(microseconds)} µs"


def named(name: str, value: float) -> str:
    """An entry of ``Row.extra``: ``samples_per_s`` -> "samples/s 12.3"."""
    return f"{name.replace('_per_', '/').replace('_', ' ')} {three(value)}"


def cases(rows: Sequence[Row]) -> list[list[Row]]:
    """Rows that computed the same thing, in the order in which they were measured, ours first."""
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.bench, row.case, row.direction, row.dtype), []).append(row)
    return [sorted(group, key=lambda row: row.variant != OURS) for group in groups.values()]


def without_batch(row: Row) -> str:
    """A case's name less its batch size: what stays the same along an axis of batch sizes."""
    cut = re.sub(rf"(\b(B|batch)[ =]*)?(?<!\d){row.shape['batch']}(?!\d)", "", row.case, count=1, flags=re.I)
    return re.sub(r"\s+", " ", cut).strip(" ,;")


def peers(row: Row) -> list[str]:
    """Variants by others that a row was timed beside."""
    return [name for name in row.ratios if not name.startswith(OURS)]


def headlines(results: Results) -> list[Headline]:
    """One line for every benchmark in which ours was timed beside a peer."""
    found: dict[str, list[tuple[float, float]]] = {}
    for row in results.rows:
        ratios = [row.ratios[name] for name in peers(row)]
        if row.variant == OURS and ratios:
            found.setdefault(row.bench, []).append((min(ratios), row.extra.get("samples_per_s", 0.0)))
    lines = []
    for bench, figures in found.items():
        ratios, rate = [ratio for ratio, _ in figures], max(rate for _, rate in figures)
        mean = math.prod(ratios) ** (1 / len(ratios))
        lines.append(Headline(bench, mean, min(ratios), max(ratios), len(ratios), rate or None))
    return lines


def _cells(results: Results, row: Row, ours: Row | None) -> dict[str, str]:
    cells = {"variant": row.variant}
    if row.unavailable:
        return {**cells, "median": f"not measured: {row.unavailable}"}
    if ours and row.variant in ours.ratios:
        cells["ours is x times as fast"] = three(ours.ratios[row.variant])
        if row.variant in ours.ratio_spread:
            low, high = ours.ratio_spread[row.variant]
            cells["ours is x times as fast"] += f" ({three(low)} to {three(high)})"
    share = results.share_of_peak(row)
    quantities = {
        "median": row.median_us and duration(row.median_us),
        "10 to 90 %": row.low_us and row.high_us and f"{duration(row.low_us)} to {duration(row.high_us)}",
        "cold": row.cold_us and duration(row.cold_us),
        "host": row.host_us and duration(row.host_us),
        "bytes": row.bytes and si(row.bytes, "B"),
        "FLOPs": row.flops and si(row.flops, "F"),
        "of measured peak": share and f"{three(100 * share)} %",
        "memory": None if row.peak_memory is None else si(row.peak_memory, "B"),
        "further": ", ".join(named(*item) for item in row.extra.items()),
    }
    return cells | {name: text for name, text in quantities.items() if text}


def bench_table(results: Results, bench: str) -> Table:
    """All rows of a benchmark; columns that nobody fills are left out, a case is named in its first row."""
    lines = []
    for group in cases([row for row in results.rows if row.bench == bench]):
        ours = next((row for row in group if row.variant == OURS), None)
        first = group[0]
        title = {
            "case": first.case,
            "direction": DIRECTIONS.get(first.direction, first.direction),
            "dtype": first.dtype,
        }
        for row in group:
            lines.append(title | _cells(results, row, ours))
            title = {}
    order = (
        "case", "direction", "dtype", "ours is x times as fast", "variant", "median", "10 to 90 %", "cold",
        "host", "bytes", "FLOPs", "of measured peak", "memory", "further",
    )  # fmt: skip
    header = [name for name in order if any(line.get(name) for line in lines)]
    return Table(header, [[line.get(name, "") for name in header] for line in lines])


def benches(results: Results) -> list[str]:
    """Names of the benchmarks, in the order in which they ran."""
    return list(dict.fromkeys(row.bench for row in results.rows))


def headline_table(results: Results) -> Table:
    """How fast ours is beside the strongest peer of each case."""
    rows = [
        [
            line.bench,
            three(line.ratio),
            three(line.worst),
            three(line.best),
            str(line.cases),
            three(line.samples_per_s) if line.samples_per_s else "",
        ]
        for line in headlines(results)
    ]
    return Table(HEADLINE_HEADER, rows)


def markdown(table: Table) -> str:
    """As Markdown."""
    lines = [table.header, ["---"] * len(table.header), *table.rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def plain(table: Table) -> str:
    """As columns of plain text."""
    lines = [table.header, *table.rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(table.header))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )
