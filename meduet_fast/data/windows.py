"""Cover a volume with overlapping windows, and put what was made of each together again."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import product

import torch
from torch import Tensor

Start = tuple[int, int, int]


def axis_starts(edge: int, size: int, stride: int) -> list[int]:
    """Return the first indices of windows that cover an axis, ascending; see :func:`window_starts`."""
    return sorted({*range(0, edge - size, stride), edge - size})


def window_starts(shape: Sequence[int], size: int, stride: int) -> list[Start]:
    """Return the first corners of cubic windows that cover a volume, in raster order.

    The last window along an axis ends with the volume, so it may overlap its neighbour by more.

    Args:
        shape: (X, Y, Z) of the volume, each at least ``size``.
        size: edge of a window.
        stride: from window to window, at most ``size``.
    """
    x, y, z = (axis_starts(edge, size, stride) for edge in shape)
    return list(product(x, y, z))


def cut(volume: Tensor, starts: Iterable[Start], size: int) -> Tensor:
    """Return windows (N, C, s, s, s) of a volume (C, X, Y, Z)."""
    return torch.stack([volume[:, x : x + size, y : y + size, z : z + size] for x, y, z in starts])


def blend_weight(size: Sequence[int]) -> Tensor:
    """Return how much each voxel of a window (x, y, z) counts, float32: less towards its faces."""
    edges = [torch.arange(1, edge + 1, dtype=torch.float32) for edge in size]
    x, y, z = (torch.minimum(edge, edge.flip(0)) for edge in edges)  # 1 at the faces
    return x[:, None, None] * y[:, None] * z  # (x, y, z)


def blend(windows: Tensor, starts: Sequence[Start], shape: Sequence[int]) -> Tensor:
    """Put windows together: a mean in which a window counts less towards its faces, so that no seam shows.

    Args:
        windows: (N, C, s, s, s).
        starts: N first corners that cover the volume.
        shape: (X, Y, Z) of the volume.

    Returns:
        (C, X, Y, Z), float32.
    """
    size = windows.shape[-1]
    weight = blend_weight((size, size, size))  # (s, s, s)
    total = torch.zeros(windows.shape[1], *shape)  # (C, X, Y, Z)
    weights = torch.zeros(*shape)
    for window, (x, y, z) in zip(windows, starts, strict=True):
        place = (..., slice(x, x + size), slice(y, y + size), slice(z, z + size))
        total[place] += weight * window
        weights[place] += weight
    return total / weights
