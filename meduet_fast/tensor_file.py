"""Write and read safetensors files of more tensors than the memory has room for."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from .errors import UserError
from .weight_files import listed

DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.int64: "I64"}
MAPPED = {"F32": np.float32, "BF16": np.int16, "I64": np.int64}  # numpy has no bfloat16: its bits


class TensorFileWriter:
    """Write a safetensors file, tensor by tensor.

    Args:
        data: takes the tensors' values, until :meth:`write` puts them behind their header.
    """

    def __init__(self, data: BinaryIO) -> None:
        self._data, self._size, self._header = data, 0, dict[str, Any]()

    def _place(self, name: str, dtype: torch.dtype, shape: Sequence[int]) -> int:
        """Enter a tensor in the header; return its first byte."""
        first, self._size = self._size, self._size + prod(shape) * dtype.itemsize
        self._header[name] = {
            "dtype": DTYPES[dtype], "shape": list(shape), "data_offsets": [first, self._size],
        }  # fmt: skip
        return first

    def add(self, name: str, tensor: Tensor) -> None:
        """Add a tensor on the CPU: float32, bfloat16 or int64."""
        self._data.seek(self._place(name, tensor.dtype, tensor.shape))
        self._data.write(tensor.contiguous().flatten().view(torch.uint8).numpy().data)

    def reserve(self, name: str, dtype: torch.dtype, shape: Sequence[int]) -> np.ndarray:
        """Add a tensor of one value or more, filled in later in the array that this returns."""
        first = self._place(name, dtype, shape)
        os.posix_fallocate(self._data.fileno(), first, self._size - first)  # a full disk is told here
        return np.memmap(self._data, MAPPED[DTYPES[dtype]], "r+", first, tuple(shape))

    def write(self, path: Path, metadata: Mapping[str, str]) -> None:
        """Write the file."""
        header = json.dumps({"__metadata__": metadata, **self._header}).encode()
        header += b" " * (-len(header) % 8)  # aligns the values
        self._data.seek(0)
        with path.open("wb") as file:
            file.write(len(header).to_bytes(8, "little") + header)
            shutil.copyfileobj(self._data, file, 1 << 20)


class TensorFile:
    """Read a safetensors file by parts: nothing is read before it is used. Forked processes share it.

    Args:
        path: the file.

    Attributes:
        path: the file.
        metadata: what it says of itself.
        sha256: of its header, in hexadecimal.

    Raises:
        UserError: if it can't be read or is damaged.
    """

    def __init__(self, path: Path) -> None:
        from safetensors import SafetensorError, safe_open  # here, so that a network needs torch alone

        self.path = path
        try:
            with safe_open(path, "np") as file:  # checks that header and values fit together
                self.metadata: dict[str, str] = file.metadata() or {}
            with path.open("rb") as raw:
                length = int.from_bytes(raw.read(8), "little")
                header = raw.read(length)
        except OSError as error:
            raise UserError(f"{path}: can't be read: {error.strerror or error}") from error
        except SafetensorError as error:
            raise UserError(f"{path}: a damaged or cut-off safetensors file: {listed([error])}") from error
        self.sha256 = hashlib.sha256(header).hexdigest()
        self._first, self._header = 8 + length, json.loads(header)
        self._header.pop("__metadata__", None)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of every tensor, by name."""
        return {name: tuple(item["shape"]) for name, item in self._header.items()}

    def array(self, name: str, writable: bool = False) -> np.ndarray:
        """Map a tensor into memory; of bfloat16 its bits as int16.

        Args:
            name: of a float32, bfloat16 or int64 tensor.
            writable: whether the array may be written to, which changes nothing but what this process sees;
                memory is set aside for that, so it is not for what is larger than that.

        Raises:
            UserError: if the tensor is not there, or of another type.
        """
        item = self._header.get(name)
        if item is None or item["dtype"] not in MAPPED:
            found = "nothing" if item is None else item["dtype"]
            raise UserError(f"{self.path}: {name}: found {found}, expected one of {', '.join(MAPPED)}")
        shape, first = tuple(item["shape"]), self._first + item["data_offsets"][0]
        dtype = MAPPED[item["dtype"]]
        if not prod(shape):
            return np.empty(shape, dtype)  # nothing can't be mapped
        return np.memmap(self.path, dtype, "c" if writable else "r", first, shape)
