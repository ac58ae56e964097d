"""Group normalisation and SiLU of 3D feature maps in one pass.

Sources: Wu and He, "Group Normalization" (2018), as residual blocks of diffusion U-Nets and VAEs use it;
Dhariwal and Nichol, "Diffusion Models Beat GANs on Image Synthesis" (2021), for scale and shift by sample.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .backend import transformed, triton, use_triton
from .dtypes import accumulator, at_least_float32, check_float, without_autocast
from .launch import Options, config, launch
from .registration import Derivatives, register

# 1. Reference


def group_norm_silu_reference(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    activation: bool = True,
) -> Tensor:
    """Compute :func:`group_norm_silu` in plain PyTorch: its definition."""
    wide = at_least_float32(x)  # (B, C, X, Y, Z)
    # Within vmap a tensor can't say how it lies in memory; PyTorch's tangents want it contiguous.
    wide = wide.contiguous() if transformed() else wide
    weight, bias = (None if item is None else item.to(wide.dtype) for item in (weight, bias))
    with without_autocast(x.device):
        # PyTorch has no rows by sample, and no gradient of a bias without weight.
        bias_alone = weight is None and bias is not None
        if bias_alone or _per_sample(weight) or _per_sample(bias):
            y = F.group_norm(wide, num_groups, eps=eps)
            rows = (-1, wide.shape[1], 1, 1, 1)  # (1, C, 1, 1, 1) or (B, C, 1, 1, 1)
            y = y if weight is None else y * weight.reshape(rows)
            y = y if bias is None else y + bias.reshape(rows)
        else:
            y = F.group_norm(wide, num_groups, weight, bias, eps)
        y = F.silu(y) if activation else y
    y = y.to(x.dtype)
    return y if transformed() else y.contiguous(memory_format=_memory_format(x))


def _per_sample(factors: Tensor | None) -> bool:
    """Tell whether weight or bias is (B, C), not (C,)."""
    return factors is not None and factors.dim() == 2


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


class _Norm(NamedTuple):
    x: Tensor  # (B, C, X, Y, Z), contiguous or channels last
    num_groups: int
    weight: Tensor | None  # (C,) or (B, C), with stride 1 along C
    bias: Tensor | None  # as weight, by itself
    eps: float
    activation: bool


class _Gradients(NamedTuple):
    grad_y: Tensor  # (B, C, X, Y, Z)
    x: Tensor  # (B, C, X, Y, Z)
    num_groups: int
    weight: Tensor | None  # (C,) or (B, C), with stride 1 along C
    bias: Tensor | None  # as weight, by itself
    mean: Tensor  # (B, G)
    rstd: Tensor  # (B, G)
    activation: bool


def _memory_format(x: Tensor) -> torch.memory_format:
    """Return contiguous, or channels last where that is what ``x`` is."""
    last = not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last_3d)
    return torch.channels_last_3d if last else torch.contiguous_format


def _like(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=_memory_format(x))


def _sample_stride(factors: Tensor | None) -> int | None:
    """Return how far the rows of (B, C) lie apart; None for the one row of all samples."""
    return factors.stride(0) if factors is not None and factors.dim() == 2 else None


def _tiles(
    x: Tensor, name: str, stepped: bool = False
) -> tuple[tuple[int, int, int], tuple[int, int, int], dict[str, Any], Options]:
    """Compute grid (blocks of positions, of channels, samples), strides of (B, C, S), constants, options."""
    batch, channels, spatial, options = *x.shape[:2], x[0, 0].numel(), config(name, x.device)
    if _memory_format(x) == torch.channels_last_3d:
        columns = min(triton.next_power_of_2(channels), options["COLUMNS"])
        rows, strides = options["TILE"] // columns, (channels * spatial, 1, channels)
    else:
        rows = min(triton.next_power_of_2(spatial), options["TILE"])
        columns = min(triton.next_power_of_2(channels), options["TILE"] // rows)
        strides = (channels * spatial, spatial, 1)
    constants: dict[str, Any] = {"ROWS": rows, "COLUMNS": columns, "ACC": accumulator(x.dtype)}
    if stepped:
        constants["STEPS"] = options["STEPS"]
    chunks = triton.cdiv(spatial, rows * constants.get("STEPS", 1))
    return (chunks, triton.cdiv(channels, columns), batch), strides, constants, options


def _fake_norm(x: _Norm) -> tuple[Tensor, Tensor, Tensor]:
    dtype = torch.promote_types(x.x.dtype, torch.float32)
    mean, rstd = (x.x.new_empty((x.x.shape[0], x.num_groups), dtype=dtype) for _ in range(2))
    return _like(x.x), mean, rstd


def _launch_norm(x: _Norm) -> tuple[Tensor, Tensor, Tensor]:
    batch, channels = x.x.shape[:2]
    sizes = (x.x[0, 0].numel(), channels, channels // x.num_groups)  # S, C, channels of a group
    y, mean, rstd = _fake_norm(x)  # (B, C, X, Y, Z), (B, G), (B, G)

    grid, strides, constants, options = _tiles(x.x, "group_norm_statistics", stepped=True)
    chunks = grid[0]
    partial = mean.new_empty(batch, chunks, 2, channels)
    arguments: tuple[Any, ...] = (x.x, partial, *sizes[:2], *strides)
    launch(group_norm_statistics_kernel, grid, arguments, constants, options)

    chunk_size = constants["ROWS"] * constants["STEPS"]
    options = config("group_norm_combine", x.x.device)
    arguments = (partial, mean, rstd, chunks, *sizes, chunk_size)
    constants = {"BLOCK": options["BLOCK"], "EPS": x.eps, "ACC": constants["ACC"]}
    launch(group_norm_combine_kernel, (x.num_groups, batch), arguments, constants, options)

    weight_b, bias_b = _sample_stride(x.weight), _sample_stride(x.bias)
    grid, strides, constants, options = _tiles(x.x, "group_norm_apply")
    arguments = (x.x, x.weight, x.bias, weight_b, bias_b, mean, rstd, y, *sizes, x.num_groups, *strides)
    constants["ACTIVATION"] = x.activation
    launch(group_norm_apply_kernel, grid, arguments, constants, options)
    return y, mean, rstd


def _fake_gradients(x: _Gradients) -> tuple[Tensor, Tensor, Tensor]:
    batch, channels = x.x.shape[:2]
    grad_weight, grad_bias = (
        x.mean.new_empty((batch, channels) if _per_sample(item) else (channels,))
        for item in (x.weight, x.bias)
    )
    return _like(x.x), grad_weight, grad_bias


def _launch_gradients(x: _Gradients) -> tuple[Tensor, Tensor, Tensor]:
    (batch, channels), groups = x.x.shape[:2], x.num_groups
    sizes = (x.x[0, 0].numel(), channels, channels // groups)  # S, C, channels of a group
    grad_y = x.grad_y.contiguous(memory_format=_memory_format(x.x))  # (B, C, X, Y, Z)
    grad_x = _like(x.x)  # (B, C, X, Y, Z)
    grad_weight, grad_bias = (x.mean.new_empty(batch, channels) for _ in range(2))
    means = x.mean.new_empty(2, batch, groups)
    weight_b, bias_b = _sample_stride(x.weight), _sample_stride(x.bias)
    known = (x.x, x.weight, x.bias, weight_b, bias_b, x.mean, x.rstd, grad_y)

    grid, strides, constants, options = _tiles(x.x, "group_norm_sums", stepped=True)
    chunks = grid[0]
    partial = x.mean.new_empty(batch, chunks, 2, channels)
    arguments: tuple[Any, ...] = (*known, partial, *sizes, groups, *strides)
    constants["ACTIVATION"] = x.activation
    launch(group_norm_sums_kernel, grid, arguments, constants, options)

    options = config("group_norm_reduce", x.x.device)
    columns = min(triton.next_power_of_2(sizes[2]), options["COLUMNS"])
    arguments = (partial, x.weight, weight_b, grad_weight, grad_bias, means, chunks, *sizes)
    constants = {"CHUNKS": options["TILE"] // columns, "COLUMNS": columns, "ACC": constants["ACC"]}
    launch(group_norm_reduce_kernel, (groups, batch), arguments, constants, options)

    grid, strides, constants, options = _tiles(x.x, "group_norm_backward")
    arguments = (*known, means, grad_x, *sizes, groups, *strides)
    constants["ACTIVATION"] = x.activation
    launch(group_norm_backward_kernel, grid, arguments, constants, options)
    grad_weight = grad_weight if _per_sample(x.weight) else grad_weight.sum(0)
    grad_bias = grad_bias if _per_sample(x.bias) else grad_bias.sum(0)
    return grad_x, grad_weight, grad_bias


def _setup_context(ctx: Any, x: _Norm, output: tuple[Tensor, Tensor, Tensor]) -> None:
    _, mean, rstd = output
    ctx.num_groups, ctx.eps, ctx.activation = x.num_groups, x.eps, x.activation
    ctx.save_for_backward(x.x, x.weight, x.bias, mean, rstd)
    ctx.mark_non_differentiable(mean, rstd)


def _backward(ctx: Any, grad_y: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, bias, *statistics = ctx.saved_tensors
    grad_x, grad_weight, grad_bias = _group_norm_backward(
        grad_y, x, ctx.num_groups, weight, bias, *statistics, ctx.activation
    )
    grad_weight = None if weight is None else grad_weight.to(weight.dtype)
    return grad_x, None, grad_weight, None if bias is None else grad_bias.to(bias.dtype), None, None


def _recall(ctx: Any, _: tuple[Tensor, ...]) -> _Norm:
    x, weight, bias, *_ = ctx.saved_tensors
    return _Norm(x, ctx.num_groups, weight, bias, ctx.eps, ctx.activation)


_group_norm = register(
    "group_norm_silu", _Norm, "(Tensor, Tensor, Tensor)", _launch_norm, _fake_norm,
    Derivatives(_setup_context, _backward, _recall, lambda x: group_norm_silu_reference(*x)),
)  # fmt: skip
_group_norm_backward = register(
    "group_norm_silu_backward", _Gradients, "(Tensor, Tensor, Tensor)", _launch_gradients, _fake_gradients
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
    """Compute GroupNorm and SiLU of a 3D feature map: two reads and one write.

    With a weight and bias for each sample it is the adaptive norm of diffusion U-Nets: ``weight`` is one plus
    the scale that the conditions give, ``bias`` the shift.
    Statistics are sums of squares around means, never differences of squares: a large mean costs no digits.
    Under autocast, too, the result has the dtype of ``x``; it is computed in at least float32.

    Args:
        x: (B, C, X, Y, Z), any float dtype; read in place if contiguous or channels last
            (``torch.channels_last_3d``), made contiguous otherwise.
        num_groups: groups of neighbouring channels; divides C.
        weight, bias: (C,), or (B, C) with a row for each sample, or None for 1 and 0; any float dtype. Rows
            are read where they lie, so they may be halves of one projection.
        eps: added to the variance.
        activation: False leaves the SiLU out.

    Returns:
        (B, C, X, Y, Z) in the dtype and memory format of ``x``.

    Raises:
        ValueError: if a shape does not fit, or x is not of a float dtype.
    """
    if x.dim() != 5:
        raise ValueError(f"x has shape {tuple(x.shape)}, expected (B, C, X, Y, Z)")
    check_float("x", x)
    batch, channels = x.shape[:2]
    if num_groups < 1 or channels % num_groups:
        raise ValueError(f"num_groups is {num_groups}, expected a divisor of the {channels} channels")
    for name, item in (("weight", weight), ("bias", bias)):
        if item is not None and item.shape not in ((channels,), (batch, channels)):
            raise ValueError(
                f"{name} has shape {tuple(item.shape)}, expected {(channels,)} or {(batch, channels)}"
            )
    if not use_triton(x) or x.numel() == 0:
        return group_norm_silu_reference(x, num_groups, weight, bias, eps, activation)
    weight, bias = (
        item if item is None or item.stride(-1) == 1 else item.contiguous() for item in (weight, bias)
    )
    x = x.contiguous(memory_format=_memory_format(x))
    return _group_norm(x, num_groups, weight, bias, eps, activation)[0]
