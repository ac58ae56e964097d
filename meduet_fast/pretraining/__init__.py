"""Pretraining: MeDUET's losses as a task of the engine, its configuration, cost and export."""

from meduet_fast.kernels import random_mix_mask

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
