"""Align a network's features to the tokens of the frozen encoder, as a second loss of training.

Source: representation alignment (REPA, Yu et al. 2024), whose head this is.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

# Shorter vectors count less: otherwise the gradient of a zero vector would have no bound.
_SHORTEST = 1e-4


class AlignmentHead(nn.Module):
    """Map a network's features to the encoder's tokens: an MLP of three layers with SiLU, place by place.

    Args:
        width: W of the features.
        target_width: E of the tokens.
    """

    def __init__(self, width: int, target_width: int) -> None:
        super().__init__()
        hidden = 2 * max(width, target_width)
        self.layers = nn.Sequential(
            nn.Linear(width, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU(),
            nn.Linear(hidden, target_width),
        )  # fmt: skip

    def forward(self, features: Tensor) -> Tensor:
        """Map features (..., W) to (..., E)."""
        return self.layers(features)  # (..., E)


def alignment_loss(features: Tensor, targets: Tensor) -> Tensor:
    """Compute the mean of 1 - cosine between features and targets, place by place, in float32.

    Args:
        features: (B, X, Y, Z, E) of any floating type; on another grid than the targets they are brought to
            theirs by trilinear interpolation.
        targets: (B, X', Y', Z', E) of any floating type, without gradient.

    Returns:
        A scalar, float32, from 0 to 2. A zero vector counts as at right angles to everything.
    """
    features, targets = features.float(), targets.detach().float()
    if features.shape[1:4] != targets.shape[1:4]:
        features = F.interpolate(
            features.movedim(4, 1), targets.shape[1:4], mode="trilinear", align_corners=False
        ).movedim(1, 4)  # (B, X', Y', Z', E)
    directions = F.normalize(features, dim=4, eps=_SHORTEST)  # (B, X', Y', Z', E)
    cosine = (directions * F.normalize(targets, dim=4, eps=_SHORTEST)).sum(4)  # (B, X', Y', Z')
    return 1 - cosine.mean()
