"""Bringing a store up to date with its input: only what is missing or stale is made."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from meduet_fast.data.preview import write_preview
from meduet_fast.data.store import LatentStore, check_file
from meduet_fast.data.store_writer import StoreWriter
from meduet_fast.errors import UserError, VolumeError
from meduet_fast.progress import track


@dataclass
class VolumeLatents:
    """What is stored of one volume.

    Attributes:
        latent: (C, X, Y, Z).
        affine: (4, 4), voxels of the prepared image to RAS mm.
        spacing: voxel size of the prepared image in mm.
        intensity: the intensity rule as a mapping.
        image: (X, Y, Z) in [0, 1], for the preview; None for none.
        notes: further labels for the file's header.
    """

    latent: Tensor
    affine: np.ndarray
    spacing: tuple[float, float, float]
    intensity: Mapping[str, Any]
    image: Tensor | None = None
    notes: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class VolumeJob:
    """One volume of the input, and how to make its latents.

    Attributes:
        name: unique in the input.
        domain, body_part: labels.
        source: the input file.
        content_key: gives the SHA-256 of all that the latents depend on; may raise VolumeError.
        make: makes the latents; may raise VolumeError.
    """

    name: str
    domain: str
    body_part: str
    source: Path
    content_key: Callable[[], str]
    make: Callable[[], VolumeLatents]


@dataclass
class PrepareSummary:
    """What became of every volume, by name; ``failed`` holds (input file, reason)."""

    store: Path
    written: list[str] = field(default_factory=list)
    up_to_date: list[str] = field(default_factory=list)
    removed: list[str] = field(default_factory=list)
    failed: list[tuple[Path, str]] = field(default_factory=list)

    @contextmanager
    def catch_bad_volume(self) -> Iterator[None]:
        """Record a VolumeError as a failure instead of raising it."""
        try:
            yield
        except VolumeError as error:
            self.failed.append((error.path, error.reason))


def format_summary(summary: PrepareSummary) -> str:
    """The summary as text for a person: one line of counts, then one line per removed or failed volume."""
    entries = LatentStore.open(summary.store).entries
    domains = len({entry.domain for entry in entries})
    counts = (
        f"{len(summary.written)} written, {len(summary.up_to_date)} up to date, "
        f"{len(summary.removed)} removed, {len(summary.failed)} failed"
    )
    lines = [f"{summary.store}: {len(entries)} volumes of {domains} domains ({counts})"]
    lines += [f"  removed, no longer in the input: {name}" for name in summary.removed]
    lines += [f"  failed: {path}: {reason}" for path, reason in summary.failed]
    if not entries:
        lines.append("  The store is empty: not one volume could be prepared.")
    return "\n".join(lines)


def update_store(writer: StoreWriter, jobs: Sequence[VolumeJob]) -> PrepareSummary:
    """Make the store hold exactly the volumes of ``jobs``.

    Volumes that are not in the input any more are removed. A listed volume is up to date if its labels, its
    content key and its file are what they should be; otherwise it is removed before anything new is made, so
    that a run that is stopped half-way leaves no stale volume behind. A bad volume is recorded and the rest
    goes on; one whose input cannot even be read keeps what the store has of it.

    Args:
        writer: entered writer of the store.
        jobs: the whole input.

    Raises:
        UserError: the store cannot be written.
    """
    summary = PrepareSummary(writer.path)
    missing = _drop_stale(writer, jobs, summary)
    for job in track(missing, "Preparing volumes", unit="volume") if missing else ():
        with summary.catch_bad_volume():
            key = job.content_key()
            made = job.make()
            if not torch.isfinite(made.latent).all():
                raise VolumeError(job.source, "its latents are not finite (NaN or Inf)")
            if made.image is not None:
                write_preview(writer.preview_path(job.name), made.image)
            writer.add(
                name=job.name,
                domain=job.domain,
                body_part=job.body_part,
                content_key=key,
                source=str(job.source),
                latent=made.latent,
                affine=made.affine,
                spacing=made.spacing,
                intensity=made.intensity,
                notes=made.notes,
            )
            summary.written.append(job.name)
    return summary


def _drop_stale(writer: StoreWriter, jobs: Sequence[VolumeJob], summary: PrepareSummary) -> list[VolumeJob]:
    """Sort out what the store has; returns the jobs that must be done."""
    names = {job.name for job in jobs}
    summary.removed = [name for name in writer.entries if name not in names]
    writer.drop(summary.removed)
    listed = [job for job in jobs if job.name in writer.entries]
    missing = {job.name for job in jobs if job.name not in writer.entries}
    stale = set()
    for job in track(listed, "Checking the store", unit="volume") if listed else ():
        with summary.catch_bad_volume():
            if _is_up_to_date(writer, job):
                summary.up_to_date.append(job.name)
            else:
                stale.add(job.name)
    writer.drop(stale)
    return [job for job in jobs if job.name in missing | stale]


def _is_up_to_date(writer: StoreWriter, job: VolumeJob) -> bool:
    entry = writer.entries[job.name]
    same_labels = (entry.domain, entry.body_part) == (job.domain, job.body_part)
    if not same_labels or entry.content_key != job.content_key():
        return False
    try:
        check_file(writer.path, entry)
    except UserError:
        return False  # missing or damaged: made anew
    writer.entries[job.name] = replace(entry, source=str(job.source))  # the input may have been moved
    return True
