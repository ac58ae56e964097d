"""Bring a store up to date with its input: only what is missing or stale is made."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

import torch

from meduet_fast.data.folders import LeftOut, format_left_out
from meduet_fast.data.latent_file import DamagedLatents
from meduet_fast.data.sources import VolumeEntry
from meduet_fast.data.store import LatentStore
from meduet_fast.data.store_writer import StoreWriter, VolumeRecord
from meduet_fast.errors import VolumeError, printable
from meduet_fast.files import in_real_folder
from meduet_fast.progress import ProgressBar

from .describe import VolumeFacts, describe

T = TypeVar("T")
# What became of each volume, as soon as it is known and in any order.
Outcomes = Iterator[tuple[VolumeEntry, T | VolumeError]]


@dataclass
class PrepareSummary:
    """Tell what became of every volume.

    Attributes:
        store: the store's folder.
        written, up_to_date, removed: names of volumes.
        upgraded: those up to date whose latent file was of an earlier format, and was written anew.
        failed: input file and reason of each volume that could not be used.
        left_out: what looks like a volume and was not tried.
        facts: what the store knows of the scans of its volumes.
    """

    store: Path
    written: list[str] = field(default_factory=list)
    up_to_date: list[str] = field(default_factory=list)
    removed: list[str] = field(default_factory=list)
    upgraded: list[str] = field(default_factory=list)
    failed: list[tuple[Path, str]] = field(default_factory=list)
    left_out: list[LeftOut] = field(default_factory=list)
    facts: list[VolumeFacts] = field(default_factory=list)

    @property
    def complete(self) -> bool:
        """Tell whether the store has all that the user asked for."""
        return not self.failed and not any(item.asked for item in self.left_out)


def format_summary(summary: PrepareSummary) -> str:
    """Format a summary for a person: counts, what failed or was left out, what the data sets look like."""
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
    lines += [f"  failed: {printable(path)}: {printable(reason)}" for path, reason in summary.failed]
    lines += [f"  {line}" for line in format_left_out(summary.left_out)]
    lines += [f"  {line}" for line in describe(summary.facts)]
    if not entries:
        lines.append("  The store is empty: not one volume could be prepared.")
    return "\n".join(lines)


def locate(path: Path) -> str:
    """Return what a store says of where a volume came from: the same whatever way the path is written."""
    return printable(in_real_folder(path))


def one_by_one(make: Callable[[VolumeEntry], T]) -> Callable[[Sequence[VolumeEntry]], Outcomes[T]]:
    """Return a function that makes something of each volume in turn; a VolumeError is an outcome."""

    def outcomes(volumes: Sequence[VolumeEntry]) -> Outcomes[T]:
        for volume in volumes:
            try:
                outcome: T | VolumeError = make(volume)
            except VolumeError as error:
                outcome = error
            yield volume, outcome

    return outcomes


def update_store(
    writer: StoreWriter,
    volumes: Sequence[VolumeEntry],
    content_keys: Callable[[Sequence[VolumeEntry]], Outcomes[str]],
    records: Callable[[Sequence[VolumeEntry]], Outcomes[VolumeRecord]],
) -> PrepareSummary:
    """Make the store hold exactly ``volumes``.

    Volumes that are not in the input any more are removed. A listed volume is up to date if its labels, its
    content key and its file are what they should be; otherwise it is removed before anything new is made, so
    that a run that is stopped half-way leaves no stale volume behind. A bad volume is recorded and the rest
    goes on; one whose input cannot even be read keeps what the store has of it.

    Args:
        writer: entered writer of the store.
        volumes: the whole input.
        content_keys: computes the SHA-256 of all that the latents of each of these volumes depend on.
        records: makes what is stored of each of these volumes.

    Raises:
        UserError: a file of the store cannot be read or written.
    """
    summary = PrepareSummary(writer.path)
    names = {volume.name for volume in volumes}
    summary.removed = [name for name in writer.entries if name not in names]
    writer.drop(summary.removed)
    failed: dict[str, VolumeError] = {}
    metadata: dict[str, Mapping[str, str]] = {}
    upgraded: dict[str, bool] = {}

    listed = [volume for volume in volumes if volume.name in writer.entries]
    labels = {name: (entry.domain, entry.body_part) for name, entry in writer.entries.items()}
    same = [volume for volume in listed if labels[volume.name] == (volume.domain, volume.body_part)]
    stale = [volume.name for volume in listed if labels[volume.name] != (volume.domain, volume.body_part)]
    for volume, key in _track(content_keys(same), len(same), "Checking the store"):
        entry = writer.entries[volume.name]
        try:
            if isinstance(key, VolumeError):
                raise key
            if entry.content_key != key:
                stale.append(volume.name)
                continue
            metadata[volume.name], upgraded[volume.name] = writer.upgrade(volume.name)
        except VolumeError as error:
            failed[volume.name] = error
        except DamagedLatents:
            stale.append(volume.name)
        else:
            writer.entries[volume.name] = replace(entry, source=locate(volume.path))  # it may have been moved
    writer.drop(stale)
    up_to_date = set(metadata)

    missing = [volume for volume in volumes if volume.name not in writer.entries]
    for volume, record in _track(records(missing), len(missing), "Preparing volumes"):
        if isinstance(record, VolumeError):
            failed[volume.name] = record
        elif not torch.isfinite(record.latent).all():
            failed[volume.name] = VolumeError(volume.path, "its latents are not finite (NaN or Inf)")
        else:
            writer.add(record)
            metadata[volume.name] = {**record.notes, "intensity": json.dumps(dict(record.intensity))}
    for volume in volumes:  # in their order, whichever was ready first
        if volume.name in failed:
            failure = failed[volume.name]
            summary.failed.append((failure.path, volume.tell(failure.reason)))
        elif volume.name in up_to_date:
            summary.up_to_date.append(volume.name)
            summary.upgraded += [volume.name] * upgraded[volume.name]
        else:
            summary.written.append(volume.name)
        if volume.name in metadata:
            summary.facts.append(VolumeFacts.of(volume.name, volume.domain, metadata[volume.name]))
    return summary


def _track(outcomes: Outcomes[T], total: int, title: str) -> Outcomes[T]:
    """Hand outcomes on with a progress display, and close them if they are not wanted to their end."""
    with closing(outcomes):  # type: ignore[type-var]
        if total:
            with ProgressBar(title, total, "volume") as bar:
                for outcome in outcomes:
                    yield outcome
                    bar.update()
