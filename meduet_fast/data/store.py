"""Read a latent store: one safetensors file a volume and one index; crops are slices of memory maps.

::

    STORE/index.json                  format, tokenizer, and the entries: only complete files are ever listed
    STORE/latents/<name>.safetensors  tensor "latent", bfloat16 (C, X, Y, Z); labels in the file's metadata
    STORE/previews/<name>.png         middle slices of the prepared image (not for imported latents)
"""

from __future__ import annotations

import json
import os
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from meduet_fast.errors import UserError

FORMAT = "meduet-fast latent store"
VERSION = 1
INDEX_NAME = "index.json"
LATENTS = "latents"
TENSOR_NAME = "latent"
MAX_OPEN_MAPS = 512  # a map holds no file descriptor, but the kernel bounds the maps of a process


@dataclass(frozen=True)
class StoreEntry:
    """List one volume of a store.

    Attributes:
        name: unique in the store; the file's stem.
        domain, body_part: labels.
        shape: (C, X, Y, Z) of the latents.
        content_key: SHA-256 of everything that the latents depend on.
        source: the file that the latents were made from.
        spacing: voxel size of the prepared image in mm; a latent voxel is ``compression`` times as large.
    """

    name: str
    domain: str
    body_part: str
    shape: tuple[int, int, int, int]
    content_key: str
    source: str
    spacing: tuple[float, float, float]

    @property
    def file(self) -> str:
        """Return the latent file, relative to the store."""
        return f"{LATENTS}/{self.name}.safetensors"

    @property
    def grid(self) -> tuple[int, int, int]:
        """Return the spatial shape (X, Y, Z) in latent voxels."""
        return self.shape[1:]


@dataclass(frozen=True)
class StoreIndex:
    """Hold the content of ``index.json``.

    Attributes:
        tokenizer: identity (name and short hash of the weights) of what made the latents.
        tokenizer_spec: what ``load_tokenizer`` was given.
        channels: latent channels.
        compression: image voxels per latent voxel and axis.
        entries: the volumes, sorted by name.
    """

    tokenizer: str
    tokenizer_spec: str
    channels: int
    compression: int
    entries: tuple[StoreEntry, ...]

    def to_json(self) -> str:
        """Write the content of ``index.json``; :func:`read_index` reads it."""
        return json.dumps({"format": FORMAT, "version": VERSION, **asdict(self)}, indent=1)


def read_index(store: Path) -> StoreIndex:
    """Read and check ``index.json``.

    Raises:
        UserError: no store there, not JSON, another format or version, missing or wrong fields.
    """
    path = store / INDEX_NAME
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(
            f"{store}: not a latent store ({INDEX_NAME} not found); make one with `meduet-fast prepare`"
        ) from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"{path}: damaged index ({error}); delete the store and prepare it again") from error
    if not isinstance(raw, dict) or raw.get("format") != FORMAT:
        raise UserError(f'{path}: not the index of a latent store (expected "format": "{FORMAT}")')
    if raw.get("version") != VERSION:
        raise UserError(f"{path}: store version {raw.get('version')!r}, expected {VERSION}; prepare it again")
    try:
        entries = tuple(_parse_entry(item) for item in raw["entries"])
        index = StoreIndex(
            str(raw["tokenizer"]),
            str(raw["tokenizer_spec"]),
            int(raw["channels"]),
            int(raw["compression"]),
            entries,
        )
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{path}: damaged index ({error!r}); delete the store and prepare it again"
        ) from error
    for entry in entries:
        if entry.shape[0] != index.channels:
            raise UserError(
                f"{path}: volume {entry.name} has shape {entry.shape}, expected {index.channels} channels"
            )
    return index


def _parse_entry(raw: dict[str, Any]) -> StoreEntry:
    values = {field.name: raw[field.name] for field in fields(StoreEntry)}
    if Path(raw["name"]).name != raw["name"]:
        raise ValueError(f"volume name {raw['name']!r} is not a file name")
    shape = tuple(int(size) for size in values.pop("shape"))
    spacing = tuple(float(size) for size in values.pop("spacing"))
    if len(shape) != 4 or min(shape) < 1 or len(spacing) != 3:
        raise ValueError(f"volume {raw['name']}: shape {shape}, spacing {spacing}")
    return StoreEntry(**{key: str(value) for key, value in values.items()}, shape=shape, spacing=spacing)


