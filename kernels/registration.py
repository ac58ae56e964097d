"""One way to register an operation with PyTorch: opaque to the compiler, with fake tensors and autograd.

``torch.library.Library`` costs about 2 us a call, ``custom_op`` about 9; ``triton_op`` does not compile on a
host without a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .launch import recording

NAMESPACE = "meduet_fast"
_library = torch.library.Library(NAMESPACE, "DEF")


def _on_plain_tensors(implementation: Callable[..., Any]) -> Callable[..., Any]:
    """Subclasses of Tensor (MONAI's MetaTensor) change what ``new_empty``, ``view`` and indexing do."""

    def run(*arguments: Any) -> Any:
        return implementation(
            *(
                item.as_subclass(torch.Tensor)
                if isinstance(item, torch.Tensor) and type(item) is not torch.Tensor
                else item
                for item in arguments
            )
        )

    return run


def register(
    schema: str,
    implementation: Callable[..., Any],
    fake: Callable[..., Any],
    setup_context: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
) -> Any:
    """Define an operator for CPU and CUDA tensors.

    Args:
        schema: ``name(Tensor x, ...) -> Tensor``.
        implementation: runs it; outputs must not alias inputs.
        fake: outputs of the right shape, dtype and device, unfilled.
        setup_context, backward: as :func:`torch.library.register_autograd` takes them; absent for operators
            that are themselves a backward pass.

    Returns:
        The operator to call.
    """
    name = schema.split("(", 1)[0]
    _library.define(schema)
    for key in ("CPU", "CUDA"):
        _library.impl(name, _on_plain_tensors(implementation), key)

    def on_meta(*arguments: Any) -> Any:
        return (implementation if recording() else fake)(*arguments)

    torch.library.register_fake(f"{NAMESPACE}::{name}", on_meta, lib=_library)
    if backward is not None:
        torch.library.register_autograd(
            f"{NAMESPACE}::{name}", backward, setup_context=setup_context, lib=_library
        )
    return getattr(getattr(torch.ops, NAMESPACE), name).default
