"""Describe the data sets of a store so that a scan which is unlike the others meets the eye."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from meduet_fast.data.intensity import IntensityRule
from meduet_fast.data.scans import ScanFacts

SHOWN = 20  # lines of a kind
ENOUGH = 5  # volumes, below which nothing can be told from their spread
# A scan is unlike the others if it is further from their median than both of these.
DEVIATIONS = 6.0  # of the others, by the median of their distances
FACTOR = 1.5  # of spacing and size
SHIFT = 0.5  # of values, over the width of their range
NORMAL = 1.4826  # standard deviation over median distance of a normal distribution


@dataclass(frozen=True)
class VolumeFacts:
    """Hold what a store knows of the scan behind a volume.

    Attributes:
        name, domain: of the volume.
        rule: its intensity rule, as text; it says so if the values told it.
        scan: None for volumes that were stored before facts were, or imported.
    """

    name: str
    domain: str
    rule: str
    scan: ScanFacts | None

    @classmethod
    def of(cls, name: str, domain: str, metadata: Mapping[str, str]) -> VolumeFacts:
        """Take the facts from the metadata of a latent file."""
        rule = IntensityRule(**json.loads(metadata["intensity"]))
        looked = f"{'CT' if rule.kind == 'ct_window' else 'MR or PET'} by its values, "
        text = f"{looked if metadata.get('intensity_from') == 'values' else ''}{rule}"
        return cls(name, domain, text, ScanFacts.from_json(metadata["scan"]) if "scan" in metadata else None)


def describe(volumes: Sequence[VolumeFacts]) -> list[str]:
    """Describe volumes, data set by data set, then scans that are stored twice."""
    domains: dict[str, list[VolumeFacts]] = defaultdict(list)
    for volume in volumes:
        domains[volume.domain].append(volume)
    lines = [line for name in sorted(domains) for line in _describe_domain(name, domains[name])]
    twins: dict[str, list[VolumeFacts]] = defaultdict(list)
    for volume in volumes:
        if volume.scan is not None:
            twins[volume.scan.fingerprint].append(volume)
    across: list[str] = []
    within: list[str] = []
    for group in twins.values():
        if len(group) > 1:
            names = ", ".join(f"{volume.name} ({volume.domain})" for volume in group)
            two = len({volume.domain for volume in group}) > 1
            (across if two else within).append(names)
    lines += _bounded([f"THE SAME SCAN IN SEVERAL DATA SETS: {names}" for names in across])
    lines += _bounded([f"the same scan several times in one data set: {names}" for names in within])
    return lines


def _describe_domain(name: str, volumes: Sequence[VolumeFacts]) -> list[str]:
    rules = sorted(Counter(volume.rule for volume in volumes).items())
    several = [f"{rule}: {count} volumes" for rule, count in rules] if len(rules) > 1 else [rules[0][0]]
    lines = [f"{name}: {len(volumes)} volumes, {'; '.join(_bounded(several))}"]
    known = [(volume, volume.scan) for volume in volumes if volume.scan is not None]
    if len(known) < len(volumes):
        count = len(volumes) - len(known)
        lines.append(f"  scans    not recorded of {count} (imported, or stored by an older version)")
    if not known:
        return lines
    scans = [scan for _, scan in known]
    spacing = np.array([scan.spacing for scan in scans])  # (N, 3) mm
    size = np.array([scan.size for scan in scans])  # (N, 3) voxels
    extent = np.array([scan.extent for scan in scans])  # (N, 3) mm
    values = np.array([scan.values for scan in scans])  # (N, 4)
    lines += [
        f"  spacing  {_spread(spacing)} mm",
        f"  size     {_spread(size)} voxels, {_spread(extent)} mm",
        f"  values   least {_range(values[:, 0])}, 1 % {_range(values[:, 1])}, "
        f"99 % {_range(values[:, 2])}, greatest {_range(values[:, 3])}",
    ]
    odd: dict[int, list[str]] = defaultdict(list)  # by position in known
    for row in _unlike(np.log(spacing), np.log(FACTOR)):
        odd[row].append(f"spacing {_join(spacing[row])} mm")
    for row in _unlike(np.log(extent), np.log(FACTOR)):
        odd[row].append(f"size {_join(extent[row])} mm")
    middle = values[:, 1:3]  # (N, 2)
    for row in _unlike(middle, SHIFT * float(np.median(np.ptp(middle, axis=1)))):
        odd[row].append(f"values {middle[row, 0]:.4g} (1 %) to {middle[row, 1]:.4g} (99 %)")
    lines += _bounded(
        [f"  UNLIKE THE OTHERS: {known[row][0].name}: {', '.join(odd[row])}" for row in sorted(odd)]
    )
    lines += _bounded([f"  note: {volume.name}: {note}" for volume, scan in known for note in scan.notes])
    return lines


def _unlike(values: np.ndarray, least: float) -> list[int]:
    """Return the rows of ``values`` (N, K) that are far from the median in a column, more than ``least``."""
    if len(values) < ENOUGH:
        return []
    distances = np.abs(values - np.median(values, axis=0))  # (N, K)
    limits = np.maximum(DEVIATIONS * NORMAL * np.median(distances, axis=0), least)  # (K,)
    return np.flatnonzero((distances > limits).any(axis=1)).tolist()


def _spread(values: np.ndarray) -> str:
    """Format (N, 3): the median of each axis, and what it spans."""
    if np.ptp(values, axis=0).max() < 1e-3:
        return _join(values[0])
    spans = ", ".join(_range(column) for column in values.T)
    return f"{_join(np.median(values, axis=0))} in the middle ({spans})"


def _range(values: np.ndarray) -> str:
    low, high = f"{values.min():.4g}", f"{values.max():.4g}"
    return low if low == high else f"{low} to {high}"


def _join(values: np.ndarray) -> str:
    return " x ".join(f"{value:.4g}" for value in values)


def _bounded(lines: list[str]) -> list[str]:
    hidden = len(lines) - SHOWN
    return lines if hidden <= 0 else [*lines[:SHOWN], f"  and {hidden} more"]
