"""AdamW, its schedule, and the average of the weights. Source: MeDUET section "Optimisation"."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from .config import AdamWConfig


def build_optimizer(model: nn.Module, config: AdamWConfig) -> torch.optim.AdamW:
    """Build fused AdamW over the parameters that ask for a gradient; vectors (biases, norms) do not decay."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [item for item in trained if item.dim() > 1], "weight_decay": config.weight_decay},
        {"params": [item for item in trained if item.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        groups, lr=config.initial_learning_rate, betas=(config.beta1, config.beta2), fused=True
    )


def cosine(start: float, end: float, progress: float) -> float:
    """Return the value of half a cosine from ``start`` to ``end`` at a progress of 0 to 1."""
    return end + (start - end) * (1 + math.cos(math.pi * min(max(progress, 0.0), 1.0))) / 2


def learning_rate(step: int, steps: int, config: AdamWConfig) -> float:
    """Return the rate of a step: linear warm-up, then a cosine that ends at the last of ``steps``."""
    if step < config.warmup_steps:
        share = step / config.warmup_steps
        return config.initial_learning_rate + share * (config.learning_rate - config.initial_learning_rate)
    progress = (step - config.warmup_steps) / max(steps - 1 - config.warmup_steps, 1)
    return cosine(config.learning_rate, config.final_learning_rate, progress)


def clip_gradients(model: nn.Module, largest: float | None) -> Tensor:
    """Scale all gradients down to a norm of ``largest``, if given; return the norm before, a scalar."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    norm = get_total_norm([item.grad for item in parameters if item.grad is not None], foreach=True)
    if isinstance(norm, DTensor):  # the norm of this process's shards: add up all of them
        norm = norm.full_tensor()
    if largest is not None:
        clip_grads_with_norm_(parameters, largest, norm, foreach=True)
    return norm


@torch.no_grad()
def update_average(teacher: nn.Module, student: nn.Module, momentum: float) -> None:
    """Compute teacher = momentum * teacher + (1 - momentum) * student, all parameters at once.

    Both are sharded alike or not at all: each process averages what it holds.
    """

    def held(model: nn.Module) -> list[Tensor]:
        return [item.to_local() if isinstance(item, DTensor) else item for item in model.parameters()]

    torch._foreach_lerp_(held(teacher), held(student), 1 - momentum)
