"""The reconstruction loss of the two demixed streams. Source: MeDUET section "Losses", rec."""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from .backend import triton, use_triton
from .dtypes import accumulator, at_least_float32, check_float
from .launch import Options, config, launch
from .mix_index import packed
from .patchify import Triple, patch_grid, patchify_3d, triple
from .registration import Derivatives, register

if triton is not None:
    import triton.language as tl

Pairing = Literal["source", "reference"]
PAIRINGS: tuple[Pairing, ...] = ("source", "reference")

# 1. Reference


def dual_reconstruction_loss_reference(
    prediction: Tensor, target: Tensor, mask: Tensor, patch_size: int | Triple, pairing: Pairing = "source"
) -> Tensor:
    """Compute :func:`dual_reconstruction_loss` in plain PyTorch: its definition."""
    first, second = at_least_float32(prediction).chunk(2)  # (B, L, p^3*C) each
    truth, hidden = patchify_3d(target, patch_size).to(first.dtype), mask.to(first.dtype)  # .., (B, L)
    error_first = (first - truth).square().mean(-1)  # (B, L)
    error_second = (second.flip(0) - truth).square().mean(-1)  # (B, L)
    hidden_second = 1 - (hidden.flip(0) if pairing == "source" else hidden)  # (B, L)
    return (error_first * hidden + error_second * hidden_second).mean()  # ()


# 2. Kernels

