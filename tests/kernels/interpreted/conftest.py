"""Tests of the Triton kernels in Triton's interpreter; ``tests/kernels/test_interpreter.py`` starts them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from meduet_fast.kernels import set_kernel_backend

if os.environ.get("TRITON_INTERPRET") != "1":
    collect_ignore_glob = ["test_*.py"]


def _filled(original: Any) -> Any:
    """An unwritten output shows: fresh memory holds NaN, or a large number."""

    def fresh(*arguments: Any, **options: Any) -> torch.Tensor:
        result = original(*arguments, **options)
        if result.device.type == "meta":
            return result
        return result.fill_(float("nan") if result.is_floating_point() else 99)

    return fresh


@pytest.fixture(autouse=True, scope="session")
def triton_kernels() -> Iterator[None]:
    """Every test runs the kernels, on memory that shows what was not written."""
    patch = pytest.MonkeyPatch()
    for owner, name in (
        (torch, "empty"),
        (torch, "empty_like"),
        (torch.Tensor, "new_empty"),
    ):
        patch.setattr(owner, name, _filled(getattr(owner, name)))
    set_kernel_backend("triton")
    yield
    set_kernel_backend("auto")
    patch.undo()
