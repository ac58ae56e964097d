"""Contrast quadruplets of factors, for losses of one's own."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from meduet_fast.kernels.contrast import Identity, check_identity, quadruplet_contrast


class QuadrupletContrast(nn.Module):
    """Contrast of queries with keys of which exactly three are alike; see :func:`quadruplet_contrast`.

    For a loss of one's own. MeDUET's pretraining calls the function: its checkpoints hold the scales of
    content and style in one parameter.

    Args:
        identity: which rows are alike, those of a "content" or of a "style".
        temperature: first value of 1/scale; the scale is kept as its logarithm in ``log_scale``.
        learnable: whether ``log_scale`` gets a gradient.

    Raises:
        ValueError: for an unknown identity, or a temperature that is not positive.
    """

    def __init__(self, identity: Identity, temperature: float = 0.07, learnable: bool = True) -> None:
        super().__init__()
        check_identity(identity)
        if not temperature > 0:
            raise ValueError(f"temperature is {temperature}, expected more than 0")
        self.identity: Identity = identity
        self.log_scale = nn.Parameter(torch.tensor(-math.log(temperature)), requires_grad=learnable)

    def forward(self, queries: Tensor, keys: Tensor, key_offset: int = 0) -> Tensor:
        """Compute the loss of queries (4B, D) and keys (4B, D), or keys of all ranks with their offset."""
        return quadruplet_contrast(queries, keys, self.log_scale, self.identity, key_offset)

    def extra_repr(self) -> str:
        """Return the identity, for ``print(module)``."""
        return repr(self.identity)
