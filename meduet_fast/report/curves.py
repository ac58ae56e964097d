"""Draw what a run logged while it went: losses, speed, waiting, memory."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from meduet_fast.engine.metrics import losses_in
from meduet_fast.plotting import COLORS, GREY, styled, subplots

Records = Sequence[dict[str, float]]

SMOOTHED_SHARE = 0.1  # of the records


@dataclass(frozen=True)
class LossPanel:
    """Words and marks of the panel that shows the curve of one loss.

    Attributes:
        title: of its panel.
        unit: of its values.
        mark: short name for the line at the step where it sets in, in the panel of the total.
        chance: whether it is a classification of the domain, in which guessing gives ln(domains).
        note: for the caption below all panels.
    """

    title: str
    unit: str = "loss in nats"
    mark: str = ""
    chance: bool = False
    note: str = ""


# In the order of the panels. A loss of the run that is not here is shown under its own name behind these.
LOSS_PANELS = {
    "total": LossPanel("Total (weighted sum)", "loss"),
    "reconstruction": LossPanel(
        "Reconstruction of hidden tokens", "squared error", note="Latents have a variance of about 1."
    ),
    "whole": LossPanel("Whole crops from their own factors", "squared error"),
    "siqc": LossPanel("Contrast of factors (SiQC)", mark="SiQC"),
    "mftd": LossPanel(
        "Token distillation (MFTD)",
        "squared error",
        mark="MFTD",
        note="Where MFTD starts (dotted), the total takes on another term.",
    ),
    "domain_style": LossPanel("Domain from style (to be low)", chance=True),
    "domain_content": LossPanel(
        "Domain from content (to be high)",
        chance=True,
        note="All should fall but the content's domain loss: it should be at the dashed line, where content "
        "tells no more about the domain than guessing.",
    ),
}
HEADLINE_LOSS = "reconstruction"  # whose fall the summary tells


def loss_panels(records: Records) -> dict[str, LossPanel]:
    """Return how each loss of a run is shown, in the order of the panels."""
    names = losses_in(records[0])
    known = {name: panel for name, panel in LOSS_PANELS.items() if name in names}
    return known | {name: LossPanel(name, "loss") for name in names if name not in known}


def loss_axes(records: Records, row_height: float) -> tuple[Figure, dict[str, Axes]]:
    """Make a figure with a panel for each loss of a run, three in a row of ``row_height`` inches."""
    panels = loss_panels(records)
    rows = math.ceil(len(panels) / 3)
    figure, axes = subplots(row_height * rows, rows, 3)
    for ax, panel in zip(axes, panels.values(), strict=False):
        ax.set(title=panel.title, ylabel=panel.unit, xlim=(0, max(records[-1]["step"], 1)))
    for ax in axes[max(0, len(panels) - 3) : len(panels)]:
        ax.set_xlabel("step")
    for ax in axes[len(panels) :]:
        ax.set_visible(False)
    return figure, dict(zip(panels, axes, strict=False))


def smooth(values: np.ndarray) -> np.ndarray:
    """Average over a centred window of a tenth of the records; shorter at the ends."""
    half = max(1, round(SMOOTHED_SHARE * len(values) / 2))
    sums = np.concatenate([[0.0], np.cumsum(values)])
    index = np.arange(len(values))
    first, last = np.maximum(index - half, 0), np.minimum(index + half + 1, len(values))
    return (sums[last] - sums[first]) / (last - first)


@styled
def draw_losses(records: Records, starts: Mapping[str, float], num_domains: int) -> Figure:
    """Draw every loss over steps, a panel each; chance is marked where it means something.

    Args:
        records: of the run.
        starts: first step of losses that set in later; infinite for one that is off.
        num_domains: domains in the data.
    """
    panels = loss_panels(records)
    figure, axes = loss_axes(records, 2.8)
    steps = np.array([record["step"] for record in records])
    for (name, ax), color in zip(axes.items(), itertools.cycle(COLORS), strict=False):
        values = np.array([record[name] for record in records])
        shown = steps >= starts.get(name, 0)
        _line(ax, steps[shown], values[shown], color)
        if panels[name].chance:
            label = f"guessing: ln {num_domains}"
            ax.axhline(math.log(num_domains), color=GREY, linestyle="--", linewidth=1, label=label)
        for (term, start), line in zip(starts.items(), itertools.cycle(("-.", ":")), strict=False):
            if steps[0] < start <= steps[-1]:
                mark = ax.axvline(start, color=GREY, linestyle=line, linewidth=1.2)
                if name == "total":
                    mark.set_label(f"{panels[term].mark or term} starts")
        if ax.get_legend_handles_labels()[0]:
            ax.legend(loc="best", labelcolor=GREY)
        if not shown.any():
            ax.text(0.5, 0.5, "not on in this run", transform=ax.transAxes, ha="center", color=GREY)
    return figure


@styled
def draw_speed(records: Records) -> Figure:
    """Draw throughput, share of time spent waiting for data, and peak memory, over the time of the run."""
    figure, axes = subplots(2.8, 1, 3)
    times = np.array([record["time"] for record in records])
    minutes = (times - times[0]) / 60
    rates = np.array([record["samples_per_s"] for record in records])
    waits = np.array([record["data_wait_percent"] for record in records])
    memory = np.array([record["memory_mb"] for record in records])
    # A record stands for a number of crops, so their mean rate is the harmonic mean.
    mean_rate = len(rates) / np.sum(1 / np.maximum(rates, 1e-9))
    mean_wait = np.average(waits, weights=1 / np.maximum(rates, 1e-9))
    panels = (
        (rates, f"Throughput: {mean_rate:.3g} crops/s", "crops per second", None),
        (waits, f"Waiting for data: {mean_wait:.2g} %", "% of the time", 100.0),
        (memory, f"Memory: {memory.max():.0f} MB at most", "peak so far in MB", None),
    )
    for ax, (values, title, unit, top), color in zip(axes, panels, COLORS, strict=False):
        _line(ax, minutes, values, color, smoothed=False)
        ax.set_title(title)
        ax.set_ylabel(unit)
        ax.set_xlabel("minutes since the first record")
        ax.set_ylim(0, top or 1.1 * values.max())
    return figure


def _line(ax: Axes, x: np.ndarray, values: np.ndarray, color: str, smoothed: bool = True) -> None:
    """Plot values, faint behind their running mean where that is wanted."""
    if smoothed and len(values) > 4:
        ax.plot(x, values, color=color, alpha=0.3, linewidth=1)
        values = smooth(values)
    ax.plot(x, values, color=color, marker="o" if len(x) == 1 else None)