if triton is not None:

    @triton.jit
    def _supervised(mask, batch, samples, tokens, length, REFERENCE: tl.constexpr):
        # Which tokens of sample `batch` streams 1 and 2 are to predict.
        inside = tokens < length
        first = tl.load(mask + batch * length + tokens, mask=inside, other=0)
        if REFERENCE:
            return first != 0, (first == 0) & inside
        second = tl.load(mask + (samples - 1 - batch) * length + tokens, mask=inside, other=1)
        return first != 0, (second == 0) & inside

    @triton.jit
    def _differences(
        prediction, target, tokens, columns, first, second, batch, samples, grid_y, grid_z, width,
        stride_b, stride_l, stride_d, target_b, target_c, target_x, target_y, target_z,
        CHANNELS: tl.constexpr, PX: tl.constexpr, PY: tl.constexpr, PZ: tl.constexpr, ACC: tl.constexpr,
    ):  # fmt: skip
        # Prediction minus target of both streams, zero where a token is not supervised. Nothing else is read.
        inside = (columns < width)[None, :]
        channel, cell = columns % CHANNELS, columns // CHANNELS
        within = (
            (cell // (PY * PZ)).to(tl.int64) * target_x
            + (cell // PZ % PY).to(tl.int64) * target_y
            + (cell % PZ).to(tl.int64) * target_z
            + channel.to(tl.int64) * target_c
        )
        corner = (
            (tokens // (grid_y * grid_z) * PX).to(tl.int64) * target_x
            + (tokens // grid_z % grid_y * PY).to(tl.int64) * target_y
            + (tokens % grid_z * PZ).to(tl.int64) * target_z
        )
        truth = tl.load(
            target + batch * target_b + corner[:, None] + within[None, :],
            mask=(first | second)[:, None] & inside, other=0.0,
        ).to(ACC)  # fmt: skip
        offsets = tokens.to(tl.int64)[:, None] * stride_l + columns.to(tl.int64)[None, :] * stride_d
        shown = first[:, None] & inside
        one = tl.load(prediction + batch * stride_b + offsets, mask=shown, other=0.0).to(ACC)
        one = tl.where(shown, one - truth, 0.0)
        shown = second[:, None] & inside
        row = 2 * samples - 1 - batch
        two = tl.load(prediction + row * stride_b + offsets, mask=shown, other=0.0).to(ACC)
        return one, tl.where(shown, two - truth, 0.0)

    @triton.jit
    def reconstruction_forward_kernel(
        prediction, target, mask, partial, length, width, grid_y, grid_z,
        stride_b, stride_l, stride_d, target_b, target_c, target_x, target_y, target_z,
        CHANNELS: tl.constexpr, PX: tl.constexpr, PY: tl.constexpr, PZ: tl.constexpr, REFERENCE: tl.constexpr,
        TOKENS: tl.constexpr, COLUMNS: tl.constexpr, ACC: tl.constexpr,
    ):  # fmt: skip
        # partial (B, blocks): squared errors of a block of tokens, both streams, as a share of the mean.
        samples, batch = tl.num_programs(1).to(tl.int64), tl.program_id(1).to(tl.int64)
        tokens = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
        first, second = _supervised(mask, batch, samples, tokens, length, REFERENCE)
        total = tl.zeros((TOKENS, COLUMNS), ACC)
        for start in range(0, width, COLUMNS):
            columns = start + tl.arange(0, COLUMNS)
            one, two = _differences(
                prediction, target, tokens, columns, first, second, batch, samples, grid_y, grid_z, width,
                stride_b, stride_l, stride_d, target_b, target_c, target_x, target_y, target_z,
                CHANNELS, PX, PY, PZ, ACC,
            )  # fmt: skip
            total += one * one + two * two
        count = samples.to(ACC) * length * width
        out = partial + batch * tl.num_programs(0) + tl.program_id(0)
        tl.store(out, tl.sum(tl.sum(total, 1), 0) / count)

    @triton.jit
    def reconstruction_backward_kernel(
        prediction, target, mask, grad_loss, grad_prediction, length, width, grid_y, grid_z,
        stride_b, stride_l, stride_d, target_b, target_c, target_x, target_y, target_z,
        CHANNELS: tl.constexpr, PX: tl.constexpr, PY: tl.constexpr, PZ: tl.constexpr, REFERENCE: tl.constexpr,
        TOKENS: tl.constexpr, COLUMNS: tl.constexpr, ACC: tl.constexpr,
    ):  # fmt: skip
        samples, batch = tl.num_programs(1).to(tl.int64), tl.program_id(1).to(tl.int64)
        tokens = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
        columns = tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)
        first, second = _supervised(mask, batch, samples, tokens, length, REFERENCE)
        one, two = _differences(
            prediction, target, tokens, columns, first, second, batch, samples, grid_y, grid_z, width,
            stride_b, stride_l, stride_d, target_b, target_c, target_x, target_y, target_z,
            CHANNELS, PX, PY, PZ, ACC,
        )  # fmt: skip
        slope = 2.0 * tl.load(grad_loss).to(ACC) / (samples.to(ACC) * length * width)
        inside = (tokens < length)[:, None] & (columns < width)[None, :]
        offsets = tokens.to(tl.int64)[:, None] * width + columns[None, :]
        element = grad_prediction.dtype.element_ty
        tl.store(grad_prediction + batch * length * width + offsets, (slope * one).to(element), mask=inside)
        row = 2 * samples - 1 - batch
        tl.store(grad_prediction + row * length * width + offsets, (slope * two).to(element), mask=inside)


# 3. Registration


class _Loss(NamedTuple):
    prediction: Tensor  # (2B, L, p^3*C)
    target: Tensor  # (B, C, X, Y, Z)
    mask: Tensor  # (B, L) uint8
    patch: list[int]
    reference: bool


class _Gradient(NamedTuple):
    grad_loss: Tensor  # ()
    prediction: Tensor  # (2B, L, p^3*C)
    target: Tensor  # (B, C, X, Y, Z)
    mask: Tensor  # (B, L) uint8
    patch: list[int]
    reference: bool


def _shared(
    x: _Loss | _Gradient, options: Options
) -> tuple[tuple[int, ...], tuple[int, ...], dict[str, Any]]:
    """Compute the grid (blocks of tokens, samples, blocks of columns), sizes with strides, and constants."""
    _, length, width = x.prediction.shape
    columns = min(triton.next_power_of_2(width), options["COLUMNS"])
    tokens = max(1, min(triton.next_power_of_2(length), options["TILE"] // columns))
    px, py, pz = x.patch
    _, grid_y, grid_z = patch_grid(x.target.shape, (px, py, pz))
    constants = {
        "CHANNELS": x.target.shape[1], "PX": px, "PY": py, "PZ": pz, "REFERENCE": x.reference,
        "TOKENS": tokens, "COLUMNS": columns, "ACC": accumulator(x.prediction.dtype),
    }  # fmt: skip
    grid = (triton.cdiv(length, tokens), x.target.shape[0], triton.cdiv(width, columns))
    return grid, (length, width, grid_y, grid_z, *x.prediction.stride(), *x.target.stride()), constants


def _fake_loss(x: _Loss) -> Tensor:
    return x.prediction.new_empty((), dtype=torch.promote_types(x.prediction.dtype, torch.float32))


def _launch_loss(x: _Loss) -> Tensor:
    options = config("reconstruction_forward", x.prediction.device)
    (blocks, samples, _), sizes, constants = _shared(x, options)
    precise = torch.promote_types(x.prediction.dtype, torch.float32)
    partial = x.prediction.new_empty(samples, blocks, dtype=precise)  # (B, blocks)
    arguments = (x.prediction, x.target, x.mask, partial, *sizes)
    launch(reconstruction_forward_kernel, (blocks, samples), arguments, constants, options)
    return partial.sum()


def _fake_gradient(x: _Gradient) -> Tensor:
    return torch.empty_like(x.prediction, memory_format=torch.contiguous_format)


def _launch_gradient(x: _Gradient) -> Tensor:
    grad_prediction = _fake_gradient(x)  # (2B, L, p^3*C)
    options = config("reconstruction_backward", x.prediction.device)
    grid, sizes, constants = _shared(x, options)
    arguments = (x.prediction, x.target, x.mask, x.grad_loss, grad_prediction, *sizes)
    launch(reconstruction_backward_kernel, grid, arguments, constants, options)
    return grad_prediction


def _setup_context(ctx: Any, x: _Loss, output: Tensor) -> None:
    ctx.patch, ctx.reference = x.patch, x.reference
    ctx.save_for_backward(x.prediction, x.target, x.mask)


def _backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor, None, None, None, None]:
    grad = _reconstruction_backward(grad_loss, *ctx.saved_tensors, ctx.patch, ctx.reference)
    return grad, None, None, None, None


def _recall(ctx: Any, _: tuple[Tensor, ...]) -> _Loss:
    prediction, target, mask = ctx.saved_tensors
    return _Loss(prediction, target, mask, ctx.patch, ctx.reference)


def _define_loss(x: _Loss) -> Tensor:
    (p, q, r), pairing = x.patch, PAIRINGS[x.reference]
    return dual_reconstruction_loss_reference(x.prediction, x.target, x.mask, (p, q, r), pairing)


_reconstruction = register(
    "dual_reconstruction_loss", _Loss, "Tensor", _launch_loss, _fake_loss,
    Derivatives(_setup_context, _backward, _recall, _define_loss),
)  # fmt: skip
_reconstruction_backward = register(
    "dual_reconstruction_loss_backward", _Gradient, "Tensor", _launch_gradient, _fake_gradient
)


# 4. Public function


def dual_reconstruction_loss(
    prediction: Tensor, target: Tensor, mask: Tensor, patch_size: int | Triple, pairing: Pairing = "source"
) -> Tensor:
    """Compute the mean squared error of hidden tokens against the patchified volume.

    Stream 1 of row i predicts sample i where mask_i is 1. Stream 2 of row B-1-i predicts sample i too; its
    hidden tokens are those where mask_{B-1-i} is 0. The kernels read the supervised tokens alone, once, and
    cut the volume into patches while they load it.

    Args:
        prediction: (2B, L, p^3*C), stream 1 rows first, tokens in (px, py, pz, c) order, any float dtype.
        target: (B, C, X, Y, Z), any float dtype and strides. If it requires a gradient, plain PyTorch runs.
        mask: (B, L) of 0 and 1, any dtype.
        patch_size: patch edge, or one for each axis.
        pairing: "source" supervises each stream exactly where it was hidden. "reference" reproduces the
            published code, which weights the second term by 1 - mask_i instead.

    Returns:
        Scalar: squared errors summed over the supervised tokens, divided by B*L*p^3*C. At least float32.

    Raises:
        ValueError: if a shape or the prediction's dtype does not fit, or for an unknown pairing.
    """
    if target.dim() != 5:
        raise ValueError(f"target has shape {tuple(target.shape)}, expected (B, C, X, Y, Z)")
    check_float("prediction", prediction)
    patch = list(triple(patch_size))
    batch, length = target.shape[0], math.prod(patch_grid(target.shape, patch_size))
    expected = (2 * batch, length, target.shape[1] * math.prod(patch))
    if prediction.shape != expected:
        raise ValueError(
            f"prediction has shape {tuple(prediction.shape)}, expected {expected} for this target"
        )
    if mask.shape != (batch, length):
        raise ValueError(f"mask has shape {tuple(mask.shape)}, expected {(batch, length)}")
    if pairing not in PAIRINGS:
        raise ValueError(f"pairing is {pairing!r}, expected 'source' or 'reference'")
    if not use_triton(prediction) or prediction.numel() == 0 or target.requires_grad:
        return dual_reconstruction_loss_reference(prediction, target, mask, patch_size, pairing)
    return _reconstruction(prediction, target, packed(mask), patch, pairing == "reference")
