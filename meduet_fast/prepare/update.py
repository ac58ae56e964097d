"""Bring a store up to date with its input: only what is missing or stale is made."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from meduet_fast.data.folders import LeftOut, format_left_out
from meduet_fast.data.sources import VolumeEntry
from meduet_fast.data.store import LatentStore
from meduet_fast.data.store_index import StoreEntry
from meduet_fast.data.store_writer import StoreWriter, VolumeRecord
from meduet_fast.errors import UserError, VolumeError, printable
from meduet_fast.progress import track

_KINDS = {"ct_window": "CT", "mr_percentile": "MR or PET"}


@dataclass
class PrepareSummary:
    """Tell what became of every volume.

    Attributes:
        store: the store's folder.
        written, up_to_date, removed: names of volumes.
        upgraded: those up to date whose latent file was of an earlier format, and was written anew.
        failed: input file and reason of each volume that could not be used.
        left_out: what looks like a volume and was not tried.
        chosen: of the volumes written, how many got an intensity rule by their values, by (data set, kind).
    """

    store: Path
    written: list[str] = field(default_factory=list)
    up_to_date: list[str] = field(default_factory=list)
    removed: list[str] = field(default_factory=list)
    upgraded: list[str] = field(default_factory=list)
    failed: list[tuple[Path, str]] = field(default_factory=list)
    left_out: list[LeftOut] = field(default_factory=list)
    chosen: Counter[tuple[str, str]] = field(default_factory=Counter)

    @property
    def complete(self) -> bool:
        """Tell whether the store has all that the user asked for."""
        return not self.failed and not any(item.asked for item in self.left_out)


def format_summary(summary: PrepareSummary) -> str:
    """Format a summary for a person: one line of counts, then what a person must know of single volumes."""
    entries = LatentStore.open(summary.store).entries
    domains = len({entry.domain for entry in entries})
    counts = (
        f"{len(summary.written)} written, {len(summary.up_to_date)} up to date, "
        f"{len(summary.removed)} removed, {len(summary.failed)} failed"
        + (f", {len(summary.left_out)} left out" if summary.left_out else "")
    )
    lines = [f"{summary.store}: {len(entries)} volumes of {domains} domains ({counts})"]
    if summary.upgraded:
        lines.append(
            f"  {len(summary.upgraded)} latent files of an earlier format written anew in chunks; "
            "nothing was encoded anew"
        )
    lines += [f"  removed, no longer in the input: {name}" for name in summary.removed]
    lines += [
        f"  {_KINDS[kind]} by its values: {count} volume{'s' * (count > 1)} of {domain}"
        for (domain, kind), count in sorted(summary.chosen.items())
    ]
    lines += [f"  the same scan: {', '.join(names)}" for names in _same_scans(entries)]
    lines += [f"  failed: {printable(path)}: {printable(reason)}" for path, reason in summary.failed]
    lines += [f"  {line}" for line in format_left_out(summary.left_out)]
    if not entries:
        lines.append("  The store is empty: not one volume could be prepared.")
    return "\n".join(lines)


def _same_scans(entries: Sequence[StoreEntry], shown: int = 5) -> list[list[str]]:
    """Return the names of the first few scans that are in the store more than once."""
    names: dict[str, list[str]] = {}
    for entry in entries:
        names.setdefault(entry.content_key, []).append(entry.name)
    return [found for found in names.values() if len(found) > 1][:shown]


def locate(path: Path) -> str:
    """Return what a store says of where a volume came from: the same whatever way the path is written."""
    return printable(Path(os.path.realpath(path.parent), path.name))


def update_store(
    writer: StoreWriter,
    volumes: Sequence[VolumeEntry],
    content_key: Callable[[VolumeEntry], str],
    make: Callable[[VolumeEntry, str], VolumeRecord],
) -> PrepareSummary:
    """Make the store hold exactly ``volumes``.

    Volumes that are not in the input any more are removed. A listed volume is up to date if its labels, its
    content key and its file are what they should be; otherwise it is removed before anything new is made, so
    that a run that is stopped half-way leaves no stale volume behind. A bad volume is recorded and the rest
    goes on; one whose input cannot even be read keeps what the store has of it.

    Args:
        writer: entered writer of the store.
        volumes: the whole input.
        content_key: computes the SHA-256 of all that a volume's latents depend on; may raise VolumeError.
        make: makes what is stored of a volume with this content key; may raise VolumeError.

    Raises:
        UserError: the store cannot be written.
    """
    summary = PrepareSummary(writer.path)
    names = {volume.name for volume in volumes}
    summary.removed = [name for name in writer.entries if name not in names]
    writer.drop(summary.removed)

    listed = [volume for volume in volumes if volume.name in writer.entries]
    stale = []
    for volume in track(listed, "Checking the store", unit="volume"):
        entry = writer.entries[volume.name]
        same_labels = (entry.domain, entry.body_part) == (volume.domain, volume.body_part)
        try:
            if not same_labels or entry.content_key != content_key(volume):
                stale.append(volume.name)
                continue
            if writer.upgrade(volume.name):
                summary.upgraded.append(volume.name)
        except VolumeError as error:
            summary.failed.append((error.path, error.reason))
        except UserError:
            stale.append(volume.name)  # its file is missing or damaged: made anew
        else:
            writer.entries[volume.name] = replace(entry, source=locate(volume.path))  # it may have been moved
            summary.up_to_date.append(volume.name)
    writer.drop(stale)

    missing = [volume for volume in volumes if volume.name not in writer.entries]
    for volume in track(missing, "Preparing volumes", unit="volume"):
        try:
            record = make(volume, content_key(volume))
            if not torch.isfinite(record.latent).all():
                raise VolumeError(volume.path, "its latents are not finite (NaN or Inf)")
        except VolumeError as error:
            summary.failed.append((error.path, error.reason))
        else:
            writer.add(record)
            summary.written.append(volume.name)
            if volume.intensity is None:
                summary.chosen[volume.domain, record.intensity["kind"]] += 1
    return summary
