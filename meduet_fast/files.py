"""Write files that are whole or absent, to a temporary name, then rename; tell files by content and place."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import UserError


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    """Flush a file, or every file below a folder, to the disk: a rename must not outlive its content."""
    for item in sorted(path.rglob("*")) if path.is_dir() else [path]:
        descriptor = os.open(item, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _let_others_read(path: Path) -> None:
    """Give a file, or every file below a folder, the mode that the umask gives new ones.

    Some libraries write files that only their owner may read, whatever the umask.
    """
    probe = path.with_name(f"{path.name}-mode")
    for item in path.rglob("*") if path.is_dir() else [path]:
        if item.is_file() and not item.stat().st_mode & 0o077:
            probe.touch()
            item.chmod(probe.stat().st_mode & 0o777)
            probe.unlink()


@contextmanager
def atomic_path(path: Path | str) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; on success it replaces ``path``, on any failure it is removed.

    The caller creates a file or a folder at the yielded path. The temporary name starts with ``.`` and ends
    with ``.tmp<pid>``, so that listings by suffix never see it. A folder may only replace an absent one.
    Files get the mode that the umask gives, whoever wrote them.

    Raises:
        OSError: as raised by the caller's writing, by the flush to disk or by the rename.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp{os.getpid()}")
    _remove(temporary)
    try:
        yield temporary
        _let_others_read(temporary)
        _sync(temporary)
        temporary.replace(path)
    except BaseException:
        _remove(temporary)
        raise


def remove_leftovers(folder: Path) -> None:
    """Remove what killed writers left in ``folder`` (names made by :func:`atomic_path`)."""
    for item in folder.glob(".*.tmp*"):
        _remove(item)


def refuse_unwritable(folder: Path) -> None:
    """Refuse a folder in which this process could make no file, or that it could not make.

    Raises:
        UserError: naming it.
    """
    there = folder.absolute()
    try:
        while True:
            try:
                there.stat()
                break
            except (FileNotFoundError, NotADirectoryError):
                there = there.parent
    except OSError as error:
        raise UserError(f"{folder}: cannot be written: {error.filename}: {error.strerror}") from error
    if not there.is_dir():
        raise UserError(f"{folder}: cannot be written: {there} is no folder")
    if not os.access(there, os.W_OK | os.X_OK, effective_ids=True):
        raise UserError(f"{folder}: cannot be written: {there} does not let this user write")


def in_real_folder(path: Path) -> Path:
    """Return a path that is the same whatever way it is written: the real folder, the name as it is.

    A link to a file keeps its own name.
    """
    if path.name in ("", os.pardir):
        return Path(os.path.realpath(path))
    return Path(os.path.realpath(path.parent), path.name)


def file_sha256(path: Path) -> str:
    """Compute the SHA-256 of a file, in hexadecimal.

    Raises:
        UserError: if it can't be read.
    """
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    except OSError as error:
        raise UserError(f"{path}: can't be read: {error.strerror or error}") from error
    return digest.hexdigest()
