"""Errors that are the user's to mend: the command line prints them as one line and exits with code 2."""

from __future__ import annotations

from pathlib import Path


class UserError(Exception):
    """Bad input: the message names the file or argument, what was found and what was expected."""


class VolumeError(UserError):
    """A volume that cannot be used.

    Attributes:
        path: the offending file.
        reason: why it was refused, without the path.
    """

    def __init__(self, path: Path | str, reason: str) -> None:
        self.path = Path(path)
        self.reason = reason
        super().__init__(f"{path}: {reason}")
