"""Read a latent store: one safetensors file a volume and one index; crops are read from the files' chunks.

::

    STORE/index.jsonl                 format, tokenizer, and the volumes: only complete files are ever listed
    STORE/latents/<name>.safetensors  latents in bfloat16; labels in the file's metadata
    STORE/previews/<name>.png         slices of the prepared image, a block decoded; not of imported latents
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .latent_file import CropReader, Layout, open_latents, read_header
from .store_index import StoreEntry, StoreIndex, read_index


def check_file(store: Path, entry: StoreEntry) -> tuple[dict[str, str], Layout]:
    """Check the header of a volume's latent file, and that it is the file of the entry.

    Returns:
        The header's metadata, and where the latents are.

    Raises:
        DamagedLatents: the file is missing, truncated, damaged or not the one that the entry describes.
        UserError: it cannot be read.
    """
    path = store / entry.file
    with open_latents(path) as descriptor:
        return read_header(descriptor, path, entry)


class LatentStore:
    """Read a store. Safe to pass to worker processes, forked or spawned.

    No file stays open: a store of any size stays under ``ulimit -n``, and a file that ``prepare`` replaces
    meanwhile is read anew.

    Attributes:
        path: the store's folder.
        index: what the index says.
        entries: the volumes; the position in this list is a volume's id.
        domains: sorted names; the position in this list is a domain's id.
    """

    def __init__(self, path: Path, index: StoreIndex) -> None:
        self.path = path
        self.index = index
        self.entries = list(index.entries)
        self.domains = sorted({entry.domain for entry in self.entries})
        self._domain_ids = {name: number for number, name in enumerate(self.domains)}
        # Of each file whose header was checked: what tells it from another, first byte of latents, chunked
        self._checked = np.zeros((len(self.entries), 3), dtype=np.int64)

    @classmethod
    def open(cls, path: Path | str) -> LatentStore:
        """Open a store by its index; latent files are checked when they are first read.

        Raises:
            UserError: see :func:`read_index`.
        """
        return cls(Path(path), read_index(Path(path)))

    def identity(self) -> str:
        """Compute the SHA-256 (hex) of names, domains and content keys, which changes when the latents do."""
        entries = json.dumps([(entry.name, entry.domain, entry.content_key) for entry in self.entries])
        return hashlib.sha256(entries.encode()).hexdigest()

    def domain_id(self, index: int) -> int:
        """Return the domain id of volume ``index``."""
        return self._domain_ids[self.entries[index].domain]

    def metadata(self, index: int) -> dict[str, str]:
        """Read the labels in the header of the latent file of volume ``index``; see :func:`check_file`."""
        return check_file(self.path, self.entries[index])[0]

    def _layout(self, descriptor: int, path: str, index: int) -> Layout:
        """Return where an open file has its latents; the header is read again only if the file is another."""
        status = os.fstat(descriptor)
        file = hash((status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns))
        known, first, chunked = self._checked[index].tolist()
        if file == known:
            return Layout(self.entries[index].shape, first, bool(chunked))
        _, layout = read_header(descriptor, path, self.entries[index])
        self._checked[index] = file, layout.first, layout.chunked
        return layout

    def read_crops(
        self, volumes: Sequence[int], starts: Sequence[Sequence[int]], size: tuple[int, int, int]
    ) -> Tensor:
        """Read one crop per row.

        Args:
            volumes: B positions in ``entries``.
            starts: B first corners (x, y, z) in latent voxels.
            size: edges (sx, sy, sz) in latent voxels.

        Returns:
            bfloat16 (B, C, sx, sy, sz).

        Raises:
            ValueError: a crop leaves its volume.
            UserError: a latent file is missing, damaged or not the one that the index describes.
        """
        latents = torch.empty(len(volumes), self.index.channels, *size, dtype=torch.bfloat16)
        folder, reader = str(self.path), CropReader()
        # Of the same memory, because numpy has no bfloat16.
        crops = latents.view(torch.int16).numpy()  # (B, C, sx, sy, sz)
        for crop, volume, start in zip(crops, volumes, starts, strict=True):
            entry = self.entries[volume]
            if any(
                first < 0 or first + edge > whole
                for first, edge, whole in zip(start, size, entry.grid, strict=True)
            ):
                raise ValueError(
                    f"crop of {size} at {tuple(start)} leaves volume {entry.name} of {entry.grid}"
                )
            path = f"{folder}/{entry.file}"  # a Path would take as long as opening the file
            with open_latents(path) as descriptor:
                reader.read(descriptor, path, self._layout(descriptor, path, volume), start, crop)
        return latents

    def read_volume(self, index: int) -> Tensor:
        """Read a whole volume, bfloat16 (C, X, Y, Z); see :meth:`read_crops`."""
        return self.read_crops([index], [(0, 0, 0)], self.entries[index].grid)[0]
