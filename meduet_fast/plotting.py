"""Give all figures one look, and all scans one way of being shown."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .files import atomic_path

if TYPE_CHECKING:
    from torch import Tensor

# Okabe and Ito's palette: told apart by colour-blind readers too. Markers tell domains apart without colour.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = ("o", "^", "s", "D", "v", "P", "X")
GREY = "#666666"
WIDTH = 10.0  # inches
DPI = 110
PLANES = ("axial", "coronal", "sagittal")
Planes = tuple[np.ndarray, np.ndarray, np.ndarray]  # middle slices in [0, 1], rows from top to bottom

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


def middle_slices(image: Tensor) -> Planes:
    """Cut the middle slices of an image (X, Y, Z).

    Superior (axial: anterior) is up, the patient's right (sagittal: anterior) is on the right.
    """
    x, y, z = (size // 2 for size in image.shape)
    axial, coronal, sagittal = (
        np.flipud(plane.numpy().T) for plane in (image[:, :, z], image[:, y], image[x])
    )
    return axial, coronal, sagittal


def ct_limits(labels: Mapping[str, str]) -> tuple[float | None, float | None]:
    """Return what is drawn black and white, in HU, of a volume with these labels; None for other than CT."""
    rule = json.loads(labels.get("intensity", "{}"))
    return (rule.get("low"), rule.get("high")) if rule.get("kind") == "ct_window" else (None, None)


def describe_grey(low: float | None, high: float | None) -> str:
    """Say what black and white are; see :func:`ct_limits`."""
    if low is None or high is None:
        return "black and white are the limits of the scan's intensity rule"
    return (
        f"black is {low:.0f} HU, white {high:.0f} HU (level {(low + high) / 2:.0f}, window {high - low:.0f})"
    )
