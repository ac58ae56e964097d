"""Read volumes, keep latents in stores and draw crops of them; knows no model, no autoencoder."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from meduet_fast.errors import needs_extra

if TYPE_CHECKING:
    from .sources import find_volumes
    from .store import LatentStore

__all__ = ["LatentStore", "find_volumes"]

_HOMES = {"LatentStore": "store", "find_volumes": "sources"}


def __getattr__(name: str) -> Any:
    """Import what is asked for: processes that only read volumes begin without torch, which stores need."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    with needs_extra("train"):
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
