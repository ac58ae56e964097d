"""Patches of a 3D volume as tokens, and the patch embedding as a matrix product.

Source: MeDUET section "Network" (patch embedding with kernel = stride = patch, raster token order).
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

ChannelOrder = Literal["first", "last"]
Triple = tuple[int, int, int]


def _triple(patch_size: int | Triple) -> Triple:
    return (patch_size,) * 3 if isinstance(patch_size, int) else patch_size


def patch_grid(shape: tuple[int, ...] | torch.Size, patch_size: int | Triple) -> Triple:
    """Number of patches along each of the last three axes of ``shape``.

    Raises:
        ValueError: naming the axis whose size is not a multiple of the patch edge.
    """
    patch = _triple(patch_size)
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
    p, q, r = _triple(patch_size)
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
    p, q, r = _triple(patch_size)
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


def _project(
    patches: Tensor, weight: Tensor, bias: Tensor | None, position: Tensor | None, num_prefix_tokens: int
) -> Tensor:
    """Linear projection, plus positions, behind ``num_prefix_tokens`` zero rows."""
    tokens = F.linear(patches, weight, bias)
    if position is not None:
        tokens = tokens + position.to(tokens.dtype)
    return F.pad(tokens, (0, 0, num_prefix_tokens, 0)) if num_prefix_tokens else tokens


def patch_embed_3d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    position: Tensor | None = None,
    source_mask: Tensor | None = None,
    num_prefix_tokens: int = 0,
) -> Tensor:
    """Embed the patches of a volume: what Conv3d with kernel = stride = patch does, as a matrix product.

    Args:
        x: (B, C, X, Y, Z), any strides.
        weight: (D, C, px, py, pz), a Conv3d weight; it sets the patch edges.
        bias: (D,) or None.
        position: (L, D) added to every row of the batch, or None.
        source_mask: (B, L) of 0 and 1, or None. Where it is 1 a token shows the patch of the batch-flip
            partner, sample B-1-b, instead of sample b's own (MeDUET's mixing).
        num_prefix_tokens: P zero rows in front, for the caller to fill (CLS).

    Returns:
        (B, P+L, D).

    Raises:
        ValueError: if a shape does not fit.
    """
    if x.dim() != 5 or weight.dim() != 5 or x.shape[1] != weight.shape[1]:
        raise ValueError(
            f"x has shape {tuple(x.shape)} and weight {tuple(weight.shape)}, "
            "expected (B, C, X, Y, Z) and (D, C, px, py, pz)"
        )
    edges: Triple = (weight.shape[2], weight.shape[3], weight.shape[4])
    patches = patchify_3d(x, edges, "first")
    if position is not None and position.shape != (patches.shape[1], weight.shape[0]):
        raise ValueError(
            f"position has shape {tuple(position.shape)}, expected {(patches.shape[1], weight.shape[0])}"
        )
    if source_mask is not None:
        if source_mask.shape != patches.shape[:2]:
            raise ValueError(
                f"source_mask has shape {tuple(source_mask.shape)}, expected {tuple(patches.shape[:2])}"
            )
        patches = torch.where(source_mask.bool().unsqueeze(-1), patches.flip(0), patches)
    return _project(patches, weight.flatten(1), bias, position, num_prefix_tokens)


def patch_embed_tokens(
    tokens: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    position: Tensor | None = None,
    num_prefix_tokens: int = 0,
) -> Tensor:
    """Embed predicted tokens without building the volume between: the weight is permuted instead.

    Equal to ``patch_embed_3d(unpatchify_3d(tokens, ...), weight, ...)``.

    Args:
        tokens: (B, L, p^3*C) in (px, py, pz, c) order.
        weight: (D, C, px, py, pz), a Conv3d weight.

    Returns:
        (B, P+L, D).

    Raises:
        ValueError: if the token width is not p^3*C.
    """
    if tokens.shape[-1] != weight[0].numel():
        raise ValueError(f"tokens has width {tokens.shape[-1]}, expected p^3*C = {weight[0].numel()}")
    flat = weight.permute(0, 2, 3, 4, 1).flatten(1)
    return _project(tokens, flat, bias, position, num_prefix_tokens)
