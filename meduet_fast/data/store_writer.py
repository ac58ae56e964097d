"""Write a latent store: every file is whole or absent, and the index lists only what is whole."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from meduet_fast.errors import UserError
from meduet_fast.files import atomic_path, remove_leftovers
from meduet_fast.lock import FolderLock

from .latent_file import CropReader, latent_file, open_latents
from .preview import Preview, write_preview
from .store import check_file
from .store_index import (
    INDEX_NAME,
    INDEX_NAME_1,
    LATENTS,
    StoreEntry,
    StoreIndex,
    index_path,
    read_index,
    removal_line,
)

PREVIEWS = "previews"


@dataclass(frozen=True, kw_only=True)
class VolumeRecord:
    """Hold all that a store keeps of one volume: whoever makes latents gives the writer this.

    Attributes:
        name: unique in the store; the stem of its files.
        domain, body_part: labels.
        content_key: SHA-256 of everything that the latents depend on.
        source: the file that the latents were made from.
        latent: (C, X, Y, Z), any floating dtype and device; kept as bfloat16.
        affine: (4, 4), voxels of the prepared image to RAS mm.
        spacing: voxel size of the prepared image in mm.
        intensity: the rule that mapped voxel values to [0, 1], as a mapping.
        preview: what a picture of it shows; None for none.
        notes: further labels for the file's header.
    """

    name: str
    domain: str
    body_part: str
    content_key: str
    source: str
    latent: Tensor
    affine: np.ndarray
    spacing: tuple[float, float, float]
    intensity: Mapping[str, Any]
    preview: Preview | None = None
    notes: Mapping[str, str] = field(default_factory=dict)


class StoreWriter:
    """Write a store, alone, as a context manager.

    Entering takes the store's lock, reads what is there, drops it all if another tokenizer made it, and
    removes files that no entry lists (a killed writer's). Each volume adds a line to the index. Leaving sorts
    them, also after an error.

    Args:
        path: the store's folder; made if absent, refused if it holds something else.
        tokenizer: identity of the tokenizer.
        tokenizer_spec: what ``load_tokenizer`` was given.
        channels: latent channels.
        compression: image voxels per latent voxel and axis.

    Raises:
        UserError: the folder is in use, holds something else, has a damaged index or cannot be written.
    """

    def __init__(
        self, path: Path, *, tokenizer: str, tokenizer_spec: str, channels: int, compression: int
    ) -> None:
        self.path = path
        self.entries: dict[str, StoreEntry] = {}
        self._empty = StoreIndex(tokenizer, tokenizer_spec, channels, compression)
        self._lock = FolderLock(path)
        self._journal = -1  # descriptor of the index

    def __enter__(self) -> StoreWriter:
        try:
            found = self.path.iterdir() if self.path.exists() else ()
            foreign = [item for item in found if not item.name.startswith(".")]
            if foreign and not index_path(self.path).exists():
                raise UserError(f"{self.path}: not empty and not a latent store; give a new folder")
        except OSError as error:
            raise UserError(f"{self.path}: cannot be used as a latent store: {error.strerror}") from error
        with ExitStack() as undo:
            undo.enter_context(self._lock)
            self._take_over()
            undo.pop_all()
        return self

    def _take_over(self) -> None:
        """Take over what the index lists, and remove what it does not."""
        if index_path(self.path).exists():
            before = read_index(self.path)
            if replace(before, tokenizer_spec=self._empty.tokenizer_spec, entries=()) == self._empty:
                self.entries = {entry.name: entry for entry in before.entries}
        self._write_index()
        (self.path / INDEX_NAME_1).unlink(missing_ok=True)
        remove_leftovers(self.path)
        remove_leftovers(self.path / LATENTS)
        remove_leftovers(self.path / PREVIEWS)
        for folder, ending in ((LATENTS, ".safetensors"), (PREVIEWS, ".png")):
            for file in (self.path / folder).glob(f"*{ending}"):
                if file.name.removesuffix(ending) not in self.entries:
                    file.unlink()
        self._journal = os.open(self.path / INDEX_NAME, os.O_WRONLY | os.O_APPEND)

    def __exit__(self, *_: object) -> None:
        try:
            os.close(self._journal)
            self._lock.check()  # the index is another process's, if that took the store over
            self._write_index()
        finally:
            self._lock.__exit__()

    def add(self, volume: VolumeRecord) -> None:
        """Write one volume's files, then list it.

        Raises:
            ValueError: the latents have another number of channels or dimensions.
            UserError: a file cannot be written (disk full, no permission), or another process took
                the store over.
        """
        self._lock.check()
        latent = volume.latent
        if latent.ndim != 4 or latent.shape[0] != self._empty.channels:
            raise ValueError(
                f"latent of {volume.name}: {tuple(latent.shape)}, expected ({self._empty.channels}, X, Y, Z)"
            )
        c, x, y, z = latent.shape
        labels = (volume.name, volume.domain, volume.body_part)
        entry = StoreEntry(*labels, (c, x, y, z), volume.content_key, volume.source, volume.spacing)
        before = self.entries.get(entry.name)
        if before is not None and before.content_key != entry.content_key:
            # A kill between file and index would leave an entry that does not fit its file.
            self.drop([entry.name])
        metadata = {
            **volume.notes,
            "domain": volume.domain,
            "body_part": volume.body_part,
            "affine": json.dumps(np.asarray(volume.affine, dtype=np.float64).tolist()),
            "spacing": json.dumps(volume.spacing),
            "intensity": json.dumps(dict(volume.intensity)),
            "tokenizer": self._empty.tokenizer,
            "content_key": volume.content_key,
        }
        if volume.preview is not None:
            write_preview(self._preview(volume.name), volume.preview)
        self._write_latents(entry, latent, metadata)
        self.entries[entry.name] = entry
        self._append(entry.line())

    def upgrade(self, name: str) -> tuple[dict[str, str], bool]:
        """Check a volume's file, and write it anew in chunks if version 1 did.

        Returns:
            The labels in its header, and whether it was written anew.

        Raises:
            DamagedLatents: the file is missing, damaged or not the entry's.
            UserError: it cannot be read or written, or another process took the store over.
        """
        entry = self.entries[name]
        metadata, layout = check_file(self.path, entry)
        if layout.chunked:
            return metadata, False
        latent = torch.empty(entry.shape, dtype=torch.bfloat16)
        with open_latents(self.path / entry.file) as descriptor:
            crop = latent.view(torch.int16).numpy()  # (C, X, Y, Z), the same memory
            CropReader().read(descriptor, self.path / entry.file, layout, (0, 0, 0), crop)
        self._lock.check()
        self._write_latents(entry, latent, metadata)
        return metadata, True

    def drop(self, names: Iterable[str]) -> None:
        """Unlist volumes, then delete their files.

        Raises:
            UserError: the index cannot be written, or another process took the store over.
        """
        self._lock.check()
        names = list(names)
        if names:
            self._append(b"".join(map(removal_line, names)))
            os.fsync(self._journal)  # a loss of power must not leave listed what is deleted
        for name in names:
            (self.path / self.entries.pop(name).file).unlink(missing_ok=True)
            self._preview(name).unlink(missing_ok=True)

    def _preview(self, name: str) -> Path:
        return self.path / PREVIEWS / f"{name}.png"

    def _write_latents(self, entry: StoreEntry, latent: Tensor, metadata: Mapping[str, str]) -> None:
        file = self.path / entry.file
        try:
            with atomic_path(file) as temporary:
                # Not by safetensors' save_file: only their owner can read its files, whatever the umask.
                temporary.write_bytes(latent_file(latent, metadata))
        except OSError as error:
            raise UserError(f"{file}: cannot be written: {error}") from error

    def _append(self, lines: bytes) -> None:
        length = os.fstat(self._journal).st_size
        left = memoryview(lines)
        try:
            while left:
                left = left[os.write(self._journal, left) :]
        except OSError as error:
            os.ftruncate(self._journal, length)  # no line may begin behind half of another
            raise UserError(f"{self.path / INDEX_NAME}: cannot be written: {error.strerror}") from error

    def _write_index(self) -> None:
        """Write the index without what was replaced and removed, unless it is like that already."""
        path = self.path / INDEX_NAME
        try:
            if not self._index_is_current(path):
                with atomic_path(path) as temporary, temporary.open("wb") as file:
                    file.writelines(self._lines())
        except OSError as error:
            raise UserError(f"{path}: cannot be written: {error.strerror}") from error

    def _lines(self) -> Iterator[bytes]:
        entries = tuple(self.entries[name] for name in sorted(self.entries))
        return replace(self._empty, entries=entries).lines()

    def _index_is_current(self, path: Path) -> bool:
        if not path.exists():
            return False
        with path.open("rb") as file:
            return all(found == line for found, line in zip_longest(file, self._lines()))
