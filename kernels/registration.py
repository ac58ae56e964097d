"""One way to register an operation with PyTorch: opaque to the compiler, with fake tensors and autograd.

An operation names its inputs once, as fields of a NamedTuple: the operator's schema comes from their types,
and what launches, fakes and saves gets them as one value.

Kernels give first derivatives in reverse mode. All others come from the operation's definition in plain
PyTorch: the public functions take it within transforms (:func:`~.backend.transformed`), and the backward pass
takes its derivative where that is to be differentiated once more, or runs within a transform itself.

``torch.library.Library`` costs about 2 us a call, ``custom_op`` about 9; ``triton_op`` does not compile on a
host without a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar, get_type_hints

import torch
from torch import Tensor

from .backend import transformed
from .launch import recording

NAMESPACE = "meduet_fast"
_library = torch.library.Library(NAMESPACE, "DEF")
# By the type of a field; SymInt may change from call to call without being compiled anew.
_SCHEMA: dict[Any, str] = {
    Tensor: "Tensor", Tensor | None: "Tensor?", bool: "bool", int: "int", float: "float",
    int | torch.SymInt: "SymInt", list[int]: "int[]", list[bool]: "bool[]", torch.dtype: "ScalarType",
}  # fmt: skip
Inputs = TypeVar("Inputs")


class Derivatives(NamedTuple):
    """How an operator is differentiated.

    Attributes:
        setup_context: (ctx, inputs, output), saves what the others need.
        backward: (ctx, *gradients of the outputs) -> gradients of the inputs, by kernels.
        recall: (ctx, gradients of the outputs) -> the inputs, as far as a derivative depends on their values;
            any values of the same shape and dtype stand for the others.
        definition: the operator in plain PyTorch; outputs without a gradient, the last, are left out.
    """

    setup_context: Callable[[Any, Any, Any], None]
    backward: Callable[..., tuple[Tensor | None, ...]]
    recall: Callable[[Any, tuple[Any, ...]], Any]
    definition: Callable[[Any], Any]


def register(
    name: str,
    inputs: Callable[..., Inputs],
    outputs: str,
    implementation: Callable[[Inputs], Any],
    fake: Callable[[Inputs], Any],
    derivatives: Derivatives | None = None,
) -> Any:
    """Define an operator for CPU and CUDA tensors.

    Args:
        name: of the operator.
        inputs: a NamedTuple; its fields are the operator's parameters.
        outputs: "Tensor", or "(Tensor, Tensor)".
        implementation: runs it; outputs must not alias inputs.
        fake: outputs of the right shape, dtype and device, unfilled.
        derivatives: absent for operators that are themselves a backward pass, or have integers for outputs.

    Returns:
        The operator to call.
    """

    def run(*values: Any) -> Any:
        # Subclasses of Tensor (MONAI's MetaTensor) change what ``new_empty``, ``view`` and indexing do.
        plain = (
            value.as_subclass(Tensor) if isinstance(value, Tensor) and type(value) is not Tensor else value
            for value in values
        )
        return implementation(inputs(*plain))

    def run_on_meta(*values: Any) -> Any:
        return (implementation if recording() else fake)(inputs(*values))

    fields = ", ".join(f"{_SCHEMA[kind]} {field}" for field, kind in get_type_hints(inputs).items())
    _library.define(f"{name}({fields}) -> {outputs}")
    for key in ("CPU", "CUDA"):
        _library.impl(name, run, key)
    qualified = f"{NAMESPACE}::{name}"
    torch.library.register_fake(qualified, run_on_meta, lib=_library)
    if derivatives is not None:
        save, backward, recall, definition = derivatives
        fields_of = inputs

        def setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            save(ctx, fields_of(*inputs), output)

        def differentiate(ctx: Any, *grads: Any) -> tuple[Any, ...]:
            if torch.is_grad_enabled() or transformed():
                return _by_definition(definition, recall(ctx, grads), ctx.needs_input_grad, grads)
            return backward(ctx, *grads)

        torch.library.register_autograd(qualified, differentiate, setup_context=setup, lib=_library)
    return getattr(getattr(torch.ops, NAMESPACE), name).default


def _by_definition(
    definition: Callable[..., Any], inputs: Any, wanted: tuple[bool, ...], grads: tuple[Any, ...]
) -> tuple[Any, ...]:
    """Compute gradients of the wanted inputs in plain PyTorch, which can be differentiated once more."""
    names = [name for name, want in zip(inputs._fields, wanted, strict=True) if want]

    def of_wanted(*values: Tensor) -> tuple[Tensor, ...]:
        result = definition(inputs._replace(**dict(zip(names, values, strict=True))))
        return (result,) if isinstance(result, Tensor) else result

    outputs, pull_back = torch.func.vjp(of_wanted, *(getattr(inputs, name) for name in names))[:2]
    known = zip(outputs, grads, strict=False)  # the others carry no gradient
    found = pull_back(tuple(torch.zeros_like(y) if grad is None else grad for y, grad in known))
    gradients = dict(zip(names, found, strict=True))
    return tuple(gradients.get(name) for name in inputs._fields)
