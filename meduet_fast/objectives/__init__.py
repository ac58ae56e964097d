"""What is minimised."""

from .pretraining import ObjectiveConfig, pretraining_losses, random_mix_mask

__all__ = ["ObjectiveConfig", "pretraining_losses", "random_mix_mask"]
