"""What autograd keeps, for tests of memory."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


def kept_bytes(network: nn.Module, call: Callable[[], object]) -> int:
    """Count the bytes of storages that autograd keeps of a pass in bfloat16 on the CPU, without parameters.

    Args:
        network: whose parameters are not counted.
        call: the pass.
    """
    known = {item.untyped_storage().data_ptr() for item in network.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x), torch.autocast("cpu", torch.bfloat16):
        call()
    return sum(storage.nbytes() for storage in kept.values())
