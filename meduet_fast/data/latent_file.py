"""Write and read the file of one volume's latents, in chunks: a crop reads little more than itself.

::

    header     JSON of safetensors: the tensor "latent", and the volume's labels as metadata; ends on a page
    latent     bfloat16 (nx, ny, nz, C, 8, 8, 8): chunks of 8^3 voxels with all their channels

The metadata has the volume's own "shape", [C, X, Y, Z]; chunks that stick out of it are filled with zeros. Of
4 channels a chunk is 4 KiB, one page. Stores of version 1 have "latent" as bfloat16 (C, X, Y, Z).
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save
from torch import Tensor

from meduet_fast.errors import UserError

from .store_index import StoreEntry

TENSOR_NAME = "latent"
EDGE = 8  # voxels, of a chunk
PAGE = 4096  # bytes


class DamagedLatents(UserError):
    """A latent file that is missing or not what the index says, so that it has to be made anew."""


class Layout(NamedTuple):
    """Say where the latents of a file are.

    Attributes:
        shape: (C, X, Y, Z).
        first: byte where they begin.
        chunked: whether they are in chunks.
    """

    shape: tuple[int, int, int, int]
    first: int
    chunked: bool


def _chunk_counts(grid: Sequence[int]) -> tuple[int, int, int]:
    nx, ny, nz = (-(-size // EDGE) for size in grid)
    return nx, ny, nz


def latent_file(latent: Tensor, metadata: Mapping[str, str]) -> bytes:
    """Return the content of the file for latents (C, X, Y, Z), kept as bfloat16, and labels."""
    c, *grid = latent.shape
    counts = nx, ny, nz = _chunk_counts(grid)
    missing = [count * EDGE - size for count, size in zip(counts, grid, strict=True)]
    padded = F.pad(
        latent.detach().to("cpu", torch.bfloat16), (0, missing[2], 0, missing[1], 0, missing[0])
    )  # (C, 8 nx, 8 ny, 8 nz)
    chunks = padded.view(c, nx, EDGE, ny, EDGE, nz, EDGE).permute(1, 3, 5, 0, 2, 4, 6)
    labels = {**metadata, "shape": json.dumps(list(latent.shape))}
    content = save({TENSOR_NAME: chunks.contiguous()}, labels)  # (nx, ny, nz, C, 8, 8, 8)
    length = int.from_bytes(content[:8], "little")
    room = -(8 + length) % PAGE  # safetensors lets blanks follow the header
    return b"".join(
        [(length + room).to_bytes(8, "little"), content[8 : 8 + length], b" " * room, content[8 + length :]]
    )


@contextmanager
def open_latents(path: Path | str) -> Iterator[int]:
    """Open a latent file for reads here and there; yield its descriptor.

    Raises:
        DamagedLatents: it is missing.
        UserError: it cannot be read, now or within the ``with``.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)  # nothing but what is asked for
            yield descriptor
        finally:
            os.close(descriptor)
    except FileNotFoundError:
        raise DamagedLatents(f"{path}: listed in the index but missing; run prepare again") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error


def read_header(descriptor: int, path: Path | str, entry: StoreEntry) -> tuple[dict[str, str], Layout]:
    """Check the header of an open latent file, and that it is the file of the entry.

    Returns:
        The header's metadata, and where the latents are.

    Raises:
        DamagedLatents: the file is truncated, damaged or not the one that the entry describes.
    """
    total = os.fstat(descriptor).st_size
    begin = os.pread(descriptor, PAGE, 0)
    length = int.from_bytes(begin[:8], "little")
    if not 2 <= length <= total - 8:
        raise DamagedLatents(f"{path}: not a safetensors file, or truncated ({total} bytes)")
    try:
        header = json.loads(begin[8 : 8 + length] if 8 + length <= PAGE else os.pread(descriptor, length, 8))
        tensor = header[TENSOR_NAME]
        stored = tuple(int(size) for size in tensor["shape"])
        first, end = (int(offset) for offset in tensor["data_offsets"])
        dtype, metadata = str(tensor["dtype"]), dict(header.get("__metadata__") or {})
        chunked = len(stored) == 7
        shape = tuple(int(size) for size in json.loads(metadata["shape"])) if chunked else stored
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DamagedLatents(f"{path}: damaged header ({error!r}); run prepare again") from error
    fits = len(shape) == 4 and (
        not chunked or stored == (*_chunk_counts(shape[1:]), shape[0], EDGE, EDGE, EDGE)
    )
    if dtype != "BF16" or not fits or first != 0 or end != 2 * prod(stored):
        raise DamagedLatents(
            f"{path}: tensor {dtype} {stored} of {end - first} bytes, expected BF16 (C, X, Y, Z), "
            f"whole or in chunks of {EDGE}^3 voxels"
        )
    if 8 + length + end != total:
        raise DamagedLatents(f"{path}: {total} bytes, expected {8 + length + end}: truncated or altered")
    if shape != entry.shape:
        raise DamagedLatents(f"{path}: shape {shape}, the index says {entry.shape}; run prepare again")
    if metadata.get("content_key") != entry.content_key:
        raise DamagedLatents(f"{path}: content key differs from the index; run prepare again")
    return metadata, Layout(entry.shape, 8 + length, chunked)


