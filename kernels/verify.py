"""Hold an operation to its eager definition, without hand-picked tolerances.

The definition is run in float64 and in the inputs' own dtype; the operation may err three times as much as
PyTorch itself does in that dtype, plus as many roundings of the largest value. PyTorch's own error is the
largest of a few on neighbouring inputs: on one alone it may be exact by luck. Tests and benchmarks use this.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
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
        """Return whether the error is allowed; False for NaN too."""
        return self.error <= self.allowed


def _generator(device: torch.device, seed: int) -> torch.Generator | None:
    """Return a source of random numbers on a device; the meta device needs none."""
    return None if device.type == "meta" else torch.Generator(device).manual_seed(seed)


def _floating(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _double(inputs: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: value.detach().double().requires_grad_(value.requires_grad) if _floating(value) else value
        for name, value in inputs.items()
    }


def _neighbour(inputs: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """Return inputs of the same dtypes, each value off by about a rounding."""
    result = dict(inputs)
    floating = {name: value for name, value in inputs.items() if _floating(value)}
    sources = {device: _generator(device, seed) for device in {value.device for value in floating.values()}}
    for name, value in floating.items():
        device = value.device
        noise = torch.rand(value.shape, generator=sources[device], dtype=torch.float64, device=device)
        moved = value.detach().double() * (1 + torch.finfo(value.dtype).eps * (2 * noise - 1))
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
        device = reached[0].device
        source = _generator(device, seed)
        # Rounded, so that the same gradient flows in whatever the dtype of the outputs.
        weights = [
            torch.randn(item.shape, generator=source, device=device).bfloat16().to(item.dtype)
            for item in reached
        ]
        gradients = torch.autograd.grad(reached, list(wanted.values()), weights)
        values.update({f"grad {name}": item for name, item in zip(wanted, gradients, strict=True)})
    return values


def _error(value: Tensor, expected: Tensor) -> float:
    """Return the largest absolute difference; 0 for empty tensors."""
    return (value.double() - expected).abs().max().item() if expected.numel() else 0.0


class Expected(NamedTuple):
    """What an output or gradient must be.

    Attributes:
        value: the definition's in float64.
        dtype: the definition's in the inputs' own dtype.
        allowed: the largest absolute difference that passes.
    """

    value: Tensor
    dtype: torch.dtype
    allowed: float


def expect(
    reference: Callable[..., Any], inputs: Mapping[str, Any], seed: int = 0, neighbours: int = NEIGHBOURS
) -> dict[str, Expected]:
    """Compute what an operation must give, by name.

    Args:
        reference: the eager definition.
        inputs: keyword arguments in the dtype to be tested.
        seed: of the gradient that flows in.
        neighbours: inputs nearby on which PyTorch's own error is measured, too.
    """
    truth = outputs_and_gradients(reference, _double(inputs), seed)
    eager = outputs_and_gradients(reference, inputs, seed)
    own = {name: _error(eager[name], value) for name, value in truth.items()}
    for number in range(neighbours):
        near = _neighbour(inputs, number)
        again = outputs_and_gradients(reference, near, seed)
        for name, value in outputs_and_gradients(reference, _double(near), seed).items():
            own[name] = max(own[name], _error(again[name], value))
    expected = {}
    for name, value in truth.items():
        dtype, scale = eager[name].dtype, value.abs().max().item() if value.numel() else 0.0
        if not dtype.is_floating_point:
            allowed = 0.0
        elif dtype == torch.float64:
            allowed = FLOAT64_TOLERANCE * max(scale, 1.0)
        else:
            allowed = FACTOR * (own[name] + torch.finfo(dtype).eps * scale)
        expected[name] = Expected(value, dtype, allowed)
    return expected


def compare_to(
    run: Callable[..., Any], expected: Mapping[str, Expected], inputs: Mapping[str, Any], seed: int = 0
) -> list[Comparison]:
    """Compare an operation with what :func:`expect` found for the same inputs and seed.

    Raises:
        AssertionError: for another shape or dtype.
    """
    tested = outputs_and_gradients(run, inputs, seed)
    comparisons = []
    for name, (value, dtype, allowed) in expected.items():
        found = tested[name]
        if found.shape != value.shape or found.dtype != dtype:
            raise AssertionError(
                f"{name} is {found.dtype} {tuple(found.shape)}, expected {dtype} {tuple(value.shape)}"
            )
        if value.numel():
            comparisons.append(Comparison(name, _error(found, value), allowed))
    return comparisons


def refuse(comparisons: Sequence[Comparison]) -> None:
    """Raise an AssertionError that names every output and gradient that errs too much, if one does."""
    wrong = [item for item in comparisons if not item.passed]
    if wrong:
        raise AssertionError(
            "; ".join(f"{item.name} is off by {item.error:.3g}, allowed {item.allowed:.3g}" for item in wrong)
        )


def require(
    run: Callable[..., Any], reference: Callable[..., Any], inputs: Mapping[str, Any], seed: int = 0
) -> None:
    """Compare an operation with its definition, forward and backward, and refuse it if it errs too much.

    Args:
        run: the operation.
        reference: its eager definition, called alike.
        inputs: keyword arguments in the dtype to be tested.
        seed: of the gradient that flows in.

    Raises:
        AssertionError: naming every output and gradient that errs too much.
    """
    refuse(compare_to(run, expect(reference, inputs, seed), inputs, seed))
