"""What became slower between two runs, beyond the noise that they measured.

``python -m benchmarks.compare A B [--any-device]``

A and B are files of results, or folders of which the latest is taken; A is the older one. Exit code 0:
nothing of ours is slower; 1: something is, or is no longer measured; 2: the input is unusable. Peers are
listed, since they tell of the machine and of other packages, but decide nothing.

A row is slower if its 10th to 90th percentiles of before and after do not overlap and the change is more
than 3 %: even a quiet machine differs by as much from one process to the next. Where ours was timed beside
peers in both runs, its ratio to the peer of least spread counts instead of the time: a slow machine slows
both.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from .results import Results, Row, latest
from .tables import OURS, Table, peers, plain, three

LEAST_CHANGE = 1.03
SLOWER, FASTER, SAME, LOST = "slower", "faster", "same", "no longer measured"
ONLY_A, ONLY_B = "only in A", "only in B"
ORDER = (SLOWER, LOST, FASTER, SAME, ONLY_A, ONLY_B)
Interval = tuple[float, float, float]


class Change(NamedTuple):
    """What became of one row.

    Attributes:
        key: of the row, see ``Row.key``.
        verdict: one of ``ORDER``.
        factor: time after over time before; None if one of them is missing.
        basis: what was compared, or why nothing could be.
    """

    key: tuple[str, str, str, str, str]
    verdict: str
    factor: float | None
    basis: str

    @property
    def regression(self) -> bool:
        """Whether it makes the comparison fail."""
        return self.verdict in (SLOWER, LOST) and self.key[2] == OURS


def _judge(before: Interval, after: Interval) -> str:
    """Low, middle and high of a quantity that is to be small, before and after."""
    if after[0] > before[2] and after[1] > before[1] * LEAST_CHANGE:
        return SLOWER
    if after[2] < before[0] and after[1] * LEAST_CHANGE < before[1]:
        return FASTER
    return SAME


def _against(row: Row, peer: str) -> Interval:
    """The row's time over the peer's."""
    low, high = row.ratio_spread[peer]
    return 1 / high, 1 / row.ratios[peer], 1 / low


def _spread(interval: Interval) -> float:
    return interval[2] / interval[0]


def compare_rows(before: Row, after: Row) -> Change:
    """Compare two rows of the same key, the first of which was measured."""
    assert before.median_us is not None
    if after.median_us is None:
        return Change(before.key, LOST, None, after.unavailable)
    shared = [name for name in peers(before) if name in after.ratio_spread and name in before.ratio_spread]
    if shared and before.variant == OURS:
        peer = min(shared, key=lambda name: _spread(_against(before, name)) * _spread(_against(after, name)))
        old, new, basis = _against(before, peer), _against(after, peer), f"ratio to {peer}"
    else:
        old = (before.low_us or before.median_us, before.median_us, before.high_us or before.median_us)
        new = (after.low_us or after.median_us, after.median_us, after.high_us or after.median_us)
        basis = "time"
    return Change(before.key, _judge(old, new), new[1] / old[1], basis)


def compare(before: Results, after: Results) -> list[Change]:
    """All rows of two runs, what matters most first.

    Raises:
        ValueError: if they have no measured row in common.
    """
    old, new = ({row.key: row for row in results.rows} for results in (before, after))
    if not any(row.median_us and new[key].median_us for key, row in old.items() if key in new):
        raise ValueError("the two runs have no measured row in common")
    changes = []
    for key, row in old.items():
        if row.median_us is None:
            continue
        changes.append(compare_rows(row, new[key]) if key in new else Change(key, ONLY_A, None, ""))
    changes += [
        Change(key, ONLY_B, None, "")
        for key, row in new.items()
        if row.median_us is not None and (key not in old or old[key].median_us is None)
    ]
    return sorted(changes, key=lambda change: (not change.regression, ORDER.index(change.verdict)))


def table(changes: Sequence[Change]) -> Table:
    """The changes as text."""
    header = ["verdict", "time, after / before", "from", "benchmark", "case", "variant", "direction", "dtype"]
    rows = [
        [change.verdict, three(change.factor) if change.factor else "", change.basis, *change.key]
        for change in changes
    ]
    return Table(header, rows)


def load(path: Path) -> Results:
    """A file of results, or the latest in a folder.

    Raises:
        ValueError: naming what is not there or unusable.
    """
    if not path.is_dir():
        return Results.load(path)
    newest = latest(path)
    if newest is None:
        raise ValueError(f"{path}: no results in this folder")
    return Results.load(newest)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compare", description=__doc__)
    parser.add_argument("before", type=Path, metavar="A", help="file or folder of results, the older run")
    parser.add_argument("after", type=Path, metavar="B", help="likewise, the newer run")
    parser.add_argument("--any-device", action="store_true", help="compare also runs of different devices")
    options = parser.parse_args(arguments)
    try:
        before, after = load(options.before), load(options.after)
        devices = before.provenance["device"], after.provenance["device"]
        if devices[0] != devices[1] and not options.any_device:
            raise ValueError(
                f"different devices, {devices[0]} and {devices[1]}; --any-device compares them all the same"
            )
        changes = compare(before, after)
    except ValueError as error:
        parser.error(str(error))

    for name in sorted(before.provenance.keys() | after.provenance.keys()):
        old, new = (results.provenance.get(name, "none") for results in (before, after))
        if old != new:
            print(f"{name}: {old} -> {new}")
    print(plain(table(changes)))
    counts = Counter(change.verdict for change in changes)
    print(", ".join(f"{counts[verdict]} {verdict}" for verdict in ORDER if counts[verdict]))
    regressions = sum(change.regression for change in changes)
    if regressions:
        print(f"{regressions} of our rows became slower or are no longer measured")
    return 1 if regressions else 0


if __name__ == "__main__":
    sys.exit(main())
