"""Write a latent store: every file is whole or absent, and the index lists only what is whole."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor

from meduet_fast.errors import UserError
from meduet_fast.files import atomic_path, remove_leftovers
from meduet_fast.lock import FolderLock

from .preview import write_preview
from .store import INDEX_NAME, LATENTS, TENSOR_NAME, StoreEntry, StoreIndex, read_index

PREVIEWS = "previews"
INDEX_INTERVAL_S = 1.0  # rewriting the index after each of thousands of quick volumes would be quadratic


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
        image: (X, Y, Z) in [0, 1], of which a preview is drawn; None for none.
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
    image: Tensor | None = None
    notes: Mapping[str, str] = field(default_factory=dict)


class StoreWriter:
    """Write a store, alone, as a context manager.

    Entering takes the store's lock, reads what is there, drops it all if another tokenizer made it, and
    removes files that no entry lists (a killed writer's). Leaving writes the index, also after an error.

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
        self._empty = StoreIndex(tokenizer, tokenizer_spec, channels, compression, ())
        self._lock = FolderLock(path)
        self._index_written = 0.0

    def __enter__(self) -> StoreWriter:
        try:
            found = self.path.iterdir() if self.path.exists() else ()
            foreign = [item for item in found if not item.name.startswith(".")]
            if foreign and not (self.path / INDEX_NAME).exists():
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
        if (self.path / INDEX_NAME).exists():
            before = read_index(self.path)
            if replace(before, tokenizer_spec=self._empty.tokenizer_spec, entries=()) == self._empty:
                self.entries = {entry.name: entry for entry in before.entries}
        self._write_index()
        remove_leftovers(self.path)
        remove_leftovers(self.path / LATENTS)
        remove_leftovers(self.path / PREVIEWS)
        listed = {self.path / entry.file for entry in self.entries.values()}
        for file in (self.path / LATENTS).glob("*.safetensors"):
            if file not in listed:
                file.unlink()
        for file in (self.path / PREVIEWS).glob("*.png"):
            if file.stem not in self.entries:
                file.unlink()

    def __exit__(self, *_: object) -> None:
        try:
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
        if volume.image is not None:
            write_preview(self._preview(volume.name), volume.image)
        file = self.path / entry.file
        try:
            with atomic_path(file) as temporary:
                tensor = latent.detach().to("cpu", torch.bfloat16).contiguous()  # (C, X, Y, Z)
                # Not by safetensors' save_file: only their owner can read its files, whatever the umask.
                temporary.write_bytes(save({TENSOR_NAME: tensor}, metadata))
        except OSError as error:
            raise UserError(f"{file}: cannot be written: {error}") from error
        self.entries[entry.name] = entry
        if time.monotonic() - self._index_written >= INDEX_INTERVAL_S:
            self._write_index()

    def drop(self, names: Iterable[str]) -> None:
        """Unlist volumes, then delete their files."""
        dropped = [self.entries.pop(name) for name in names]
        if dropped:
            self._write_index()
        for entry in dropped:
            (self.path / entry.file).unlink(missing_ok=True)
            self._preview(entry.name).unlink(missing_ok=True)

    def _preview(self, name: str) -> Path:
        return self.path / PREVIEWS / f"{name}.png"

    def _write_index(self) -> None:
        entries = tuple(self.entries[name] for name in sorted(self.entries))
        text = replace(self._empty, entries=entries).to_json()
        path = self.path / INDEX_NAME
        try:
            if not path.exists() or path.read_text(encoding="utf-8") != text:
                with atomic_path(path) as temporary:
                    temporary.write_text(text, encoding="utf-8")
        except OSError as error:
            raise UserError(f"{path}: cannot be written: {error.strerror}") from error
        self._index_written = time.monotonic()
