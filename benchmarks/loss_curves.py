"""The losses of several runs beside each other, a line a run.

``python -m benchmarks.loss_curves RUN RUN [RUN ...] --output FILE.png``

RUN is a folder that ``meduet-fast pretrain`` wrote; all must end at the same step. Prints the mean of every
loss over the last tenth of the steps, and its difference from the first run. Exit code 2: the input is
unusable.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from meduet_fast.engine.metrics import first_and_last, losses_in, read_metrics
from meduet_fast.errors import UserError
from meduet_fast.plotting import COLORS, save_png, styled
from meduet_fast.report.curves import Records, loss_axes, smooth

_LINES = ("-", "--", ":", "-.")  # runs that agree hide each other


def load(folders: Sequence[Path]) -> dict[str, Records]:
    """The records of runs, by the name of their folder.

    Raises:
        ValueError: if names are alike, a run has no records, or they end at different steps.
        UserError: if a run can't be read.
    """
    runs: dict[str, Records] = {}
    for folder in folders:
        name, records = folder.resolve().name, read_metrics(folder)
        if name in runs:
            raise ValueError(f"two runs are called {name}: rename a folder, or give each run once")
        if not records:
            raise ValueError(f"{folder}: no records; did the run log a step?")
        runs[name] = records
    ends = {name: int(records[-1]["step"]) for name, records in runs.items()}
    if len(set(ends.values())) > 1:
        listed = ", ".join(f"{name} at {step}" for name, step in ends.items())
        raise ValueError(f"runs end at different steps and can't be compared: {listed}")
    return runs


@styled
def draw(runs: Mapping[str, Records]) -> Figure:
    """Running means of all losses over steps, a panel a loss, without the steps in which a loss is off."""
    figure, axes = loss_axes(next(iter(runs.values())), 2.5)
    for name, ax in axes.items():
        for (run, records), color, line in zip(runs.items(), cycle(COLORS), cycle(_LINES), strict=False):
            on = [record for record in records if record[name]]
            steps, values = (np.array([record[key] for record in on]) for key in ("step", name))
            ax.plot(steps, smooth(values), color=color, linestyle=line, label=run)
    next(iter(axes.values())).legend()
    return figure


def table(runs: Mapping[str, Records]) -> Table:
    """Means over the last tenth of the steps, and what lies between them and the first run's."""
    shown = Table(
        "loss", *runs, title="Mean over the last tenth of the steps (difference from the first run)"
    )
    for name in losses_in(next(iter(runs.values()))[0]):
        means = [first_and_last(records, name)[1] for records in runs.values()]
        cells = [f"{means[0]:.4f}"]
        for mean in means[1:]:
            share = f", {100 * (mean / means[0] - 1):+.1f} %" if means[0] else ""
            cells.append(f"{mean:.4f} ({mean - means[0]:+.4f}{share})")
        shown.add_row(name, *cells)
    return shown


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.loss_curves", description=__doc__)
    parser.add_argument(
        "first", type=Path, metavar="RUN", help="folder of the run that others are compared with"
    )
    parser.add_argument("others", type=Path, metavar="RUN", nargs="+", help="folders of other runs")
    parser.add_argument("--output", type=Path, required=True, help="the picture to write, a PNG")
    options = parser.parse_args(arguments)
    try:
        runs = load([options.first, *options.others])
        save_png(draw(runs), options.output)
    except (ValueError, UserError) as error:
        parser.error(str(error))
    except OSError as error:
        parser.error(f"--output {options.output}: {error.strerror or error}")
    Console(width=None if sys.stdout.isatty() else 200).print(table(runs))
    return 0


if __name__ == "__main__":
    sys.exit(main())
