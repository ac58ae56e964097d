"""What is minimised."""

from .erasure import DomainMeans
from .pretraining import ObjectiveConfig, pretraining_losses, random_mix_mask

__all__ = ["DomainMeans", "ObjectiveConfig", "pretraining_losses", "random_mix_mask"]
