"""Reductions and losses run in float32 at least, whatever the inputs are."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor


def check_float(name: str, x: Tensor) -> None:
    """Refuse complex numbers, whose imaginary part would be lost, and integers, with a ValueError."""
    if not x.is_floating_point():
        raise ValueError(f"{name} is {x.dtype}, expected a float dtype")


def at_least_float32(x: Tensor) -> Tensor:
    """Convert to float32 what is narrower; float64 stays."""
    return x if x.dtype == torch.float64 else x.float()


def constant(function: Callable[..., Any]) -> Callable[..., Any]:
    """Mark a function whose result ``torch.compile`` may take for a constant.

    ``torch.compiler.assume_constant_result`` does no more, but imports the compiler: a second at every start.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@constant
def _has_autocast(device_type: str) -> bool:
    """Return whether a kind of device has autocast; before torch 2.12 Dynamo can't trace the question."""
    return torch.amp.is_autocast_available(device_type)


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Turn autocast off, so that matrix products keep their inputs' dtype; some devices have none."""
    return torch.autocast(device.type, enabled=False) if _has_autocast(device.type) else nullcontext()


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """Return the dtype to which autocast casts products on the device of ``x``; None while it is off."""
    device = "cpu" if x.is_meta else x.device.type  # meta has no autocast of its own
    if _has_autocast(device) and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return None


def accumulator(dtype: torch.dtype) -> Any:
    """Return the Triton type in which a kernel computes on ``dtype``: float64 for float64, else float32.

    Triton's interpreter computes garbage in bfloat16, so kernels convert before any arithmetic.
    """
    import triton.language as tl

    return tl.float64 if dtype == torch.float64 else tl.float32
