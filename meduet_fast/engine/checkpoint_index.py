"""PyTorch distributed checkpoints without PyTorch's index, which is a pickle and could run anything.

::

    state/index.json           where each part of each tensor is
    state/__<rank>_0.distcp    the parts that a process wrote, as PyTorch writes them

The index knows tensors alone: entries of other kinds PyTorch would unpickle too. Parts are read by
``torch.load(weights_only=True)``. PyTorch's writer of safetensors (``HuggingFaceStorageWriter``) needs no
index, but two more copies in memory, and its reader does not notice that a file is absent.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.storage import WriteResult

from meduet_fast.errors import UserError
from meduet_fast.files import atomic_path

INDEX_FILE = "index.json"


class IndexedWriter(FileSystemWriter):
    """Write ``index.json`` in place of PyTorch's ``.metadata``."""

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Write the index; called once, when all processes have written their parts."""
        places = {result.index: result.storage_data for written in results for result in written}
        index = {}
        for name, entry in metadata.state_dict_metadata.items():
            assert isinstance(entry, TensorStorageMetadata), name
            parts = []
            for chunk in entry.chunks:
                place: _StorageInfo = places[MetadataIndex(name, chunk.offsets)]
                where = {"file": place.relative_path, "start": place.offset, "length": place.length}
                parts.append({"at": list(chunk.offsets), "size": list(chunk.sizes), **where})
            index[name] = {"size": list(entry.size), "parts": parts}
        with atomic_path(Path(self.path) / INDEX_FILE) as file:
            file.write_text(json.dumps(index), encoding="utf-8")


def _integers(values: Any) -> torch.Size:
    size = torch.Size(values)
    if any(value < 0 for value in size):
        raise ValueError(f"negative number in {values}")
    return size


class IndexedReader(FileSystemReader):
    """Read what :class:`IndexedWriter` wrote.

    Raises:
        UserError: if there is no index, or one that is damaged, or one that names files elsewhere.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        path = folder / INDEX_FILE
        tensors: dict[str, Any] = {}
        places: dict[MetadataIndex, _StorageInfo] = {}
        try:
            for name, entry in json.loads(path.read_text(encoding="utf-8")).items():
                chunks = []
                for part in entry["parts"]:
                    if part["file"] != Path(part["file"]).name:
                        raise ValueError(f"{part['file']!r} is not the name of a file in this folder")
                    at = _integers(part["at"])
                    chunks.append(ChunkStorageMetadata(at, _integers(part["size"])))
                    start, length = _integers([part["start"], part["length"]])
                    places[MetadataIndex(name, at)] = _StorageInfo(part["file"], start, length)
                # PyTorch does not look at the type written here: a part's own counts.
                tensors[name] = TensorStorageMetadata(TensorProperties(), _integers(entry["size"]), chunks)
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            why = error.strerror if isinstance(error, OSError) else f"{type(error).__name__}: {error}"
            raise UserError(f"{path}: not a readable index of a checkpoint: {why}") from error
        meta = StorageMeta(load_id=self.load_id)
        self._metadata = Metadata(tensors, storage_data=places, storage_meta=meta)

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Return what the index says, in PyTorch's terms."""
        return self._metadata
