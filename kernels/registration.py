"""One way to register an operation with PyTorch: opaque to the compiler, with fake tensors and autograd.

An operation names its inputs once, as fields of a NamedTuple: the operator's schema comes from their types,
and what launches, fakes and saves gets them as one value.

``torch.library.Library`` costs about 2 us a call, ``custom_op`` about 9; ``triton_op`` does not compile on a
host without a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, get_type_hints

import torch
from torch import Tensor

from .launch import recording

NAMESPACE = "meduet_fast"
_library = torch.library.Library(NAMESPACE, "DEF")
# By the type of a field; SymInt may change from call to call without being compiled anew.
_SCHEMA: dict[Any, str] = {
    Tensor: "Tensor", Tensor | None: "Tensor?", bool: "bool", int: "int", float: "float",
    int | torch.SymInt: "SymInt", list[int]: "int[]", list[bool]: "bool[]", torch.dtype: "ScalarType",
}  # fmt: skip
Inputs = TypeVar("Inputs")


def register(
    name: str,
    inputs: Callable[..., Inputs],
    outputs: str,
    implementation: Callable[[Inputs], Any],
    fake: Callable[[Inputs], Any],
    setup_context: Callable[[Any, Inputs, Any], None] | None = None,
    backward: Callable[..., Any] | None = None,
) -> Any:
    """Define an operator for CPU and CUDA tensors.

    Args:
        name: of the operator.
        inputs: a NamedTuple; its fields are the operator's parameters.
        outputs: "Tensor", or "(Tensor, Tensor)".
        implementation: runs it; outputs must not alias inputs.
        fake: outputs of the right shape, dtype and device, unfilled.
        setup_context: (ctx, inputs, output), saves what ``backward`` needs; absent, as that, for operators
            that are themselves a backward pass.
        backward: (ctx, *gradients of the outputs) -> gradients of the inputs.

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
    if backward is not None and setup_context is not None:
        save = setup_context

        def setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            save(ctx, fields_of(*inputs), output)

        fields_of = inputs
        torch.library.register_autograd(qualified, backward, setup_context=setup, lib=_library)
    return getattr(getattr(torch.ops, NAMESPACE), name).default
