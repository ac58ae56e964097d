"""How kernels are launched: block sizes from a checked-in table, on the tensors' device, or recorded."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

MAX_GRID_YZ = 65535  # CUDA's limit; the first axis has 2^31 - 1
CONFIG_FILE = Path(__file__).with_name("configs.json")
_overrides: dict[str, Mapping[str, int]] = {}
_recorded: list[Launch] | None = None
_recorded_arch = 0


class Options(dict[str, int]):
    """Block sizes, num_warps and num_stages of a kernel, and the table's ``name`` for them."""

    def __init__(self, name: str, values: Mapping[str, int]) -> None:
        super().__init__(values)
        self.name = name


class Launch(NamedTuple):
    """One launch of a kernel, as recorded.

    Attributes:
        kernel: the ``@triton.jit`` function.
        grid: number of programs along each axis.
        arguments: in the order of the kernel's first parameters.
        constants: compile-time values by name.
        config: name in the table of configurations.
        options: num_warps and, where it matters, num_stages.
    """

    kernel: Any
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    constants: dict[str, Any]
    config: str
    options: dict[str, int]


@functools.cache
def _table() -> dict[str, dict[str, dict[str, int]]]:
    return json.loads(CONFIG_FILE.read_text(encoding="utf-8"))["kernels"]


@functools.cache
def _arch(device: torch.device) -> int:
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def config(name: str, device: torch.device) -> Options:
    """Look up a kernel's options for a device.

    The table ``configs.json`` holds for every kernel a ``default`` and, where one was tuned, an entry for an
    architecture (``sm_90``).

    Raises:
        KeyError: for a kernel that the table does not know.
    """
    if name in _overrides:
        return Options(name, _overrides[name])
    arch = _recorded_arch if _recorded is not None else _arch(device) if device.type == "cuda" else 0
    entries = _table()[name]
    return Options(name, entries.get(f"sm_{arch}", entries["default"]))


@contextmanager
def override_config(name: str, values: Mapping[str, int]) -> Iterator[None]:
    """Run the kernel ``name`` with these values: for tuning, and for tests of every size."""
    _overrides[name] = values
    try:
        yield
    finally:
        del _overrides[name]


@contextmanager
def record_launches(arch: int) -> Iterator[list[Launch]]:
    """Collect launches and run nothing: operations on tensors of the meta device launch their kernels.

    Args:
        arch: architecture whose configurations are taken, e.g. 90.
    """
    global _recorded, _recorded_arch
    _recorded, _recorded_arch = [], arch
    try:
        yield _recorded
    finally:
        _recorded, _recorded_arch = None, 0


def recording() -> bool:
    """Return whether launches are being recorded."""
    return _recorded is not None


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    arguments: tuple[Any, ...],
    constants: dict[str, Any],
    options: Options,
) -> None:
    """Launch a kernel on the device of its first tensor; an empty grid launches nothing.

    Args:
        kernel: a ``@triton.jit`` function.
        grid: number of programs along up to three axes.
        arguments: positional, in the order of the kernel's parameters.
        constants: compile-time values by name.
        options: of :func:`config`; num_warps is taken from them and, where there is one, num_stages. It
            counts for loops with a product alone.

    Raises:
        ValueError: for tensors on several devices, or more programs than a launch can have.
    """
    chosen = {key: options[key] for key in ("num_warps", "num_stages") if key in options}
    if _recorded is not None:
        _recorded.append(Launch(kernel, grid, arguments, constants, options.name, chosen))
        return
    if 0 in grid:
        return
    if max(grid[1:], default=0) > MAX_GRID_YZ:
        raise ValueError(
            f"{options.name}: too many samples or tokens for one launch, {grid} programs, of which at most "
            f"{MAX_GRID_YZ} along the second and third axis; split the batch, or choose the eager backend"
        )
    tensors = [item for item in arguments if isinstance(item, Tensor)]
    device = tensors[0].device
    for item in tensors:
        if item.device != device:  # a kernel would follow the foreign pointer
            raise ValueError(f"{options.name}: tensors on {device} and {item.device}, expected one device")
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            kernel[grid](*arguments, **constants, **chosen)
    else:
        kernel[grid](*arguments, **constants, **chosen)
