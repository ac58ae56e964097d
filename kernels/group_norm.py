"""Group normalisation and SiLU of 3D feature maps in one pass.

Source: Wu and He, "Group Normalization" (2018), as residual blocks of diffusion U-Nets and VAEs use it.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .backend import triton, use_triton
from .launch import Cost, Workload, config, launch
from .precision import accumulator, at_least_float32, without_autocast
from .registration import register

if triton is not None:
    import triton.language as tl

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

# A feature map is (B, C, S), S = X*Y*Z, with strides: a tile is some positions of some channels. Contiguous
# maps have tiles of few channels and many positions, channels-last ones the reverse: both load whole lines.

if triton is not None:

    @triton.jit
    def _tile(chunk, spatial, channels, stride_c, stride_s, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
        rows = chunk * ROWS + tl.arange(0, ROWS)
        columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
        inside = (rows < spatial)[:, None] & (columns < channels)[None, :]
        offsets = rows.to(tl.int64)[:, None] * stride_s + columns.to(tl.int64)[None, :] * stride_c
        return columns, inside, offsets

    @triton.jit
    def _affine(weight, bias, columns, channels, ACC: tl.constexpr):
        valid = columns < channels
        scale = tl.full(columns.shape, 1.0, ACC)
        shift = tl.zeros(columns.shape, ACC)
        if weight is not None:
            scale = tl.load(weight + columns, mask=valid, other=0.0).to(ACC)
        if bias is not None:
            shift = tl.load(bias + columns, mask=valid, other=0.0).to(ACC)
        return scale, shift

    @triton.jit
    def _normalised(x, mean, rstd, batch, columns, channels, width, groups):
        # width: channels of a group.
        at, valid = batch * groups + columns // width, columns < channels
        factor = tl.load(rstd + at, mask=valid, other=0.0)
        return (x - tl.load(mean + at, mask=valid, other=0.0)[None, :]) * factor[None, :], factor

    @triton.jit
    def _slope(value, ACTIVATION: tl.constexpr):
        # Derivative of SiLU.
        if ACTIVATION:
            gate = tl.sigmoid(value)
            return gate * (1.0 + value * (1.0 - gate))
        return tl.full(value.shape, 1.0, value.dtype)

    @triton.jit
    def group_norm_statistics_kernel(
        x, partial, spatial, channels, stride_b, stride_c, stride_s,
        ROWS: tl.constexpr, COLUMNS: tl.constexpr, STEPS: tl.constexpr, ACC: tl.constexpr,
    ):  # fmt: skip
        # partial (B, chunks, 2, C): mean, and sum of squared differences from it, of a chunk of each channel.
        batch = tl.program_id(2).to(tl.int64)
        x += batch * stride_b
        mean = tl.zeros((COLUMNS,), ACC)
        squares = tl.zeros((COLUMNS,), ACC)
        for step in range(STEPS):
            chunk = tl.program_id(0) * STEPS + step
            columns, inside, offsets = _tile(chunk, spatial, channels, stride_c, stride_s, ROWS, COLUMNS)
            tile = tl.load(x + offsets, mask=inside, other=0.0).to(ACC)
            count = tl.minimum(tl.maximum(spatial - chunk * ROWS, 0), ROWS).to(ACC)
            own = tl.sum(tile, 0) / tl.maximum(count, 1.0)
            centred = tl.where(inside, tile - own[None, :], 0.0)
            # What the sum of the differences keeps of rounding goes back into the mean.
            rest = tl.sum(centred, 0) / tl.maximum(count, 1.0)
            own += rest
            delta = own - mean
            share = count / tl.maximum(step * ROWS + count, 1.0)
            squares += tl.sum(centred * centred, 0) - count * rest * rest
            squares += delta * delta * (step * ROWS * share)
            mean += delta * share
        columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
        out = partial + (batch * tl.num_programs(0) + tl.program_id(0)) * 2 * channels + columns
        tl.store(out, mean, mask=columns < channels)
        tl.store(out + channels, squares, mask=columns < channels)

    @triton.jit
    def group_norm_combine_kernel(
        partial, mean, rstd, chunks, spatial, channels, width, chunk_size, eps,
        BLOCK: tl.constexpr, ACC: tl.constexpr,
    ):  # fmt: skip
        # One program for a group: its chunks' means, then the squares around the mean of all.
        group, batch = tl.program_id(0), tl.program_id(1).to(tl.int64)
        partial += batch * chunks * 2 * channels + group * width
        # Relative to the first chunk's mean, so that a large mean costs no digits.
        base = tl.load(partial)
        total = tl.zeros((BLOCK,), ACC)
        for start in range(0, chunks * width, BLOCK):
            item = start + tl.arange(0, BLOCK)
            chunk = item // width
            at = partial + chunk.to(tl.int64) * 2 * channels + item % width
            own = tl.load(at, mask=chunk < chunks, other=0.0)
            count = tl.minimum(spatial - chunk * chunk_size, chunk_size)
            total += tl.where(chunk < chunks, (own - base) * count, 0.0)
        elements = tl.full((), 1.0, ACC) * spatial * width
        offset = tl.sum(total, 0) / elements
        squares = tl.zeros((BLOCK,), ACC)
        for start in range(0, chunks * width, BLOCK):
            item = start + tl.arange(0, BLOCK)
            chunk = item // width
            at = partial + chunk.to(tl.int64) * 2 * channels + item % width
            delta = tl.load(at, mask=chunk < chunks, other=0.0) - base - offset
            count = tl.minimum(spatial - chunk * chunk_size, chunk_size)
            own = tl.load(at + channels, mask=chunk < chunks, other=0.0)
            squares += tl.where(chunk < chunks, own + delta * delta * count, 0.0)
        out = batch * tl.num_programs(0) + group
        tl.store(mean + out, base + offset)
        tl.store(rstd + out, 1.0 / tl.sqrt(tl.sum(squares, 0) / elements + eps))

    @triton.jit
    def group_norm_apply_kernel(
        x, weight, bias, mean, rstd, y, spatial, channels, width, groups, stride_b, stride_c, stride_s,
        ROWS: tl.constexpr, COLUMNS: tl.constexpr, ACTIVATION: tl.constexpr, ACC: tl.constexpr,
    ):  # fmt: skip
        batch = tl.program_id(2).to(tl.int64)
        columns, inside, offsets = _tile(
            tl.program_id(0), spatial, channels, stride_c, stride_s, ROWS, COLUMNS
        )
        offsets += batch * stride_b
        tile = tl.load(x + offsets, mask=inside, other=0.0).to(ACC)
        scale, shift = _affine(weight, bias, columns, channels, ACC)
        tile, _ = _normalised(tile, mean, rstd, batch, columns, channels, width, groups)
        tile = tile * scale[None, :] + shift[None, :]
        if ACTIVATION:
            tile *= tl.sigmoid(tile)
        tl.store(y + offsets, tile.to(y.dtype.element_ty), mask=inside)

    @triton.jit
    def group_norm_sums_kernel(
        x, weight, bias, mean, rstd, grad_y, partial, spatial, channels, width, groups,
        stride_b, stride_c, stride_s,
        ROWS: tl.constexpr, COLUMNS: tl.constexpr, STEPS: tl.constexpr, ACTIVATION: tl.constexpr,
        ACC: tl.constexpr,
    ):  # fmt: skip
        # partial (B, chunks, 2, C): a chunk's share of each channel's gradient of bias and weight.
        batch = tl.program_id(2).to(tl.int64)
        of_bias = tl.zeros((COLUMNS,), ACC)
        of_weight = tl.zeros((COLUMNS,), ACC)
        for step in range(STEPS):
            chunk = tl.program_id(0) * STEPS + step
            columns, inside, offsets = _tile(chunk, spatial, channels, stride_c, stride_s, ROWS, COLUMNS)
            offsets += batch * stride_b
            unit = tl.load(x + offsets, mask=inside, other=0.0).to(ACC)
            outer = tl.load(grad_y + offsets, mask=inside, other=0.0).to(ACC)
            scale, shift = _affine(weight, bias, columns, channels, ACC)
            unit, _ = _normalised(unit, mean, rstd, batch, columns, channels, width, groups)
            outer *= _slope(unit * scale[None, :] + shift[None, :], ACTIVATION)
            of_bias += tl.sum(outer, 0)
            of_weight += tl.sum(outer * unit, 0)
        columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
        out = partial + (batch * tl.num_programs(0) + tl.program_id(0)) * 2 * channels + columns
        tl.store(out, of_bias, mask=columns < channels)
        tl.store(out + channels, of_weight, mask=columns < channels)

    @triton.jit
    def group_norm_reduce_kernel(
        partial, weight, sums, means, chunks, spatial, channels, width,
        CHUNKS: tl.constexpr, COLUMNS: tl.constexpr, ACC: tl.constexpr,
    ):  # fmt: skip
        # One program for a group adds the chunks in order. sums (2, B, C): of each channel. means (2, B, G):
        # of the gradient that reaches the normalised values, and of its product with them.
        group, batch = tl.program_id(0), tl.program_id(1).to(tl.int64)
        samples, groups = tl.num_programs(1), tl.num_programs(0)
        partial += batch * chunks * 2 * channels
        plain = tl.zeros((COLUMNS,), ACC)
        product = tl.zeros((COLUMNS,), ACC)
        for first in range(0, width, COLUMNS):
            within = first + tl.arange(0, COLUMNS)
            valid = within < width
            columns = group * width + within
            of_bias = tl.zeros((COLUMNS,), ACC)
            of_weight = tl.zeros((COLUMNS,), ACC)
            for start in range(0, chunks, CHUNKS):
                chunk = start + tl.arange(0, CHUNKS)
                at = partial + chunk.to(tl.int64)[:, None] * 2 * channels + columns[None, :]
                inside = (chunk < chunks)[:, None] & valid[None, :]
                of_bias += tl.sum(tl.load(at, mask=inside, other=0.0), 0)
                of_weight += tl.sum(tl.load(at + channels, mask=inside, other=0.0), 0)
            out = sums + batch * channels + columns
            tl.store(out, of_bias, mask=valid)
            tl.store(out + samples * channels, of_weight, mask=valid)
            if weight is not None:
                scale = tl.load(weight + columns, mask=valid, other=0.0).to(ACC)
                of_bias *= scale
                of_weight *= scale
            plain += of_bias
            product += of_weight
        elements = tl.full((), 1.0, ACC) * spatial * width
        out = means + batch * groups + group
        tl.store(out, tl.sum(plain, 0) / elements)
        tl.store(out + samples * groups, tl.sum(product, 0) / elements)

    @triton.jit
    def group_norm_backward_kernel(
        x, weight, bias, mean, rstd, grad_y, means, grad_x, spatial, channels, width, groups,
        stride_b, stride_c, stride_s,
        ROWS: tl.constexpr, COLUMNS: tl.constexpr, ACTIVATION: tl.constexpr, ACC: tl.constexpr,
    ):  # fmt: skip
        batch, samples = tl.program_id(2).to(tl.int64), tl.num_programs(2)
        columns, inside, offsets = _tile(
            tl.program_id(0), spatial, channels, stride_c, stride_s, ROWS, COLUMNS
        )
        offsets += batch * stride_b
        unit = tl.load(x + offsets, mask=inside, other=0.0).to(ACC)
        outer = tl.load(grad_y + offsets, mask=inside, other=0.0).to(ACC)
        scale, shift = _affine(weight, bias, columns, channels, ACC)
        unit, factor = _normalised(unit, mean, rstd, batch, columns, channels, width, groups)
        outer *= _slope(unit * scale[None, :] + shift[None, :], ACTIVATION) * scale[None, :]
        at, valid = means + batch * groups + columns // width, columns < channels
        plain = tl.load(at, mask=valid, other=0.0)
        product = tl.load(at + samples * groups, mask=valid, other=0.0)
        result = (outer - plain[None, :] - unit * product[None, :]) * factor[None, :]
        tl.store(grad_x + offsets, result.to(grad_x.dtype.element_ty), mask=inside)


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
        (partial, mean, rstd, chunks, spatial, channels, width, chunk_size, eps),
        {"BLOCK": options["BLOCK"], "ACC": acc},
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


# 5. Standard workloads


def workloads() -> list[Workload]:
    """A MAISI decoder's widest map and a diffusion U-Net's middle, in both memory formats."""

    def make(batch: int, channels: int, edge: int, last: bool) -> Workload:
        def inputs(device: str, dtype: torch.dtype) -> dict[str, Any]:
            x = torch.randn(batch, channels, edge, edge, edge, device=device, dtype=dtype)
            memory_format = torch.channels_last_3d if last else torch.contiguous_format
            weight, bias = torch.randn(2, channels, device=device, dtype=dtype)
            return {
                "x": x.contiguous(memory_format=memory_format).requires_grad_(),
                "num_groups": 32,
                "weight": weight.clone().requires_grad_(),
                "bias": bias.clone().requires_grad_(),
            }

        def launch_all(x: Tensor, num_groups: int, weight: Tensor, bias: Tensor) -> None:
            y, mean, rstd = _launch_forward(x, num_groups, weight, bias, 1e-5, True)
            _launch_backward(y, x, num_groups, weight, bias, mean, rstd, True)

        def cost(size: int) -> tuple[Cost, Cost]:
            # The kernels read a map twice, since the statistics must come first; a cache may hold it.
            elements = batch * channels * edge**3
            return Cost(2 * elements * size, 12 * elements), Cost(3 * elements * size, 30 * elements)

        return Workload(
            "group_norm_silu",
            f"{batch}x{channels}x{edge}^3{' channels last' if last else ''}",
            inputs,
            group_norm_silu,
            group_norm_silu_reference,
            launch_all,
            cost,
            matrix=False,
        )

    sizes = ((1, 64, 64), (4, 256, 16))
    return [make(*size, last) for size in sizes for last in (False, True)]
