"""Errors that are the user's to mend: the command line prints them as one line and exits with code 2."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def printable(text: object) -> str:
    r"""Escape what a terminal or a UTF-8 file does not take: control characters, and bytes that are no UTF-8.

    >>> printable("K\udcf6ln\x1b[2J")
    'K\\xf6ln\\x1b[2J'
    """
    return "".join(letter if letter.isprintable() else _escape(letter) for letter in str(text))


def _escape(letter: str) -> str:
    if "\udc80" <= letter <= "\udcff":  # how Python holds a byte of a file name that is not UTF-8
        return f"\\x{ord(letter) - 0xDC00:02x}"
    return letter.encode("unicode_escape").decode()


class UserError(Exception):
    """Bad input: the message names the file or argument, what was found and what was expected.

    Line breaks in it are kept, other unprintable characters escaped.
    """

    def __init__(self, message: str) -> None:
        super().__init__("\n".join(map(printable, message.split("\n"))))


class VolumeError(UserError):
    """A volume that cannot be used.

    Attributes:
        path: the offending file.
        reason: why it was refused, without the path.
    """

    def __init__(self, path: Path | str, reason: str) -> None:
        self.path = Path(path)
        self.reason = reason
        super().__init__(f"{printable(path)}: {reason}")


class MissingExtra(UserError, ImportError):
    """A package that an extra would have brought."""


def install_hint(extra: str) -> str:
    """Say how an extra is installed: the project is on no package index."""
    return f"pip install '.[{extra}]' in a clone of meduet-fast"


@contextmanager
def needs_extra(extra: str) -> Iterator[None]:
    """Name the extra that brings what an import within does not find.

    Raises:
        MissingExtra: for a package of others that is not installed.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] == "meduet_fast":
            raise
        raise MissingExtra(f"{error.name} is not installed: {install_hint(extra)}") from error


@contextmanager
def failures_of(path: Path) -> Iterator[None]:
    """Turn what libraries raise on a strange file into the failure of this one volume.

    Raises:
        VolumeError: whatever goes wrong; what nobody foresaw is told with its type and place.
    """
    try:
        yield
    except VolumeError:
        raise
    except UserError as error:
        raise VolumeError(path, str(error)) from error
    except MemoryError as error:
        raise VolumeError(path, "does not fit into memory") from error
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        reason = f"unexpected {type(error).__name__} in {Path(place.filename).name}:{place.lineno}: {error}"
        raise VolumeError(path, " ".join(reason.split())) from error
