from __future__ import annotations

import pytest
import torch

from meduet_fast.data.augment import augment
from meduet_fast.errors import UserError


def batch(rows: int = 6, edge: int = 4, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(rows, 4, edge, edge, edge, generator=torch.Generator().manual_seed(0)).to(dtype)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_probability_zero_changes_nothing() -> None:
    latents = batch()
    assert torch.equal(augment(latents, seeded(0), 0.0, 0.0), latents)


def test_probability_one_flips_every_axis() -> None:
    latents = batch()
    assert torch.equal(augment(latents, seeded(0), 1.0, 0.0), latents.flip(2, 3, 4))


def test_probability_one_turns_every_sample() -> None:
    latents = batch(rows=64)
    turned = augment(latents, seeded(0), 0.0, 1.0)
    quarters = []
    for before, after in zip(latents, turned, strict=True):
        matches = [k for k in (1, 2, 3) if torch.equal(after, torch.rot90(before, k, (1, 2)))]
        assert len(matches) == 1
        quarters += matches
    assert set(quarters) == {1, 2, 3}


def test_every_sample_is_flipped_then_turned_and_the_input_is_kept() -> None:
    latents = batch(rows=200)
    kept = latents.clone()
    augmented = augment(latents, seeded(1), 0.5, 0.5)
    assert torch.equal(latents, kept)
    assert augmented.shape == latents.shape
    assert augmented.dtype == latents.dtype
    flips = [[axis for axis in (1, 2, 3) if code >> axis - 1 & 1] for code in range(8)]
    for before, after in zip(latents, augmented, strict=True):
        images = [torch.rot90(before.flip(f), k, (1, 2)) for f in flips for k in range(4)]
        assert any(torch.equal(after, image) for image in images)


def test_probabilities_are_the_published_ones_by_default() -> None:
    latents = torch.arange(8.0).view(1, 1, 2, 2, 2).expand(20000, 1, 2, 2, 2)
    augmented = augment(latents, seeded(2))
    unchanged = (augmented == latents).flatten(1).all(1).float().mean()
    # Untouched: no flip and no turn (0.8^4), or flips along x and y undone by the half turn.
    assert abs(unchanged - (0.8**4 + 0.2**2 * 0.8 * 0.2 / 3)) < 0.015
    flipped_z = (augmented[:, 0, :, :, 0] > augmented[:, 0, :, :, 1]).all(-1).all(-1).float().mean()
    assert abs(flipped_z - 0.2) < 0.015


def test_the_generator_decides() -> None:
    latents = batch(rows=32)
    assert torch.equal(augment(latents, seeded(3)), augment(latents, seeded(3)))
    assert not torch.equal(augment(latents, seeded(3)), augment(latents, seeded(4)))


def test_a_sample_does_not_depend_on_the_others() -> None:
    latents, other = batch(rows=32), batch(rows=32)
    other[1:] = 0
    assert torch.equal(augment(latents, seeded(5), 0.5, 0.5)[0], augment(other, seeded(5), 0.5, 0.5)[0])


def test_crops_that_are_not_square_can_be_flipped_but_not_turned() -> None:
    latents = torch.randn(4, 4, 6, 5, 4)
    assert torch.equal(augment(latents, seeded(0), 1.0, 0.0), latents.flip(2, 3, 4))
    with pytest.raises(UserError, match=r"a crop of \(6, 5, 4\) cannot be turned"):
        augment(latents, seeded(0))


@pytest.mark.parametrize("name", ["flip_prob", "rotate_prob"])
def test_bad_arguments_are_named(name: str) -> None:
    with pytest.raises(UserError, match=f"{name}: found 1.5"):
        augment(batch(), None, **{name: 1.5})
    with pytest.raises(UserError, match=r"expected \(B, C, X, Y, Z\)"):
        augment(batch()[0])
