"""What a run told while it went: losses, speed, waiting, memory."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .plotting import COLORS, GREY, styled, subplots

Records = Sequence[dict[str, float]]

LOSS_TITLES = {
    "total": "Total (weighted sum)",
    "reconstruction": "Reconstruction of hidden tokens",
    "siqc": "Contrast of factors (SiQC)",
    "mftd": "Token distillation (MFTD)",
    "domain_style": "Domain from style (to be low)",
    "domain_content": "Domain from content (to be high)",
}
UNITS = {"reconstruction": "squared error", "mftd": "squared error"}
NAMES = {"siqc": "SiQC", "mftd": "MFTD"}
SMOOTHED_SHARE = 0.1  # of the records


def smooth(values: np.ndarray) -> np.ndarray:
    """Centred running mean over a tenth of the records; shorter at the ends."""
    half = max(1, round(SMOOTHED_SHARE * len(values) / 2))
    sums = np.concatenate([[0.0], np.cumsum(values)])
    index = np.arange(len(values))
    first, last = np.maximum(index - half, 0), np.minimum(index + half + 1, len(values))
    return (sums[last] - sums[first]) / (last - first)


def first_and_last(records: Records, name: str) -> tuple[float, float]:
    """Mean of a value over the first and over the last tenth of the records."""
    values = [record[name] for record in records]
    count = max(1, round(SMOOTHED_SHARE * len(values)))
    return float(np.mean(values[:count])), float(np.mean(values[-count:]))


@styled
def draw_losses(records: Records, starts: Mapping[str, float], num_domains: int) -> Figure:
    """All loss terms over steps, six panels; chance is marked where it means something.

    Args:
        records: of the run.
        starts: first step of "siqc" and of "mftd"; infinite if it is off.
        num_domains: domains in the data.
    """
    figure, axes = subplots(5.6, 2, 3)
    steps = np.array([record["step"] for record in records])
    for ax, (name, title), color in zip(axes, LOSS_TITLES.items(), COLORS, strict=True):
        values = np.array([record[name] for record in records])
        shown = steps >= starts.get(name, 0)
        _line(ax, steps[shown], values[shown], color)
        ax.set_xlim(0, max(steps[-1], 1))
        ax.set_title(title)
        ax.set_ylabel(UNITS.get(name, "loss in nats" if name != "total" else "loss"))
        if name.startswith("domain"):
            label = f"guessing: ln {num_domains}"
            ax.axhline(math.log(num_domains), color=GREY, linestyle="--", linewidth=1, label=label)
        for (term, start), line in zip(starts.items(), ("-.", ":"), strict=True):
            if steps[0] < start <= steps[-1]:
                mark = ax.axvline(start, color=GREY, linestyle=line, linewidth=1.2)
                if name == "total":
                    mark.set_label(f"{NAMES[term]} starts")
        if ax.get_legend_handles_labels()[0]:
            ax.legend(loc="best", labelcolor=GREY)
        if not shown.any():
            ax.text(0.5, 0.5, "not on in this run", transform=ax.transAxes, ha="center", color=GREY)
    for ax in axes[3:]:
        ax.set_xlabel("step")
    return figure


@styled
def draw_speed(records: Records) -> Figure:
    """Throughput, share of time spent waiting for data, and peak memory, over the time of the run."""
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
    """Values, faint behind their running mean where that is wanted."""
    if smoothed and len(values) > 4:
        ax.plot(x, values, color=color, alpha=0.3, linewidth=1)
        values = smooth(values)
    ax.plot(x, values, color=color, marker="o" if len(x) == 1 else None)
