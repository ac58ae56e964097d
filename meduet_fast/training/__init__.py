"""The pretraining loop and what it needs: optimiser, teacher, checkpoints, metrics."""

from .config import OptimizerConfig, PretrainConfig
from .pretrain import pretrain

__all__ = ["OptimizerConfig", "PretrainConfig", "pretrain"]
