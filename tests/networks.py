"""A pretrained network's stand-in for tests."""

from __future__ import annotations

import torch

from meduet_fast.models import MeDUET, MeDUETConfig


def moved_network(config: MeDUETConfig) -> MeDUET:
    """Build one whose every parameter is away from its first value, in eval mode."""
    torch.manual_seed(0)
    model = MeDUET(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.requires_grad_(False).eval()
