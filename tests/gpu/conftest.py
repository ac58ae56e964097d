"""Tests that need a GPU; without one they are not collected, nor what needs diffusers without that."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent

if not torch.cuda.is_available():
    collect_ignore_glob = ["test_*.py"]
elif not find_spec("diffusers"):
    collect_ignore_glob = ["test_synthesis.py"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark this folder's tests."""
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.gpu)