def check_file(store: Path, entry: StoreEntry) -> tuple[dict[str, str], int]:
    """Check the header of a volume's latent file, and that it is the file of the entry.

    Returns:
        The header's metadata and the byte where the latents begin.

    Raises:
        UserError: the file is missing, truncated, damaged or not the one that the entry describes.
    """
    path = store / entry.file
    try:
        with path.open("rb") as file:
            total = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= total - 8:
                raise UserError(f"{path}: not a safetensors file, or truncated ({total} bytes)")
            header = json.loads(file.read(length))
        tensor = header[TENSOR_NAME]
        shape = tuple(int(size) for size in tensor["shape"])
        first, end = (int(offset) for offset in tensor["data_offsets"])
        dtype, metadata = str(tensor["dtype"]), dict(header.get("__metadata__") or {})
    except FileNotFoundError:
        raise UserError(f"{path}: listed in the index but missing; run prepare again") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path}: damaged header ({error!r}); run prepare again") from error
    if dtype != "BF16" or len(shape) != 4 or first != 0 or end != 2 * int(np.prod(shape)):
        raise UserError(f"{path}: tensor {dtype} {shape} of {end - first} bytes, expected BF16 (C, X, Y, Z)")
    if 8 + length + end != total:
        raise UserError(f"{path}: {total} bytes, expected {8 + length + end}: truncated or altered")
    if shape != entry.shape:
        raise UserError(f"{path}: shape {shape}, the index says {entry.shape}; run prepare again")
    if metadata.get("content_key") != entry.content_key:
        raise UserError(f"{path}: content key differs from the index; run prepare again")
    return metadata, 8 + length


class LatentStore:
    """Read a store. Safe to pass to worker processes, forked or spawned.

    Attributes:
        path: the store's folder.
        index: what ``index.json`` says.
        entries: the volumes; the position in this list is a volume's id.
        domains: sorted names; the position in this list is a domain's id.
    """

    def __init__(self, path: Path, index: StoreIndex) -> None:
        self.path = path
        self.index = index
        self.entries = list(index.entries)
        self.domains = sorted({entry.domain for entry in self.entries})
        self._maps: OrderedDict[int, np.ndarray] = OrderedDict()

    @classmethod
    def open(cls, path: Path | str) -> LatentStore:
        """Open a store by its index; latent files are checked when they are first read.

        Raises:
            UserError: see :func:`read_index`.
        """
        return cls(Path(path), read_index(Path(path)))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_maps": OrderedDict()}  # a spawned worker maps the files itself

    def domain_id(self, index: int) -> int:
        """Return the domain id of volume ``index``."""
        return self.domains.index(self.entries[index].domain)

    def metadata(self, index: int) -> dict[str, str]:
        """Read the labels in the header of the latent file of volume ``index``; see :func:`check_file`."""
        return check_file(self.path, self.entries[index])[0]

    def _map(self, index: int) -> np.ndarray:
        """Map one volume as a read-only int16 view (C, X, Y, Z) of its file: numpy has no bfloat16."""
        array = self._maps.get(index)
        if array is not None:
            self._maps.move_to_end(index)
            return array
        entry = self.entries[index]
        _, offset = check_file(self.path, entry)
        # torch's map, unlike numpy's, keeps no file descriptor: thousands of volumes stay under `ulimit -n`.
        size = offset + 2 * int(np.prod(entry.shape))
        whole = torch.from_file(
            str(self.path / entry.file), shared=False, size=size, dtype=torch.uint8
        ).numpy()
        array = whole[offset:].view(np.int16).reshape(entry.shape)  # (C, X, Y, Z)
        array.flags.writeable = False
        self._maps[index] = array
        if len(self._maps) > MAX_OPEN_MAPS:
            self._maps.popitem(last=False)
        return array

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
        sx, sy, sz = size
        latents = torch.empty(len(volumes), self.index.channels, sx, sy, sz, dtype=torch.bfloat16)
        rows = latents.view(torch.int16).numpy()  # (B, C, sx, sy, sz), the same memory
        for row, volume, (x, y, z) in zip(rows, volumes, starts, strict=True):
            array = self._map(volume)  # (C, X, Y, Z)
            _, width, depth, height = array.shape
            if min(x, y, z) < 0 or x + sx > width or y + sy > depth or z + sz > height:
                name, grid = self.entries[volume].name, self.entries[volume].grid
                raise ValueError(f"crop of {size} at {(x, y, z)} leaves volume {name} of {grid}")
            row[...] = array[:, x : x + sx, y : y + sy, z : z + sz]  # (C, sx, sy, sz)
        return latents

    def read_volume(self, index: int) -> Tensor:
        """Read a whole volume, bfloat16 (C, X, Y, Z); see :meth:`read_crops`."""
        return self.read_crops([index], [(0, 0, 0)], self.entries[index].grid)[0]
