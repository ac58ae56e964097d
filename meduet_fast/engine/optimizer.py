"""AdamW, its schedules and the teacher's average. Source: MeDUET section "Optimisation"."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from meduet_fast.pretraining.config import OptimizerConfig


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """Fused AdamW over the parameters that ask for a gradient; vectors (biases, norms, the contrast's scales)
    do not decay.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [item for item in trained if item.dim() > 1], "weight_decay": config.weight_decay},
        {"params": [item for item in trained if item.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        groups, lr=config.initial_learning_rate, betas=(config.beta1, config.beta2), fused=True
    )


def _cosine(start: float, end: float, progress: float) -> float:
    return end + (start - end) * (1 + math.cos(math.pi * min(max(progress, 0.0), 1.0))) / 2


def learning_rate(step: int, steps: int, config: OptimizerConfig) -> float:
    """Linear warm-up, then a cosine that ends at the last of ``steps``."""
    if step < config.warmup_steps:
        share = step / config.warmup_steps
        return config.initial_learning_rate + share * (config.learning_rate - config.initial_learning_rate)
    progress = (step - config.warmup_steps) / max(steps - 1 - config.warmup_steps, 1)
    return _cosine(config.learning_rate, config.final_learning_rate, progress)


def teacher_momentum(step: int, steps: int, config: OptimizerConfig) -> float:
    """A cosine from the first to the final momentum over ``steps``."""
    return _cosine(config.teacher_momentum, config.final_teacher_momentum, step / max(steps - 1, 1))


def _in_this_process(model: nn.Module) -> list[Tensor]:
    """The parameters, or this process's shards of them."""
    return [item.to_local() if isinstance(item, DTensor) else item for item in model.parameters()]


@torch.no_grad()
def update_teacher(teacher: nn.Module, student: nn.Module, momentum: float) -> None:
    """teacher = momentum * teacher + (1 - momentum) * student, all parameters at once.

    Both are sharded alike or not at all: each process averages what it holds.
    """
    torch._foreach_lerp_(_in_this_process(teacher), _in_this_process(student), 1 - momentum)
