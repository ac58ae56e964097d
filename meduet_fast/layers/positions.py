"""Compute fixed 3D sine-cosine positions. Source: MeDUET section "Network"."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor


def sincos_positions_3d(width: int, grid: tuple[int, int, int], theta: float = 10000.0) -> Tensor:
    """Give each axis (x, y, z) a third of the width, sines in its first half, cosines in its second.

    Args:
        width: a multiple of 6.
        grid: tokens along x, y, z.
        theta: largest wavelength, in tokens, divided by 2 pi.

    Returns:
        (L, D) float32, tokens in raster order (x slowest).

    Raises:
        ValueError: for a width that is no multiple of 6.
    """
    if width % 6:
        raise ValueError(f"width is {width}, expected a multiple of 6 for sine-cosine positions")
    frequencies = theta ** -(torch.arange(width // 6, dtype=torch.float64) / (width // 6))  # (D/6,)
    axes = [torch.arange(size, dtype=torch.float64) for size in grid]
    coordinates = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).reshape(-1, 3)  # (L, 3)
    angles = coordinates.unsqueeze(-1) * frequencies  # (L, 3, D/6)
    return torch.cat([angles.sin(), angles.cos()], -1).flatten(1).float()  # (L, D)


@lru_cache(maxsize=16)
def _kept(width: int, grid: tuple[int, int, int], device: torch.device) -> Tensor:
    with torch.inference_mode(False), torch.device("cpu"):  # of use to training, too
        table = sincos_positions_3d(width, grid)  # (L, D)
    return table.to(device)


def kept_sincos_positions_3d(width: int, grid: tuple[int, int, int], device: torch.device) -> Tensor:
    """Compute :func:`sincos_positions_3d` once for each grid: for networks that take crops of any size.

    Within ``torch.compile`` they are computed in the graph.

    Returns:
        (L, D) float32, not to be written to.
    """
    if torch.compiler.is_compiling():
        return sincos_positions_3d(width, grid).to(device)  # (L, D)
    return _kept(width, grid, device)  # (L, D)
