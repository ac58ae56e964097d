"""Derivatives that kernels do not compute: of every operation they are those of its eager definition."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vmap

from meduet_fast.kernels import set_kernel_backend, supervised_contrast, workloads
from meduet_fast.layers import accelerate

WORKLOADS = [
    workloads.quadruplet_workload(8, 16, 3, "style"),
    workloads.supervised_workload(8, 16, 3, itself=True),
    workloads.streams_workload(2, 4, 3),
    workloads.group_norm_workload(2, 4, 2, last=False),
    workloads.group_norm_workload(2, 4, 2, last=True),
    *workloads.mixing_workloads(2, 6, 3),
    workloads.style_workload(2, 6, 3, mixed=True),
    workloads.style_workload(2, 6, 3, mixed=False),
    workloads.pool_workload(2, 6, 3, masked=True),
    workloads.pool_workload(2, 6, 3, masked=False),
    workloads.reconstruction_workload(2, 1, 4, 2),
    workloads.reconstruction_workload(2, 1, 4, 2, "reference"),
    workloads.volume_workload(2, 1, (4, 2, 2), 2, masked=True, width=3, differentiate=True),
    workloads.volume_workload(2, 2, (2, 2, 4), 2, last=True, width=3, differentiate=True),
    workloads.token_workload(2, 3, 1, 2, width=3),
    workloads.group_norm_workload(2, 4, 2, last=False, adaptive=True),
    workloads.group_norm_workload(2, 4, 2, last=True, adaptive=True),
]
Function = Callable[..., tuple[Tensor, ...]]
Values = tuple[Tensor, ...]


def random_like(values: Values) -> Values:
    """Draw values of the same shapes, which do not depend on how those lie in memory."""
    return tuple(torch.randn(value.shape, dtype=value.dtype) for value in values)


def scalar(function: Function) -> Callable[..., Tensor]:
    return lambda *values: torch.stack([y.square().mean() for y in function(*values)]).sum()


def everything(values: Values) -> tuple[int, ...]:
    return tuple(range(len(values)))


def forward_mode(function: Function, values: Values) -> Any:
    return jvp(function, values, random_like(values))[1]


def dual_numbers(function: Function, values: Values) -> Any:
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(*pair) for pair in zip(values, random_like(values), strict=True)]
        return [forward_ad.unpack_dual(y).tangent for y in function(*duals)]


def of_the_backward_pass(function: Function, values: Values) -> Any:
    """Kernels compute outputs, plain PyTorch gradients that are differentiated or come in batches."""
    leaves = [value.clone().requires_grad_() for value in values]
    outputs = function(*leaves)
    weights = [weight.requires_grad_() for weight in random_like(outputs)]
    first = torch.autograd.grad(outputs, leaves, weights, create_graph=True)
    squares = torch.stack([item.square().sum() for item in first]).sum()
    second = torch.autograd.grad(squares, [*leaves, *weights], create_graph=True, materialize_grads=True)
    squares = torch.stack([item.square().sum() for item in second]).sum()
    third = torch.autograd.grad(squares, leaves, retain_graph=True, materialize_grads=True)
    batch = [torch.randn(2, *y.shape, dtype=y.dtype) for y in outputs]
    many = torch.autograd.grad(outputs, leaves, batch, is_grads_batched=True)
    return first, second, third, many


def tangents_of_the_backward_pass(function: Function, values: Values) -> Any:
    leaves = [value.clone().requires_grad_() for value in values]
    outputs = function(*leaves)
    with forward_ad.dual_level():
        pairs = zip(random_like(outputs), random_like(outputs), strict=True)
        weights = [forward_ad.make_dual(*pair) for pair in pairs]
        along = torch.autograd.grad(outputs, leaves, weights)
        return [forward_ad.unpack_dual(item).tangent for item in along]


def batched(function: Function, values: Values) -> Any:
    return vmap(function)(*(torch.stack([value, 2 * value]) for value in values))


def gradients_of_samples(function: Function, values: Values) -> Any:
    stacked = [torch.stack([value, value - 1, 2 * value]) for value in values]
    return vmap(grad(scalar(function), everything(values)))(*stacked)


def reverse_jacobian(function: Function, values: Values) -> Any:
    return jacrev(function)(*values)


def forward_jacobian(function: Function, values: Values) -> Any:
    return jacfwd(function)(*values)


def second_derivatives(function: Function, values: Values) -> Any:
    return hessian(scalar(function))(*values)


def compiled_forward_mode(function: Function, values: Values) -> Any:
    tangents = random_like(values)
    run = torch.compile(lambda *x: jvp(function, x, tangents)[1], fullgraph=True, backend="aot_eager")
    return run(*values)


def compiled_gradients_of_samples(function: Function, values: Values) -> Any:
    stacked = [torch.stack([value, value - 1]) for value in values]
    run = torch.compile(vmap(grad(scalar(function))), fullgraph=True, backend="aot_eager")
    return run(*stacked)


KINDS = [
    forward_mode, dual_numbers, batched, gradients_of_samples, reverse_jacobian, forward_jacobian,
    second_derivatives, of_the_backward_pass, tangents_of_the_backward_pass,
]  # fmt: skip
CASES = [
    (workload, kind)
    for workload in WORKLOADS
    for kind in KINDS
    # The backward pass of PyTorch's own group norm has no tangents.
    if (workload.op, kind) != ("group_norm_silu", tangents_of_the_backward_pass)
]
CASES += [(WORKLOADS[5], kind) for kind in (compiled_forward_mode, compiled_gradients_of_samples)]


@pytest.fixture(autouse=True)
def kernels_again() -> Iterator[None]:
    yield
    set_kernel_backend("triton")
    torch.compiler.reset()


def require_equal(kind: Callable[[Function, Values], Any], run: Callable[..., Any], inputs: Any) -> None:
    """Compare a kind of derivative with the kernels on to the same by the eager definition."""
    names = [name for name, x in inputs.items() if isinstance(x, Tensor) and x.requires_grad]

    def function(*values: Tensor) -> tuple[Tensor, ...]:
        result = run(**{**inputs, **dict(zip(names, values, strict=True))})
        return (result,) if isinstance(result, Tensor) else tuple(result)

    found = []
    for backend in ("triton", "eager"):
        set_kernel_backend(backend)  # type: ignore[arg-type]
        torch.manual_seed(1)
        values = tuple(inputs[name].detach() for name in names)
        if backend == "eager":  # PyTorch's own group norm takes batches of contiguous gradients only
            values = tuple(value.contiguous() for value in values)
        found.append([x for x in torch.utils._pytree.tree_leaves(kind(function, values)) if x is not None])
    assert len(found[0]) == len(found[1])
    assert any(expected.any() for expected in found[1])
    for value, expected in zip(*found, strict=True):
        assert value.shape == expected.shape
        assert value.dtype == expected.dtype
        assert (value - expected).abs().max() <= 1e-10 * max(expected.abs().max().item(), 1.0)


@pytest.mark.parametrize(
    ("workload", "kind"), CASES, ids=lambda item: getattr(item, "__name__", None) or f"{item.op} {item.label}"
)
def test_as_by_the_definition(workload: workloads.Workload, kind: Callable[[Function, Values], Any]) -> None:
    torch.manual_seed(0)
    inputs = workload.inputs("cpu", torch.float64)
    if workload.op == "group_norm_silu":
        inputs["num_groups"] = 2
    require_equal(kind, workload.run, inputs)


@pytest.mark.parametrize("kind", KINDS[:4] + KINDS[6:7], ids=lambda kind: kind.__name__)
def test_accelerated_modules(kind: Callable[[Function, Values], Any]) -> None:
    torch.manual_seed(0)
    norm = nn.Sequential(nn.GroupNorm(2, 4), nn.SiLU(), nn.Conv3d(4, 2, 2, 2)).double()
    assert len(accelerate(norm)) == 2
    parameters = {name: item.detach().requires_grad_() for name, item in norm.named_parameters()}
    inputs = {"x": torch.randn(1, 4, 2, 2, 4, dtype=torch.float64).requires_grad_(), **parameters}

    def run(x: Tensor, **values: Tensor) -> Tensor:
        return functional_call(norm, values, (x,))

    require_equal(kind, run, inputs)


def test_memory_of_keys_may_change_before_the_first_derivative_only() -> None:
    torch.manual_seed(0)
    memory, labels = torch.randn(8, 3), torch.arange(8) % 4
    queries = torch.randn(4, 3).requires_grad_()
    loss = supervised_contrast(queries, memory, labels[:4], labels, torch.tensor(1.0))
    expected = torch.autograd.grad(loss, queries, retain_graph=True)[0]
    memory.zero_()
    assert torch.equal(torch.autograd.grad(loss, queries, retain_graph=True)[0], expected)
    with pytest.raises(RuntimeError, match=r"keys or labels were changed in place .* pass a copy"):
        torch.autograd.grad(loss, queries, create_graph=True)
    with torch.inference_mode():
        keys = torch.randn(8, 3)
    loss = supervised_contrast(queries, keys, labels[:4], labels, torch.tensor(1.0))
    assert torch.autograd.grad(loss, queries, create_graph=True)[0].requires_grad