class CropReader:
    """Read crops, one after the other, through the same memory: fresh memory costs more than the reading."""

    def __init__(self) -> None:
        self._read = np.empty(0, dtype=np.int16)
        self._ordered = np.empty(0, dtype=np.int16)

    def read(
        self, descriptor: int, path: Path | str, layout: Layout, start: Sequence[int], crop: np.ndarray
    ) -> None:
        """Read a crop that lies in its volume.

        Args:
            descriptor, path, layout: the open file.
            start: first corner (x, y, z).
            crop: int16 (C, sx, sy, sz), the bits of bfloat16; filled.

        Raises:
            DamagedLatents: the file ends too early.
            OSError: it cannot be read.
        """
        (c, width, depth, height), first, chunked = layout
        (x, y, z), (_, sx, sy, sz) = start, crop.shape
        if not chunked:
            size = 2 * sy * height
            places = [
                first + 2 * height * ((channel * width + plane) * depth + y)
                for channel in range(c)
                for plane in range(x, x + sx)
            ]
            rows = self._read_runs(descriptor, path, places, size)
            crop[...] = rows.reshape(c, sx, sy, height)[..., z : z + sz]  # (C, sx, sy, sz)
            return
        _, ny, nz = _chunk_counts((width, depth, height))
        cx, cy, cz = x // EDGE, y // EDGE, z // EDGE  # the crop's first chunk
        hx, hy, hz = -(-(x + sx) // EDGE) - cx, -(-(y + sy) // EDGE) - cy, -(-(z + sz) // EDGE) - cz
        size = 2 * c * EDGE**3
        places = [
            first + size * (((cx + column) * ny + cy + row) * nz + cz)
            for column in range(hx)
            for row in range(hy)
        ]
        chunks = self._read_runs(descriptor, path, places, size * hz)
        if self._ordered.size < chunks.size:
            self._ordered = np.empty(chunks.size, dtype=np.int16)
        ordered = self._ordered[: chunks.size]
        # Whole lines are moved at once: 8 voxels of a chunk, then a row of the crop.
        lines = chunks.view("V16").reshape(hx, hy, hz, c, EDGE, EDGE)
        ordered.view("V16").reshape(c, hx, EDGE, hy, EDGE, hz)[...] = lines.transpose(3, 0, 4, 1, 5, 2)
        volume = ordered.reshape(c, hx * EDGE, hy * EDGE, hz * EDGE)
        x, y, z = x - cx * EDGE, y - cy * EDGE, z - cz * EDGE
        line = f"V{2 * sz}"
        crop.view(line)[...] = volume[:, x : x + sx, y : y + sy, z : z + sz].view(line)  # (C, sx, sy, 1)

    def _read_runs(self, descriptor: int, path: Path | str, offsets: Sequence[int], size: int) -> np.ndarray:
        """Read ``size`` bytes at each offset, one run after the other: int16 (bytes / 2,)."""
        total = len(offsets) * size
        if self._read.nbytes < total:
            self._read = np.empty(total // 2, dtype=np.int16)
        room = self._read.data.cast("B")
        for number, offset in enumerate(offsets):
            if os.preadv(descriptor, [room[number * size : (number + 1) * size]], offset) != size:
                raise DamagedLatents(f"{path}: ends before byte {offset + size}: truncated or altered")
        return self._read[: total // 2]
