"""Give all figures one look."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from meduet_fast.files import atomic_path

# Okabe and Ito's palette: told apart by colour-blind readers too. Markers tell domains apart without colour.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = ("o", "^", "s", "D", "v", "P", "X")
GREY = "#666666"
WIDTH = 10.0  # inches
DPI = 110

# Typed loosely: the set of names differs between matplotlib's releases.
STYLE: Any = {
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.labelsize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GREY,
    "axes.grid": True,
    "grid.color": "#e3e3e3",
    "grid.linewidth": 0.8,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "lines.linewidth": 1.8,
}

# Decorates what draws: matplotlib reads some settings when a figure is made, some when it is drawn upon.
styled = matplotlib.rc_context(STYLE)


def new_figure(height: float) -> Figure:
    """Make an empty figure, ``height`` inches high; needs no screen and no state of pyplot."""
    return Figure(figsize=(WIDTH, height), dpi=DPI, layout="constrained")


def subplots(height: float, rows: int, columns: int) -> tuple[Figure, list[Axes]]:
    """Make a figure and its axes, row by row."""
    figure = new_figure(height)
    return figure, list(figure.subplots(rows, columns, squeeze=False).flat)


@styled
def save_png(figure: Figure, path: Path) -> None:
    """Write a figure, whole or not at all.

    Raises:
        OSError: if it cannot be written.
    """
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png")
