"""Compute fixed 3D sine-cosine positions. Source: MeDUET section "Network"."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from meduet_fast.kernels.patchify import Triple


def sincos_positions_3d(
    width: int, grid: Triple, theta: float = 10000.0, extent: Triple | None = None
) -> Tensor:
    """Give each axis (x, y, z) a third of the width, sines in its first half, cosines in its second.

    Args:
        width: a multiple of 6.
        grid: tokens along x, y, z.
        theta: largest wavelength, in tokens, divided by 2 pi.
        extent: tokens along x, y, z of another grid over the same volume, in which places are counted.

    Returns:
        (L, D) float32, tokens in raster order (x slowest).

    Raises:
        ValueError: for a width that is no multiple of 6.
    """
    if width % 6:
        raise ValueError(f"width is {width}, expected a multiple of 6 for sine-cosine positions")
    frequencies = theta ** -(torch.arange(width // 6, dtype=torch.float64) / (width // 6))  # (D/6,)
    axes = [
        (torch.arange(size, dtype=torch.float64) + 0.5) * (length / size) - 0.5
        for size, length in zip(grid, extent or grid, strict=True)
    ]
    coordinates = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).reshape(-1, 3)  # (L, 3)
    angles = coordinates.unsqueeze(-1) * frequencies  # (L, 3, D/6)
    return torch.cat([angles.sin(), angles.cos()], -1).flatten(1).float()  # (L, D)


@lru_cache(maxsize=32)
def _kept(width: int, grid: Triple, extent: Triple, device: torch.device) -> Tensor:
    with torch.inference_mode(False), torch.device("cpu"):  # of use to training, too
        table = sincos_positions_3d(width, grid, extent=extent)  # (L, D)
    return table.to(device)


def kept_sincos_positions_3d(
    width: int, grid: Triple, device: torch.device, extent: Triple | None = None
) -> Tensor:
    """Compute :func:`sincos_positions_3d` once for each grid: for networks that take crops of any size.

    Within ``torch.compile`` they are computed in the graph.

    Returns:
        (L, D) float32, not to be written to.
    """
    if torch.compiler.is_compiling():
        return sincos_positions_3d(width, grid, extent=extent).to(device)  # (L, D)
    return _kept(width, grid, extent or grid, device)  # (L, D)
