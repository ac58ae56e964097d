"""Guidance over the networks that there are."""

from __future__ import annotations

import pytest
import torch

from meduet_fast.synthesis.guidance import Branch, Guidance, GuidanceMode, guided

pytest.importorskip("diffusers", reason="diffusers is not installed")

from ..models.latent_networks import NETWORKS, inputs, network

BRANCHES = [Branch(False, False), Branch(True, False), Branch(False, True), Branch(True, True)]


@pytest.mark.parametrize("name", NETWORKS)
@torch.no_grad()
def test_corners_are_branches_and_one_batch_is_separate_calls(one_thread: None, name: str) -> None:
    model, arguments = network(name).eval(), inputs(name)[:4]
    rows = len(arguments[0])
    apart = {
        branch: model(
            *arguments, torch.full((rows,), not branch.content), torch.full((rows,), not branch.style)
        )
        for branch in BRANCHES
    }
    for branch, expected in apart.items():
        weights = Guidance(float(branch.content), float(branch.style)).branches(0.5)
        assert guided(model, *arguments, weights).equal(expected)
    modes: tuple[GuidanceMode, ...] = ("joint", "additive", "chained")
    for mode in modes:
        weights = Guidance(2, 1.5, mode).branches(0.5)
        expected = sum((weight * apart[branch] for branch, weight in weights.items()), torch.tensor(0.0))
        assert len(weights) > 1
        torch.testing.assert_close(guided(model, *arguments, weights), expected, rtol=1e-5, atol=1e-5)
