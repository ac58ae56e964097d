"""MeDUET-Fast: self-supervised pretraining that splits 3D medical volumes into content and style."""

from __future__ import annotations

import sys
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

__version__ = "0.1.0"

_PYTHON = ((3, 10), (3, 13))
_TORCH = ((2, 11), (2, 15))


def _check_versions(python: tuple[int, int], torch_version: str) -> None:
    """Refuse interpreters and torch releases that the project is not built for.

    Raises:
        ImportError: naming what was found and the supported range.
    """
    if not _PYTHON[0] <= python <= _PYTHON[1]:
        raise ImportError(f"meduet_fast supports Python 3.10 to 3.13, found {python[0]}.{python[1]}")
    major, minor = (int(part) for part in torch_version.split(".")[:2])
    if not _TORCH[0] <= (major, minor) <= _TORCH[1]:
        raise ImportError(f"meduet_fast supports torch 2.11 to 2.15, found {torch_version}")


if find_spec("torch") is None:
    raise ImportError("meduet_fast needs torch 2.11 to 2.15, and torch is not installed")
try:  # without importing it, which takes a second or two: who only reads volumes needs no torch
    _torch_version = version("torch") or ""
except (PackageNotFoundError, KeyError):
    _torch_version = ""
if not _torch_version:  # put on the path by hand, or beside what another installation left behind
    from torch import __version__ as _torch_version
_check_versions(sys.version_info[:2], str(_torch_version))
