"""Write an evaluation: a page with grids, tables and verdicts, its pictures, and all numbers."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure as Picture
from torch import Tensor

import meduet_fast
from meduet_fast.errors import UserError
from meduet_fast.files import atomic_path
from meduet_fast.page import details, figure, page, paragraph, table
from meduet_fast.plotting import WIDTH, ct_limits, describe_grey, middle_slices, new_figure, save_png, styled

from .conditions import Windows
from .judge import MEASURES, Evaluation, Grid, Judge, Scales, describe
from .verdicts import RULE, interval, judged, number, scales_text, verdict, verdicts

PAGE, NUMBERS = "index.html", "evaluation.json"
BARS_MM = (5, 10, 20, 50)
Origin = Mapping[str, str]  # where a generator is from, for the page


def write_report(
    output: Path, judge: Judge, evaluations: Sequence[Evaluation], origins: Mapping[str, Origin]
) -> Path:
    """Write ``index.html``, which needs no other file, a PNG of every grid, and ``evaluation.json``.

    Args:
        output: folder, made if absent; files of these names in it are replaced.
        judge: what measured.
        evaluations: of one generator or several, which are compared.
        origins: facts about each generator, by name.

    Returns:
        The page.

    Raises:
        UserError: the folder cannot be written.
    """
    windows, config = judge.bench.windows, judge.config
    numbers = {
        "versions": versions(),
        "settings": asdict(config),
        "rule": RULE,
        "doubts": judge.doubts(),
        "volumes": [windows.store.entries[volume].name for volume in windows.places],
        "domains": [windows.store.domains[domain] for domain in windows.domains],
        "conditions": len(judge.bench.conditions),
        "decoded": len(judge.bench.shown),
        "distance_elsewhere": judge.bench.elsewhere(),
        "generators": [
            {"origin": dict(origins[item.name]), **item.to_dict(), "verdicts": verdicts(item)}
            for item in evaluations
        ],
    }
    try:
        pictures = {item.name: output / f"{item.name}-grid.png" for item in evaluations if item.grid}
        for item in evaluations:
            if item.grid:
                save_png(draw_grid(item.grid, windows), pictures[item.name])
        html = _page(judge, evaluations, pictures, numbers)
        for name, text in ((NUMBERS, json.dumps(numbers, indent=1)), (PAGE, html)):
            with atomic_path(output / name) as temporary:
                temporary.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"{output}: the evaluation cannot be written: {error.strerror or error}") from error
    return output / PAGE


def versions() -> dict[str, str]:
    """Return what the figures were made with."""
    return {
        "meduet-fast": meduet_fast.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def _page(
    judge: Judge, evaluations: Sequence[Evaluation], pictures: Mapping[str, Path], numbers: dict[str, Any]
) -> str:
    windows = judge.bench.windows
    sections = {
        "Verdicts": "".join(paragraph(f"Warning: {doubt}.") for doubt in numbers["doubts"])
        + verdict_table(evaluations)
        + paragraph(RULE)
        + details("in full", {}, "\n\n".join(f"{line}." for item in evaluations for line in verdicts(item)))
    }
    for item in evaluations:
        body = figures_table(item)
        if item.grid:
            size = f"{len(item.grid.contents)} contents by {len(item.grid.styles)} styles"
            body = (
                figure(pictures[item.name], _caption(item.grid, windows), f"{size}, made by {item.name}")
                + body
            )
        sections[item.name] = body
    if len(evaluations) > 1:
        sections["Comparison"] = "".join(
            _comparison(evaluations, scales) for scales in evaluations[0].figures
        )
    sections["How it was measured"] = _method(judge)
    facts = {
        f"{item['name']}, {key}": text
        for item in numbers["generators"]
        for key, text in item["origin"].items()
    }
    sections["Settings"] = details(
        "all settings", {**facts, **versions()}, json.dumps(numbers["settings"], indent=1)
    )
    names = ", ".join(item.name for item in evaluations)
    return page(
        f"Synthesis: {names}", f"content of one scan, style of another; {windows.store.path}", sections
    )


def _method(judge: Judge) -> str:
    """Say how everything was measured."""
    bench, windows = judge.bench, judge.bench.windows
    fitted = sum(len(rows) for rows in windows.fitted.values())
    return "".join(
        paragraph(text)
        for text in (
            f"Every pair of scales has {len(bench.conditions)} crops of {windows.table.window} latent "
            f"voxels: content of held-out places of {len(windows.places)} volumes, each in the style of one "
            f"of {len(windows.domains)} domains, every domain as often as any other.",
            "Factors are those of crops encoded alone, by the pretrained encoder. It conditions the "
            "generator, so figures on its features flatter it: those of other networks stand beside them. "
            f"Style is judged by a logistic regression fitted on {fitted} training crops.",
            f"FID, KID and MMD compare crops whose place a real scan shows in that style "
            f"({len(bench.shown)}) with as many training crops of the same domains; the ceiling is what "
            "these real scans get, for they are of other places, too.",
            "Brackets are 95 % intervals over volumes, by a bootstrap; of FID, KID and MMD by random halves "
            "of the volumes, for crops drawn twice would be too alike. With few volumes they are rough. "
            "Crops of one volume overlap, so they tell less than as many independent ones.",
            *(f"Features of {net.name}: {net.note}." for net in bench.networks),
        )
    )


def verdict_table(evaluations: Sequence[Evaluation]) -> str:
    """Return what works as a table, a row for each generator and pair of scales; not of distances of sets."""
    rows = []
    for item in evaluations:
        for scales, figures in item.figures.items():
            words = judged(figures, scales)
            cells = [
                f"{interval(figures[name])}: {words[name]}" if name in words else "" for name in MEASURES
            ]
            rows.append([f"{item.name} at {scales_text(scales)}", *cells])
    header = ["", *(measure.short for measure in MEASURES.values())]
    return table("What works, by the rule below; in brackets a 95 % interval", header, rows)


def figures_table(evaluation: Evaluation) -> str:
    """Return all figures of a generator as a table, a column for each pair of scales."""
    columns = list(evaluation.figures)
    names = list(dict.fromkeys(name for figures in evaluation.figures.values() for name in figures))
    rows = []
    for name in names:
        cells = [evaluation.figures[scales].get(name) for scales in columns]
        known = next(cell for cell in cells if cell is not None)
        share = describe(name).share
        rows.append(
            [
                describe(name).title,
                *(interval(cell) if cell else "" for cell in cells),
                *(number(value, share) for value in (known.floor, known.ceiling, known.exchange)),
            ]
        )
    return table(
        f"{evaluation.name}: figures with their intervals, floor (what knows or does nothing), ceiling (real "
        "scans), and the pretrained decoder's exchange of style",
        ["", *map(scales_text, columns), "floor", "ceiling", "exchange"],
        rows,
    )


def _comparison(evaluations: Sequence[Evaluation], scales: Scales) -> str:
    """Return the figures of several generators at one pair of scales, side by side."""
    rows = []
    for name, first in evaluations[0].figures[scales].items():
        share = describe(name).share
        found = [item.figures[scales][name] for item in evaluations]
        rows.append(
            [
                describe(name).title,
                *(f"{interval(cell)} {_brief(verdict(cell, scales))}" for cell in found),
                *(number(value, share) for value in (first.floor, first.ceiling, first.exchange)),
            ]
        )
    header = ["", *(item.name for item in evaluations), "floor", "ceiling", "exchange"]
    return table(scales_text(scales), header, rows)


def _brief(word: str | None) -> str:
    return f"({word})" if word else ""


def _caption(grid: Grid, windows: Windows) -> str:
    """Say what a grid shows, at which scale and grey levels."""
    names = [windows.store.entries[windows.volume(row)] for row in grid.styles]
    greys = "; ".join(
        f"{entry.domain}: {describe_grey(*ct_limits(windows.store.metadata(windows.volume(row))))}"
        for entry, row in zip(names, grid.styles, strict=True)
    )
    return (
        f"Made at {scales_text(grid.scales)}: a row for each content, whose real crop is on the left, a "
        "column for each style, of which a real crop is at the top, of another place. Middle axial slices, "
        "anterior up, the patient's right on the right; the bar is "
        f"{_bar_mm(grid.real_contents[0], _mm(windows))} mm. Grey levels by column: {greys}."
    )


def _mm(windows: Windows) -> float:
    return windows.store.entries[next(iter(windows.places))].spacing[0]


def _bar_mm(image: Tensor, mm: float) -> int:
    """Return the longest round length that takes at most half of an image's width."""
    return max(bar for bar in BARS_MM if bar <= max(BARS_MM[0], image.shape[0] * mm / 2))


