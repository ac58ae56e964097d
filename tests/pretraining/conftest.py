"""The same small store, network and thread as the engine's tests."""

from __future__ import annotations

from ..engine.conftest import _one_thread, tiny_config, tiny_settings, tiny_store

__all__ = ["_one_thread", "tiny_config", "tiny_settings", "tiny_store"]
