"""Writing a latent store: every file is whole or absent, and the index lists only what is whole."""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor

from meduet_fast.errors import UserError
from meduet_fast.files import atomic_path, remove_leftovers

from .store import INDEX_NAME, LATENTS, TENSOR_NAME, StoreEntry, StoreIndex, read_index

PREVIEWS = "previews"
INDEX_INTERVAL_S = 1.0  # rewriting the index after each of thousands of quick volumes would be quadratic


class StoreWriter:
    """The one writer of a store, as a context manager.

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
        self._lock = -1
        self._index_written = 0.0

    def __enter__(self) -> StoreWriter:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            foreign = [item for item in self.path.iterdir() if not item.name.startswith(".")]
            if foreign and not (self.path / INDEX_NAME).exists():
                raise UserError(f"{self.path}: not empty and not a latent store; give a new folder")
            self._lock = os.open(self.path / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise UserError(f"{self.path}: cannot be used as a latent store: {error.strerror}") from error
        try:
            self._claim()
        except BaseException:
            os.close(self._lock)
            raise
        return self

    def _claim(self) -> None:
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{self.path}: another process is writing this store") from None
        if (self.path / INDEX_NAME).exists():
            before = read_index(self.path)
            if replace(before, tokenizer_spec=self._empty.tokenizer_spec, entries=()) == self._empty:
                self.entries = {entry.name: entry for entry in before.entries}
        self._write_index()
        remove_leftovers(self.path)
        self._remove_unlisted()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._write_index()
        finally:
            os.close(self._lock)

    def add(
        self,
        *,
        name: str,
        domain: str,
        body_part: str,
        content_key: str,
        source: str,
        latent: Tensor,
        affine: np.ndarray,
        spacing: tuple[float, float, float],
        intensity: Mapping[str, Any],
        notes: Mapping[str, str] | None = None,
    ) -> None:
        """Write one volume's file, then list it.

        Args:
            name, domain, body_part, content_key, source, spacing: see :class:`StoreEntry`.
            latent: (C, X, Y, Z), any floating dtype and device; kept as bfloat16.
            affine: (4, 4), voxels of the prepared image to RAS mm.
            intensity: the rule that mapped voxel values to [0, 1], as a mapping.
            notes: further labels for the file's header.

        Raises:
            ValueError: the latents have another number of channels or dimensions.
            UserError: the file cannot be written (disk full, no permission).
        """
        if latent.ndim != 4 or latent.shape[0] != self._empty.channels:
            raise ValueError(
                f"latent of {name}: {tuple(latent.shape)}, expected ({self._empty.channels}, X, Y, Z)"
            )
        c, x, y, z = latent.shape
        entry = StoreEntry(name, domain, body_part, (c, x, y, z), content_key, source, spacing)
        before = self.entries.get(name)
        if before is not None and before.content_key != content_key:
            # A kill between file and index would leave an entry that does not fit its file.
            self.drop([name])
        metadata = {
            **(notes or {}),
            "domain": domain,
            "body_part": body_part,
            "affine": json.dumps(np.asarray(affine, dtype=np.float64).tolist()),
            "spacing": json.dumps(spacing),
            "intensity": json.dumps(dict(intensity)),
            "tokenizer": self._empty.tokenizer,
            "content_key": content_key,
        }
        file = self.path / entry.file
        try:
            with atomic_path(file) as temporary:
                tensor = latent.detach().to("cpu", torch.bfloat16).contiguous()
                # Not by safetensors' save_file: only their owner can read its files, whatever the umask.
                temporary.write_bytes(save({TENSOR_NAME: tensor}, metadata))
        except OSError as error:
            raise UserError(f"{file}: cannot be written: {error}") from error
        self.entries[name] = entry
        if time.monotonic() - self._index_written >= INDEX_INTERVAL_S:
            self._write_index()

    def drop(self, names: Iterable[str]) -> None:
        """Unlist volumes, then delete their files."""
        dropped = [self.entries.pop(name) for name in names]
        if dropped:
            self._write_index()
        for entry in dropped:
            (self.path / entry.file).unlink(missing_ok=True)
            self.preview_path(entry.name).unlink(missing_ok=True)

    def preview_path(self, name: str) -> Path:
        """Where the preview of a volume lies."""
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

    def _remove_unlisted(self) -> None:
        remove_leftovers(self.path / LATENTS)
        remove_leftovers(self.path / PREVIEWS)
        listed = {self.path / entry.file for entry in self.entries.values()}
        for file in (self.path / LATENTS).glob("*.safetensors"):
            if file not in listed:
                file.unlink()
        for file in (self.path / PREVIEWS).glob("*.png"):
            if file.stem not in self.entries:
                file.unlink()
