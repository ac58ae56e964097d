"""A teacher that is the exponential moving average of its student."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


@torch.no_grad()
def update_average(teacher: nn.Module, student: nn.Module, momentum: float) -> None:
    """Compute teacher = momentum * teacher + (1 - momentum) * student, all parameters at once.

    Both are sharded alike or not at all: each process averages what it holds.
    """

    def held(model: nn.Module) -> list[Tensor]:
        return [item.to_local() if isinstance(item, DTensor) else item for item in model.parameters()]

    torch._foreach_lerp_(held(teacher), held(student), 1 - momentum)
