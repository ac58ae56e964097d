"""A fast operation from start to end, to copy to ``kernels/<op>.py``: a tensor times the SiLU of another.

There the imports are relative: ``from .backend import triton, use_triton``.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from meduet_fast.kernels.backend import triton, use_triton
from meduet_fast.kernels.dtypes import accumulator, at_least_float32
from meduet_fast.kernels.launch import config, launch
from meduet_fast.kernels.registration import Derivatives, register

if triton is not None:
    import triton.language as tl

# 1. Reference


def gated_silu_reference(x: Tensor, gate: Tensor) -> Tensor:
    """Define :func:`gated_silu` in plain PyTorch."""
    return (at_least_float32(x) * F.silu(at_least_float32(gate))).to(x.dtype)


# 2. Kernels

if triton is not None:

    @triton.jit
    def gated_silu_forward_kernel(x, gate, out, count, BLOCK: tl.constexpr, ACC: tl.constexpr):
        # x, gate, out (count,), contiguous. Offsets have 64 bits: there may be more than 2^31 elements.
        at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        # To ACC before any arithmetic, see `accumulator`.
        value = tl.load(x + at, mask=at < count, other=0.0).to(ACC)
        open_ = tl.load(gate + at, mask=at < count, other=0.0).to(ACC)
        result = value * open_ / (1 + tl.exp(-open_))
        tl.store(out + at, result.to(out.dtype.element_ty), mask=at < count)

    @triton.jit
    def gated_silu_backward_kernel(
        grad, x, gate, grad_x, grad_gate, count, BLOCK: tl.constexpr, ACC: tl.constexpr
    ):  # fmt: skip
        # All (count,). d silu(g) / dg = s + g s (1 - s) with s = sigmoid(g), computed again.
        at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        incoming = tl.load(grad + at, mask=at < count, other=0.0).to(ACC)
        value = tl.load(x + at, mask=at < count, other=0.0).to(ACC)
        open_ = tl.load(gate + at, mask=at < count, other=0.0).to(ACC)
        sigmoid = 1 / (1 + tl.exp(-open_))
        slope = incoming * value * sigmoid * (1 + open_ * (1 - sigmoid))
        tl.store(grad_x + at, (incoming * open_ * sigmoid).to(grad_x.dtype.element_ty), mask=at < count)
        tl.store(grad_gate + at, slope.to(grad_gate.dtype.element_ty), mask=at < count)


# 3. Registration


class _Inputs(NamedTuple):
    x: Tensor
    gate: Tensor


class _Gradients(NamedTuple):
    grad: Tensor
    x: Tensor
    gate: Tensor


def _launch_forward(inputs: _Inputs) -> Tensor:
    out, count = _fake_forward(inputs), inputs.x.numel()
    options = config("gated_silu_forward", out.device)
    constants = {"BLOCK": options["BLOCK"], "ACC": accumulator(out.dtype)}
    grid = (triton.cdiv(count, options["BLOCK"]),)
    launch(gated_silu_forward_kernel, grid, (*inputs, out, count), constants, options)
    return out


def _fake_forward(inputs: _Inputs) -> Tensor:
    return torch.empty_like(inputs.x)


def _launch_backward(inputs: _Gradients) -> tuple[Tensor, Tensor]:
    (grad_x, grad_gate), count = _fake_backward(inputs), inputs.x.numel()
    options = config("gated_silu_backward", inputs.x.device)
    constants = {"BLOCK": options["BLOCK"], "ACC": accumulator(inputs.x.dtype)}
    grid = (triton.cdiv(count, options["BLOCK"]),)
    arguments = (inputs.grad.contiguous(), inputs.x, inputs.gate, grad_x, grad_gate, count)
    launch(gated_silu_backward_kernel, grid, arguments, constants, options)
    return grad_x, grad_gate


def _fake_backward(inputs: _Gradients) -> tuple[Tensor, Tensor]:
    return torch.empty_like(inputs.x), torch.empty_like(inputs.gate)


def _setup_context(ctx: Any, inputs: _Inputs, output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
    return _gated_silu_backward(grad, *ctx.saved_tensors)


def _recall(ctx: Any, grads: tuple[Tensor, ...]) -> _Inputs:
    # For second derivatives, which come from the definition.
    return _Inputs(*ctx.saved_tensors)


# The schema comes from the inputs' types.
_gated_silu = register(
    "gated_silu", _Inputs, "Tensor", _launch_forward, _fake_forward,
    Derivatives(_setup_context, _backward, _recall, lambda inputs: gated_silu_reference(*inputs)),
)  # fmt: skip
_gated_silu_backward = register(
    "gated_silu_backward", _Gradients, "(Tensor, Tensor)", _launch_backward, _fake_backward
)


# 4. Public function


def gated_silu(x: Tensor, gate: Tensor) -> Tensor:
    """Multiply ``x`` by silu(``gate``), in one pass. Source: Shazeer, arXiv 2002.05202.

    Args:
        x: any shape, float dtype and strides.
        gate: of the same shape and dtype.

    Returns:
        x * gate * sigmoid(gate), in the shape and dtype of ``x``.

    Raises:
        ValueError: if shapes or dtypes differ.
    """
    if x.shape != gate.shape or x.dtype != gate.dtype:
        raise ValueError(
            f"gate is {gate.dtype} {tuple(gate.shape)}, expected {x.dtype} {tuple(x.shape)} as x"
        )
    if not use_triton(x) or x.numel() == 0:
        return gated_silu_reference(x, gate)
    return _gated_silu(x.contiguous(), gate.contiguous())
