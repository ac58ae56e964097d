"""Tests of the Triton kernels in Triton's interpreter; ``tests/kernels/test_interpreter.py`` starts them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from types import SimpleNamespace
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


def _once(patch_lang: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Leave the language patched, module by module of kernels.

    The interpreter looks through it again at every call of a function within a kernel, which takes as long as
    all the rest.
    """
    done: dict[int, Any] = {}

    def patch(function: Any) -> SimpleNamespace:
        if id(function.__globals__) not in done:
            done[id(function.__globals__)] = patch_lang(function)
        return SimpleNamespace(restore=lambda: None)

    return patch


@pytest.fixture(autouse=True, scope="session")
def triton_kernels() -> Iterator[None]:
    """Every test runs the kernels, on memory that shows what was not written."""
    from triton.runtime import interpreter

    patch = pytest.MonkeyPatch()
    patch.setattr(interpreter, "_patch_lang", _once(interpreter._patch_lang))
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
