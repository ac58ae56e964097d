"""Hidden tokens: the right tokens of the right streams, interpolation, and errors of known guesses."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from meduet_fast.data.held_out import HeldOut
from meduet_fast.kernels import build_mix_index, patchify_3d, unpatchify_3d
from meduet_fast.models import MeDUET, MeDUETConfig
from meduet_fast.probing import (
    choose_crops,
    fill_errors,
    fill_hidden,
    hiding_masks,
    interpolate_hidden,
    untrained_like,
)

from .conftest import MakeStore


def streams_of_one_pair(model: MeDUET, first: Tensor, second: Tensor, mask: Tensor) -> Tensor:
    """Source 1 as the decoder fills it in, (L, K), NaN where it was visible. Latents (1, C, S, S, S)."""
    index = build_mix_index(mask.expand(2, -1))
    mixed = model.factorize(model.encode(model.embed(torch.cat([first, second]), index.mask)), index)
    straight = model.decode(mixed, index).straight.view(2, 2, *mask.shape[1:], -1)
    return torch.where(mask[0][:, None], straight[0, 0], torch.nan)


def test_each_token_is_filled_in_where_it_was_hidden(config: MeDUETConfig) -> None:
    torch.manual_seed(0)
    model = untrained_like(config, 0)
    crops, partners = torch.randn(2, 3, 4, 8, 8, 8).unbind(0)
    masks = hiding_masks(config, 3, seed=7)
    filled = patchify_3d(fill_hidden(model, crops, partners, masks), 2)  # (3, L, K)
    for row in range(3):
        pair = crops[row : row + 1], partners[row : row + 1]
        for mask in (masks[row : row + 1], ~masks[row : row + 1]):
            expected = streams_of_one_pair(model, *pair, mask)
            hidden = mask[0]
            assert hidden.float().mean() == 0.5
            torch.testing.assert_close(filled[row][hidden], expected[hidden])


def test_a_crop_does_not_see_what_it_fills_in(config: MeDUETConfig) -> None:
    """Other values in the tokens of one half change the other half's guesses, and not their own."""
    model, masks = untrained_like(config, 0), hiding_masks(config, 1, seed=1)
    crop, partner = torch.randn(2, 1, 4, 8, 8, 8, generator=torch.Generator().manual_seed(0)).unbind(0)
    tokens = patchify_3d(crop, 2)  # (1, L, K)
    changed = unpatchify_3d(torch.where(masks[..., None], tokens + 5, tokens), 2, (4, 4, 4))
    before, after = (patchify_3d(fill_hidden(model, x, partner, masks), 2)[0] for x in (crop, changed))
    hidden = masks[0]
    torch.testing.assert_close(before[hidden], after[hidden])
    assert not torch.allclose(before[~hidden], after[~hidden])


def test_interpolation_is_harmonic_and_keeps_planes(config: MeDUETConfig) -> None:
    """Inside, each hidden value is the mean of its six neighbours, as visible or filled in."""
    crops = torch.randn(2, 4, 8, 8, 8, generator=torch.Generator().manual_seed(0))
    masks = hiding_masks(config, 2, seed=3)
    filled = interpolate_hidden(crops, masks, 2)
    grid = masks.view(2, 1, 4, 4, 4)
    for axis in (2, 3, 4):
        grid = grid.repeat_interleave(2, axis)
    passed = torch.where(grid, filled, crops)  # of the first pass: hidden filled in, visible as it is
    inner = (slice(None), slice(None), slice(1, -1), slice(1, -1), slice(1, -1))
    mean = sum(passed.roll(shift, axis) for axis in (2, 3, 4) for shift in (1, -1)) / 6
    hidden = grid.expand_as(passed)[inner]
    torch.testing.assert_close(passed[inner][hidden], mean[inner][hidden], rtol=1e-4, atol=1e-4)
    constant = torch.full((1, 4, 8, 8, 8), 2.5)
    torch.testing.assert_close(interpolate_hidden(constant, masks[:1], 2), constant)


def test_errors_of_known_guesses(
    make_store: MakeStore, config: MeDUETConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A network that is off by 1 everywhere; latents are white noise of variance 1."""
    store = make_store([(f"v{name}", name, "chest", (24, 12, 10), (-9.0, 0.0, 3.0)) for name in "ab"])
    crops = choose_crops(store, 8, HeldOut(store.entries, 0.4), positions=10)
    monkeypatch.setattr(
        "meduet_fast.probing.hidden_tokens.fill_hidden", lambda model, crops, partners, masks: crops + 1
    )
    found = fill_errors(untrained_like(config, 0), store, crops)
    assert [item.domain for item in found] == ["a", "b"]
    for item in found:
        assert item.network == pytest.approx(1, abs=1e-5)
        assert item.variance == pytest.approx(1, abs=0.1)
        assert item.interpolation > 1.05  # a mean of some neighbours, which know nothing
    assert np.isfinite([item.interpolation for item in found]).all()
