"""Which implementation runs: Triton kernels or plain PyTorch."""

from __future__ import annotations

import logging
import os
from typing import Literal

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .dtypes import constant
from .launch import recording

try:
    import triton
except ModuleNotFoundError as error:
    if error.name != "triton":
        raise
    triton = None

Backend = Literal["auto", "triton", "eager"]
BACKENDS: tuple[Backend, ...] = ("auto", "triton", "eager")
MIN_CAPABILITY = (8, 0)  # bf16 on tensor cores

_log = logging.getLogger(__name__)
_backend: Backend = "auto"
_auto_choices: dict[str, bool] = {}


def set_kernel_backend(backend: Backend) -> None:
    """Choose the implementation of every fast operation, for the whole process.

    Args:
        backend: "auto" takes Triton for CUDA tensors on a GPU of compute capability 8.0 or more, PyTorch
            otherwise, and says once in the log what it chose and why. "triton" always takes the kernels; on
            CPU tensors they run in Triton's interpreter, if the process was started with TRITON_INTERPRET=1.
            "eager" always takes plain PyTorch.

    Raises:
        ValueError: for an unknown name.
        RuntimeError: for "triton" where it can run nowhere.
    """
    global _backend
    if backend not in BACKENDS:
        raise ValueError(f"kernel backend {backend!r}, expected one of {', '.join(BACKENDS)}")
    if backend == "triton":
        if triton is None:
            raise RuntimeError("kernel backend 'triton': the package triton is not installed (Linux only)")
        if not (torch.cuda.is_available() or interpreted()):
            raise RuntimeError(
                "kernel backend 'triton' needs a CUDA device, or TRITON_INTERPRET=1 in the environment "
                "before Python starts to run on the CPU in the interpreter"
            )
    _backend = backend


def kernel_backend() -> Backend:
    """Return the name last given to :func:`set_kernel_backend`."""
    return _backend


def interpreted() -> bool:
    """Return whether Triton runs its kernels in Python, on CPU tensors."""
    return triton is not None and os.environ.get("TRITON_INTERPRET") == "1"


def transformed() -> bool:
    """Return whether forward-mode differentiation, ``vmap`` or another transform of torch.func is active.

    Kernels see the values alone: tangents and batch dimensions would be lost.
    """
    return forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active()


def use_triton(x: Tensor) -> bool:
    """Return whether an operation on ``x`` runs its Triton kernels, or records them on the meta device.

    Whatever the choice, plain PyTorch runs within a transform, see :func:`transformed`.

    Raises:
        RuntimeError: if Triton was asked for and can't run on the tensor's device.
    """
    if x.is_meta and recording():
        return True
    if _backend == "eager" or transformed():
        return False
    if _backend == "auto":
        return x.is_cuda and _auto_choice(str(x.device))
    if not (x.is_cuda or (x.device.type == "cpu" and interpreted())):
        raise RuntimeError(
            f"kernel backend 'triton' can't run on {x.device.type} tensors; move them to CUDA, or choose "
            "set_kernel_backend('auto')"
        )
    return True


@constant
def _auto_choice(device: str) -> bool:
    """Choose for a CUDA device, and log it at its first use."""
    if device not in _auto_choices:
        if triton is None:
            chosen, reason = False, "the package triton is not installed"
        else:
            capability = torch.cuda.get_device_capability(device)
            chosen = capability >= MIN_CAPABILITY
            reason = f"compute capability {capability[0]}.{capability[1]}"
            if not chosen:
                reason += f", below {MIN_CAPABILITY[0]}.{MIN_CAPABILITY[1]}"
        _log.info("fast operations on %s: %s (%s)", device, "Triton" if chosen else "PyTorch", reason)
        _auto_choices[device] = chosen
    return _auto_choices[device]
