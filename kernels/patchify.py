"""Patches of a 3D volume as tokens, and back.

Both are a strided copy, which is one kernel of PyTorch's already. The fast operations that consume patches,
:mod:`.patch_embed` and :mod:`.reconstruction`, read them from the volume and make no copy.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

ChannelOrder = Literal["first", "last"]
Triple = tuple[int, int, int]


def triple(patch_size: int | Triple) -> Triple:
    """Return the edge along each axis."""
    return (patch_size,) * 3 if isinstance(patch_size, int) else patch_size


def patch_grid(shape: tuple[int, ...] | torch.Size, patch_size: int | Triple) -> Triple:
    """Count patches along each of the last three axes of ``shape``.

    Raises:
        ValueError: naming the axis whose size is not a multiple of the patch edge.
    """
    patch = triple(patch_size)
    for axis, (size, edge) in enumerate(zip(shape[-3:], patch, strict=True)):
        if size % edge or size == 0:
            raise ValueError(
                f"spatial axis {axis} has size {size}, expected a positive multiple of the patch edge {edge}"
            )
    x, y, z = (size // edge for size, edge in zip(shape[-3:], patch, strict=True))
    return x, y, z


def patchify_3d(x: Tensor, patch_size: int | Triple, channel_order: ChannelOrder = "last") -> Tensor:
    """Cut a volume into non-overlapping patches.

    Args:
        x: (B, C, X, Y, Z), any dtype and strides.
        patch_size: patch edge, or one for each axis; divides the volume.
        channel_order: "last" orders a token (px, py, pz, c), as MeDUET's decoder predicts it; "first" orders
            it (c, px, py, pz), as a Conv3d weight is laid out.

    Returns:
        (B, L, p^3*C), tokens in raster order (x slowest).

    Raises:
        ValueError: if ``x`` is not 5D or its size is not a multiple of the patch.
    """
    if x.dim() != 5:
        raise ValueError(f"x has shape {tuple(x.shape)}, expected (B, C, X, Y, Z)")
    p, q, r = triple(patch_size)
    gx, gy, gz = patch_grid(x.shape, patch_size)
    batch, channels = x.shape[:2]
    blocks = x.reshape(batch, channels, gx, p, gy, q, gz, r)
    order = (0, 2, 4, 6, 3, 5, 7, 1) if channel_order == "last" else (0, 2, 4, 6, 1, 3, 5, 7)
    return blocks.permute(order).reshape(batch, gx * gy * gz, channels * p * q * r)


def unpatchify_3d(
    tokens: Tensor, patch_size: int | Triple, grid: Triple, channel_order: ChannelOrder = "last"
) -> Tensor:
    """Put patches back together, the inverse of :func:`patchify_3d`.

    Args:
        tokens: (B, L, p^3*C).
        grid: patches along x, y, z; their product is L.

    Returns:
        (B, C, X, Y, Z).

    Raises:
        ValueError: if the token count or width does not fit the grid and patch.
    """
    p, q, r = triple(patch_size)
    gx, gy, gz = grid
    batch, length, width = tokens.shape
    if length != gx * gy * gz:
        raise ValueError(f"tokens has {length} tokens, expected {gx}*{gy}*{gz} = {gx * gy * gz}")
    if width % (p * q * r):
        raise ValueError(f"tokens has width {width}, expected a multiple of the patch volume {p * q * r}")
    channels = width // (p * q * r)
    if channel_order == "last":
        blocks = tokens.reshape(batch, gx, gy, gz, p, q, r, channels).permute(0, 7, 1, 4, 2, 5, 3, 6)
    else:
        blocks = tokens.reshape(batch, gx, gy, gz, channels, p, q, r).permute(0, 4, 1, 5, 2, 6, 3, 7)
    return blocks.reshape(batch, channels, gx * p, gy * q, gz * r)
