"""Hold an operation to its eager definition, without hand-picked tolerances.

The definition is run in float64 and in the inputs' own dtype; the operation may err three times as much as
PyTorch itself does in that dtype, plus as many roundings of the largest value. PyTorch's own error is the
largest of a few on neighbouring inputs: on one alone it may be exact by luck. Tests and benchmarks use this.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

FACTOR = 3.0
NEIGHBOURS = 7
# In float64 there is nothing more precise to measure PyTorch's own error against.
FLOAT64_TOLERANCE = 1e-12


class Comparison(NamedTuple):
    """One output or gradient.

    Attributes:
        name: ``output 0``, ``grad x``.
        error: largest absolute difference from the float64 definition.
        allowed: the largest that passes.
    """

    name: str
    error: float
    allowed: float

    @property
    def passed(self) -> bool:
        """False for NaN too."""
        return self.error <= self.allowed


def _floating(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _double(inputs: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: value.detach().double().requires_grad_(value.requires_grad) if _floating(value) else value
        for name, value in inputs.items()
    }


def _neighbour(inputs: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """Inputs of the same dtypes, each value off by about a rounding."""
    generator = torch.Generator().manual_seed(seed)
    result = dict(inputs)
    for name, value in inputs.items():
        if _floating(value):
            noise = 2 * torch.rand(value.shape, generator=generator, dtype=torch.float64) - 1
            moved = value.detach().double() * (1 + torch.finfo(value.dtype).eps * noise.to(value.device))
            result[name] = moved.to(value.dtype).requires_grad_(value.requires_grad)
    return result


def outputs_and_gradients(
    function: Callable[..., Any], inputs: Mapping[str, Any], seed: int = 0
) -> dict[str, Tensor]:
    """Call a function and differentiate a random projection of its outputs.

    Args:
        function: takes ``inputs``, returns a tensor or a tuple of them.
        inputs: keyword arguments; floating-point tensors that require a gradient get one.
        seed: of the projection, which is the same for outputs of the same shape.

    Returns:
        ``output N`` and ``grad NAME``, detached.
    """
    result = function(**inputs)
    outputs = [result] if isinstance(result, Tensor) else list(result)
    values = {f"output {position}": output.detach() for position, output in enumerate(outputs)}
    wanted = {name: value for name, value in inputs.items() if _floating(value) and value.requires_grad}
    reached = [output for output in outputs if output.requires_grad]
    if wanted and reached:
        generator = torch.Generator().manual_seed(seed)
        # Rounded, so that the same gradient flows in whatever the dtype of the outputs.
        weights = [torch.randn(item.shape, generator=generator).bfloat16() for item in reached]
        gradients = torch.autograd.grad(
            reached,
            list(wanted.values()),
            [weight.to(item.device, item.dtype) for weight, item in zip(weights, reached, strict=True)],
        )
        values.update({f"grad {name}": item for name, item in zip(wanted, gradients, strict=True)})
    return values


def _error(value: Tensor, expected: Tensor) -> float:
    """Largest absolute difference; 0 for empty tensors."""
    return (value.double() - expected).abs().max().item() if expected.numel() else 0.0


def compare(
    run: Callable[..., Any], reference: Callable[..., Any], inputs: Mapping[str, Any], seed: int = 0
) -> list[Comparison]:
    """Compare an operation with its definition on the same inputs, forward and backward.

    Args:
        run: the operation.
        reference: its eager definition, called alike.
        inputs: keyword arguments in the dtype to be tested.
        seed: of the gradient that flows in.
    """
    truth = outputs_and_gradients(reference, _double(inputs), seed)
    eager = outputs_and_gradients(reference, inputs, seed)
    own = {name: _error(eager[name], expected) for name, expected in truth.items()}
    for number in range(NEIGHBOURS):
        near = _neighbour(inputs, number)
        again = outputs_and_gradients(reference, near, seed)
        for name, expected in outputs_and_gradients(reference, _double(near), seed).items():
            own[name] = max(own[name], _error(again[name], expected))
    tested = outputs_and_gradients(run, inputs, seed)
    comparisons = []
    for name, expected in truth.items():
        value = tested[name]
        if value.shape != expected.shape or value.dtype != eager[name].dtype:
            raise AssertionError(
                f"{name} is {value.dtype} {tuple(value.shape)}, "
                f"expected {eager[name].dtype} {tuple(expected.shape)}"
            )
        if expected.numel() == 0:
            continue
        scale = expected.abs().max().item()
        if not value.is_floating_point():
            allowed = 0.0
        elif value.dtype == torch.float64:
            allowed = FLOAT64_TOLERANCE * max(scale, 1.0)
        else:
            allowed = FACTOR * (own[name] + torch.finfo(value.dtype).eps * scale)
        comparisons.append(Comparison(name, _error(value, expected), allowed))
    return comparisons


def require(
    run: Callable[..., Any], reference: Callable[..., Any], inputs: Mapping[str, Any], seed: int = 0
) -> None:
    """:func:`compare`, and refuse.

    Raises:
        AssertionError: naming every output and gradient that errs too much.
    """
    wrong = [item for item in compare(run, reference, inputs, seed) if not item.passed]
    if wrong:
        raise AssertionError(
            "; ".join(f"{item.name} is off by {item.error:.3g}, allowed {item.allowed:.3g}" for item in wrong)
        )