@styled
def draw_grid(grid: Grid, windows: Windows) -> Picture:
    """Draw a grid: real styles at the top, real contents on the left, what was made between them."""
    rows, columns, mm = len(grid.contents) + 1, len(grid.styles) + 1, _mm(windows)
    blank: list[Tensor | None] = [None]
    cells = [[*blank, *grid.real_styles]] + [
        [real, *made] for real, made in zip(grid.real_contents, grid.made, strict=True)
    ]
    width, height = grid.real_contents[0].shape[:2]
    inches = WIDTH / columns
    picture = new_figure(rows * inches * height / width + 0.6)
    axes = picture.subplots(rows, columns, squeeze=False)
    domains = [windows.store.entries[windows.volume(row)].domain for row in grid.styles]
    volumes = [windows.store.entries[windows.volume(row)].name for row in grid.contents]
    for i, (line, images) in enumerate(zip(axes, cells, strict=True)):
        for j, (ax, image) in enumerate(zip(line, images, strict=True)):
            ax.set_xticks([])
            ax.set_yticks([])
            ax.grid(False)
            for spine in ax.spines.values():
                spine.set_visible(False)
            if i == 0 and j > 0:
                ax.set_title(f"style: {domains[j - 1]}", fontsize=9, loc="center")
            if j == 0 and i > 0:
                ax.set_ylabel(f"content: {volumes[i - 1]}", fontsize=8)
            if image is None:
                ax.text(0.5, 0.5, "real crops:\ntop and left", ha="center", va="center", fontsize=8)
                continue
            ax.imshow(middle_slices(image)[0], cmap="gray", vmin=0, vmax=1)
            if j == 0 and i == 1:
                length = _bar_mm(image, mm) / mm
                ax.plot([1, 1 + length], [height - 3] * 2, color="#ffd400", linewidth=2.5)
                ax.set_xlim(-0.5, np.shape(image)[0] - 0.5)
                ax.set_ylim(height - 0.5, -0.5)
    return picture
