"""Alignment to the encoder's tokens: the cosine, grids that differ, and vectors without a direction."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from meduet_fast.synthesis.alignment import AlignmentHead, alignment_loss

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_the_loss_is_one_minus_the_cosine() -> None:
    features, targets = random(2, 3, 4, 5, 6), random(2, 3, 4, 5, 6, seed=1)
    expected = (1 - F.cosine_similarity(features, targets, dim=4)).mean()
    torch.testing.assert_close(alignment_loss(features, targets), expected)
    for factor, loss in ((3.0, 0.0), (-0.5, 2.0)):  # lengths don't count
        torch.testing.assert_close(alignment_loss(factor * targets, targets), torch.tensor(loss))


@pytest.mark.parametrize("grid", [(6, 4, 10), (2, 2, 3)])
def test_features_of_another_grid_are_interpolated(grid: tuple[int, int, int]) -> None:
    targets = random(1, 3, 2, 5, 4)
    features = random(1, *grid, 4, seed=1)
    moved = F.interpolate(features.permute(0, 4, 1, 2, 3), (3, 2, 5), mode="trilinear")  # (B, E, X', Y', Z')
    expected = alignment_loss(moved.permute(0, 2, 3, 4, 1), targets)
    torch.testing.assert_close(alignment_loss(features, targets), expected)
    direction = random(4, seed=2)
    same = direction.expand(1, *grid, 4)
    assert alignment_loss(same, direction.expand(1, 3, 2, 5, 4)).item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("nothing", ["features", "targets", "both"])
def test_zero_vectors_give_no_nan(nothing: str, dtype: torch.dtype) -> None:
    features, targets = random(1, 2, 2, 2, 8).to(dtype), random(1, 2, 2, 2, 8, seed=1).to(dtype)
    for name, value in (("features", features), ("targets", targets)):
        if nothing in (name, "both"):
            value[0, 0, 0] = 0
    features.requires_grad_()
    loss = alignment_loss(features, targets)
    loss.backward()  # type: ignore[no-untyped-call]
    assert loss.dtype == torch.float32
    assert 0 < loss.item() < 2
    assert features.grad is not None
    assert features.grad.isfinite().all()
    assert targets.grad is None


@pytest.mark.parametrize("dtype", DTYPES)
def test_long_vectors_do_not_overflow(dtype: torch.dtype) -> None:
    """The sum of their squares is far beyond float16."""
    long = torch.full((1, 1, 1, 1, 768), 6e4, dtype=dtype)
    assert alignment_loss(long, long).item() == pytest.approx(0, abs=1e-5)


def test_autocast_changes_nothing() -> None:
    """The cosine is float32 wherever it is computed."""
    features, targets = random(2, 4, 4, 4, 6), random(2, 2, 2, 2, 6, seed=1)
    with torch.autocast("cpu", torch.bfloat16):
        found = alignment_loss(features, targets)
    assert torch.equal(found, alignment_loss(features, targets))


def test_the_head_has_three_layers_and_learns() -> None:
    torch.manual_seed(0)
    head = AlignmentHead(6, 9)
    assert [tuple(p.shape) for p in head.parameters()] == [(18, 6), (18,), (18, 18), (18,), (9, 18), (9,)]
    features, targets = random(2, 3, 3, 3, 6), random(2, 3, 3, 3, 9, seed=1)
    before = alignment_loss(head(features), targets)
    optimizer = torch.optim.Adam(head.parameters(), 1e-2)
    for _ in range(20):
        loss = alignment_loss(head(features), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert alignment_loss(head(features), targets) < before - 0.2
