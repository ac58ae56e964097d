"""Group normalisation and SiLU of 3D feature maps in one pass.

Source: Wu and He, "Group Normalization" (2018), as residual blocks of diffusion U-Nets and VAEs use it.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .backend import triton, use_triton
from .dtypes import accumulator, at_least_float32, without_autocast
from .launch import config, launch
from .registration import register

# 1. Reference


def group_norm_silu_reference(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    activation: bool = True,
) -> Tensor:
    """The definition of :func:`group_norm_silu`, in plain PyTorch."""
    wide = at_least_float32(x)
    weight, bias = (None if item is None else item.to(wide.dtype) for item in (weight, bias))
    with without_autocast(x.device):
        y = F.group_norm(wide, num_groups, weight, bias, eps)
        y = F.silu(y) if activation else y
    return y.to(x.dtype).contiguous(memory_format=_memory_format(x))


# 2. Kernels

if triton is not None:
    from .group_norm_kernels import (
        group_norm_apply_kernel,
        group_norm_backward_kernel,
        group_norm_combine_kernel,
        group_norm_reduce_kernel,
        group_norm_statistics_kernel,
        group_norm_sums_kernel,
    )


# 3. Registration


def _memory_format(x: Tensor) -> torch.memory_format:
    """Contiguous, or channels last where that is what ``x`` is."""
    last = not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last_3d)
    return torch.channels_last_3d if last else torch.contiguous_format


def _blocks(x: Tensor, options: dict[str, int]) -> tuple[int, int, tuple[int, int, int]]:
    """Positions and channels of a tile, and the strides of (B, C, S)."""
    channels, spatial = x.shape[1], x[0, 0].numel()
    if _memory_format(x) == torch.channels_last_3d:
        columns = min(triton.next_power_of_2(channels), options["COLUMNS"])
        return options["TILE"] // columns, columns, (channels * spatial, 1, channels)
    rows = min(triton.next_power_of_2(spatial), options["TILE"])
    columns = min(triton.next_power_of_2(channels), options["TILE"] // rows)
    return rows, columns, (channels * spatial, spatial, 1)


def _launch_forward(
    x: Tensor, num_groups: int, weight: Tensor | None, bias: Tensor | None, eps: float, activation: bool
) -> tuple[Tensor, Tensor, Tensor]:
    batch, channels = x.shape[:2]
    spatial, width, acc = x[0, 0].numel(), channels // num_groups, accumulator(x.dtype)
    y, mean, rstd = _fake_forward(x, num_groups, weight, bias, eps, activation)

    options = config("group_norm_statistics", x.device)
    rows, columns, strides = _blocks(x, options)
    chunk_size = rows * options["STEPS"]
    chunks = triton.cdiv(spatial, chunk_size)
    partial = mean.new_empty(batch, chunks, 2, channels)
    launch(
        group_norm_statistics_kernel,
        (chunks, triton.cdiv(channels, columns), batch),
        (x, partial, spatial, channels, *strides),
        {"ROWS": rows, "COLUMNS": columns, "STEPS": options["STEPS"], "ACC": acc},
        "group_norm_statistics",
        options,
    )
    options = config("group_norm_combine", x.device)
    launch(
        group_norm_combine_kernel,
        (num_groups, batch),
        (partial, mean, rstd, chunks, spatial, channels, width, chunk_size),
        {"BLOCK": options["BLOCK"], "EPS": eps, "ACC": acc},
        "group_norm_combine",
        options,
    )
    options = config("group_norm_apply", x.device)
    rows, columns, strides = _blocks(x, options)
    launch(
        group_norm_apply_kernel,
        (triton.cdiv(spatial, rows), triton.cdiv(channels, columns), batch),
        (x, weight, bias, mean, rstd, y, spatial, channels, width, num_groups, *strides),
        {"ROWS": rows, "COLUMNS": columns, "ACTIVATION": activation, "ACC": acc},
        "group_norm_apply",
        options,
    )
    return y, mean, rstd


def _fake_forward(
    x: Tensor, num_groups: int, weight: Tensor | None, bias: Tensor | None, eps: float, activation: bool
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = torch.promote_types(x.dtype, torch.float32)
    mean, rstd = (x.new_empty((x.shape[0], num_groups), dtype=dtype) for _ in range(2))
    return torch.empty_like(x, memory_format=_memory_format(x)), mean, rstd


def _launch_backward(
    grad_y: Tensor,
    x: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    activation: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    batch, channels = x.shape[:2]
    spatial, width, acc = x[0, 0].numel(), channels // num_groups, accumulator(x.dtype)
    grad_y = grad_y.contiguous(memory_format=_memory_format(x))
    grad_x = torch.empty_like(x, memory_format=_memory_format(x))
    sums, means = mean.new_empty(2, batch, channels), mean.new_empty(2, batch, num_groups)

    options = config("group_norm_sums", x.device)
    rows, columns, strides = _blocks(x, options)
    chunks = triton.cdiv(spatial, rows * options["STEPS"])
    partial = mean.new_empty(batch, chunks, 2, channels)
    launch(
        group_norm_sums_kernel,
        (chunks, triton.cdiv(channels, columns), batch),
        (x, weight, bias, mean, rstd, grad_y, partial, spatial, channels, width, num_groups, *strides),
        {"ROWS": rows, "COLUMNS": columns, "STEPS": options["STEPS"], "ACTIVATION": activation, "ACC": acc},
        "group_norm_sums",
        options,
    )
    options = config("group_norm_reduce", x.device)
    columns = min(triton.next_power_of_2(width), options["COLUMNS"])
    launch(
        group_norm_reduce_kernel,
        (num_groups, batch),
        (partial, weight, sums, means, chunks, spatial, channels, width),
        {"CHUNKS": options["TILE"] // columns, "COLUMNS": columns, "ACC": acc},
        "group_norm_reduce",
        options,
    )
    options = config("group_norm_backward", x.device)
    rows, columns, strides = _blocks(x, options)
    launch(
        group_norm_backward_kernel,
        (triton.cdiv(spatial, rows), triton.cdiv(channels, columns), batch),
        (x, weight, bias, mean, rstd, grad_y, means, grad_x, spatial, channels, width, num_groups, *strides),
        {"ROWS": rows, "COLUMNS": columns, "ACTIVATION": activation, "ACC": acc},
        "group_norm_backward",
        options,
    )
    return grad_x, sums[1].sum(0), sums[0].sum(0)


def _fake_backward(
    grad_y: Tensor,
    x: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    activation: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    grad_weight, grad_bias = (mean.new_empty(x.shape[1]) for _ in range(2))
    return torch.empty_like(x, memory_format=_memory_format(x)), grad_weight, grad_bias


def _setup_context(
    ctx: Any,
    inputs: tuple[Tensor, int, Tensor | None, Tensor | None, float, bool],
    output: tuple[Tensor, Tensor, Tensor],
) -> None:
    x, ctx.num_groups, weight, bias, _, ctx.activation = inputs
    _, mean, rstd = output
    ctx.save_for_backward(x, weight, bias, mean, rstd)
    ctx.mark_non_differentiable(mean, rstd)


def _backward(
    ctx: Any, grad_y: Tensor, *_: Tensor
) -> tuple[Tensor, None, Tensor | None, Tensor | None, None, None]:
    x, weight, bias, mean, rstd = ctx.saved_tensors
    grad_x, grad_weight, grad_bias = _group_norm_backward(
        grad_y, x, ctx.num_groups, weight, bias, mean, rstd, ctx.activation
    )
    return (
        grad_x,
        None,
        None if weight is None else grad_weight.to(weight.dtype),
        None if bias is None else grad_bias.to(bias.dtype),
        None,
        None,
    )


_group_norm = register(
    "group_norm_silu(Tensor x, int num_groups, Tensor? weight, Tensor? bias, float eps, bool activation) "
    "-> (Tensor, Tensor, Tensor)",
    _launch_forward,
    _fake_forward,
    _setup_context,
    _backward,
)
_group_norm_backward = register(
    "group_norm_silu_backward(Tensor grad_y, Tensor x, int num_groups, Tensor? weight, Tensor? bias, "
    "Tensor mean, Tensor rstd, bool activation) -> (Tensor, Tensor, Tensor)",
    _launch_backward,
    _fake_backward,
)


# 4. Public function


def group_norm_silu(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    activation: bool = True,
) -> Tensor:
    """GroupNorm and SiLU of a 3D feature map: two reads and one write.

    Statistics are sums of squares around means, never differences of squares: a large mean costs no digits.
    Under autocast, too, the result has the dtype of ``x``; it is computed in at least float32.

    Args:
        x: (B, C, X, Y, Z), any float dtype; read in place if contiguous or channels last
            (``torch.channels_last_3d``), made contiguous otherwise.
        num_groups: groups of neighbouring channels; divides C.
        weight, bias: (C,) or None for 1 and 0, any float dtype.
        eps: added to the variance.
        activation: False leaves the SiLU out.

    Returns:
        (B, C, X, Y, Z) in the dtype and memory format of ``x``.

    Raises:
        ValueError: if a shape does not fit.
    """
    if x.dim() != 5:
        raise ValueError(f"x has shape {tuple(x.shape)}, expected (B, C, X, Y, Z)")
    channels = x.shape[1]
    if num_groups < 1 or channels % num_groups:
        raise ValueError(f"num_groups is {num_groups}, expected a divisor of the {channels} channels")
    for name, item in (("weight", weight), ("bias", bias)):
        if item is not None and item.shape != (channels,):
            raise ValueError(f"{name} has shape {tuple(item.shape)}, expected {(channels,)}")
    if not use_triton(x) or x.numel() == 0:
        return group_norm_silu_reference(x, num_groups, weight, bias, eps, activation)
    weight, bias = (None if item is None else item.contiguous() for item in (weight, bias))
    x = x.contiguous(memory_format=_memory_format(x))
    return _group_norm(x, num_groups, weight, bias, eps, activation)[0]
