"""Pretraining: MeDUET's losses as a task of the engine, its configuration, cost and export."""

from .config import OptimizerConfig, PretrainConfig
from .erasure import DomainMeans
from .losses import ObjectiveConfig, pretraining_losses, random_mix_mask


def __getattr__(name: str) -> object:  # the engine imports this package's configuration still
    if name == "pretrain":
        from .train import pretrain

        return pretrain
    raise AttributeError(name)


__all__ = [
    "DomainMeans",
    "ObjectiveConfig",
    "OptimizerConfig",
    "PretrainConfig",
    "pretrain",
    "pretraining_losses",
    "random_mix_mask",
]
