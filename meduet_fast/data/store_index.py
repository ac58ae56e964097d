"""Keep the index of a latent store, to which a line a volume is appended, whatever the number of volumes.

::

    {"format": "meduet-fast latent store", "version": 2, "tokenizer": ..., "channels": 4, ...}
    {"name": "a", "domain": "ct", "body_part": "chest", "shape": [4, 60, 60, 56], "content_key": ..., ...}
    {"removed": "a"}

A later line of a name takes the place of an earlier one. A last line without its end is a killed writer's, or
one that is being written: it does not count. Version 1 was one JSON object, ``index.json``.
"""

from __future__ import annotations

import gc
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, BinaryIO

from meduet_fast.errors import UserError

FORMAT = "meduet-fast latent store"
VERSION = 2
INDEX_NAME = "index.jsonl"
INDEX_NAME_1 = "index.json"  # of version 1
LATENTS = "latents"
IMPORTED = "reference-cache"  # in the place of a tokenizer: latents of the published code, of unknown origin
_BLOCK = 2**16  # bytes of lines that are parsed at once


@dataclass(frozen=True, slots=True)
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

    def line(self) -> bytes:
        """Return the line that lists the volume."""
        return _line({name: getattr(self, name) for name in _FIELDS})


_FIELDS = tuple(field.name for field in fields(StoreEntry))


@dataclass(frozen=True)
class StoreIndex:
    """Hold the content of an index.

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
    entries: tuple[StoreEntry, ...] = ()

    def lines(self) -> Iterator[bytes]:
        """Yield the lines of the index; :func:`read_index` reads them."""
        head = asdict(replace(self, entries=()))
        del head["entries"]
        yield _line({"format": FORMAT, "version": VERSION, **head})
        for entry in self.entries:
            yield entry.line()


def _line(content: dict[str, Any]) -> bytes:
    return json.dumps(content).encode() + b"\n"


def removal_line(name: str) -> bytes:
    """Return the line that unlists a volume."""
    return _line({"removed": name})


def index_path(store: Path) -> Path:
    """Find the index of a store, of whatever version; where it would be, if there is none."""
    old = store / INDEX_NAME_1
    return old if old.exists() and not (store / INDEX_NAME).exists() else store / INDEX_NAME


def read_index(store: Path) -> StoreIndex:
    """Read and check the index of a store, of this version or of version 1.

    Raises:
        UserError: no store there, not JSON, another format or version, missing or wrong fields.
    """
    # The new name once more: a writer may just have replaced the old one.
    for name in (INDEX_NAME, INDEX_NAME_1, INDEX_NAME):
        path = store / name
        try:
            with path.open("rb") as file, _no_collection():
                index = _read_lines(path, file) if name == INDEX_NAME else _read_version_1(path, file)
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:
            raise UserError(f"{path}: cannot be read: {error.strerror}") from error
        except KeyError as error:
            raise UserError(
                f"{path}: damaged index ({error} is missing); delete the store and prepare it again"
            ) from error
        except (TypeError, ValueError) as error:
            raise UserError(
                f"{path}: damaged index ({error}); delete the store and prepare it again"
            ) from error
        for entry in index.entries:
            if entry.shape[0] != index.channels:
                raise UserError(
                    f"{path}: volume {entry.name} has shape {entry.shape}, expected {index.channels} channels"
                )
        return index
    raise UserError(
        f"{store}: not a latent store ({INDEX_NAME} not found); make one with `meduet-fast prepare`"
    )


@contextmanager
def _no_collection() -> Iterator[None]:
    """Keep the collector from going through all of PyTorch's objects each time some more entries are made."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _read_lines(path: Path, file: BinaryIO) -> StoreIndex:
    index = _read_head(path, json.loads(file.readline()), VERSION)
    entries: dict[str, StoreEntry] = {}
    parse = _EntryParser()
    while lines := file.readlines(_BLOCK):
        torn = not lines[-1].endswith(b"\n")
        if torn:
            lines.pop()
        for item in json.loads(b"[" + b",".join(lines) + b"]"):
            if "removed" in item:
                entries.pop(item["removed"], None)
            else:
                entry = parse(item)
                entries[entry.name] = entry
        if torn:
            break  # its rest may come while this reads on
    return replace(index, entries=tuple(entries[name] for name in sorted(entries)))


def _read_version_1(path: Path, file: BinaryIO) -> StoreIndex:
    parse = _EntryParser()

    def parse_entries(item: dict[str, Any]) -> Any:
        return parse(item) if "content_key" in item else item  # at once: all as dicts would fill the memory

    raw = json.loads(file.read(), object_hook=parse_entries)
    index = _read_head(path, raw, 1)
    entries = raw["entries"]
    if not isinstance(entries, list) or not all(isinstance(entry, StoreEntry) for entry in entries):
        raise ValueError('"entries" is not a list of volumes')
    return replace(index, entries=tuple(entries))


def _read_head(path: Path, raw: Any, version: int) -> StoreIndex:
    if not isinstance(raw, dict) or raw.get("format") != FORMAT:
        raise UserError(f'{path}: not the index of a latent store (expected "format": "{FORMAT}")')
    if raw.get("version") != version:
        raise UserError(f"{path}: store version {raw.get('version')!r}, expected {version}; prepare it again")
    return StoreIndex(
        str(raw["tokenizer"]), str(raw["tokenizer_spec"]), int(raw["channels"]), int(raw["compression"])
    )


class _EntryParser:
    """Make entries that share what is equal: a store has few labels, shapes and spacings."""

    def __init__(self) -> None:
        self._shapes: dict[tuple[int, ...], tuple[int, int, int, int]] = {}
        self._spacings: dict[tuple[float, ...], tuple[float, float, float]] = {}

    def __call__(self, raw: dict[str, Any]) -> StoreEntry:
        name = str(raw["name"])
        if "/" in name or "\0" in name or name in ("", ".", ".."):
            raise ValueError(f"volume name {name!r} is not a file name")
        given, sizes = tuple(raw["shape"]), tuple(raw["spacing"])
        if given not in self._shapes:
            c, x, y, z = map(int, given)
            if min(c, x, y, z) < 1:
                raise ValueError(f"volume {name}: shape {given}")
            self._shapes[given] = c, x, y, z
        if sizes not in self._spacings:
            dx, dy, dz = map(float, sizes)
            self._spacings[sizes] = dx, dy, dz
        return StoreEntry(
            name,
            sys.intern(str(raw["domain"])),
            sys.intern(str(raw["body_part"])),
            self._shapes[given],
            str(raw["content_key"]),
            str(raw["source"]),
            self._spacings[sizes],
        )
