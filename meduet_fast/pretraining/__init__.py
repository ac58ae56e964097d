"""Pretraining: MeDUET's losses as a task of the engine, its configuration, cost and export."""

from meduet_fast.errors import needs_extra
from meduet_fast.kernels import random_mix_mask

with needs_extra("train"):
    from .config import OptimizerConfig, PretrainConfig
    from .erasure import DomainMeans
    from .losses import ObjectiveConfig, pretraining_losses
    from .task import MeDUETPretraining
    from .train import pretrain

__all__ = [
    "DomainMeans",
    "MeDUETPretraining",
    "ObjectiveConfig",
    "OptimizerConfig",
    "PretrainConfig",
    "pretrain",
    "pretraining_losses",
    "random_mix_mask",
]
