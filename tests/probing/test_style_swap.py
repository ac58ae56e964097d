"""Exchanged styles: the right tokens of the right streams, and errors against known truths."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from meduet_fast.kernels import mix_tables, patchify_3d
from meduet_fast.models import MeDUET, MeDUETConfig
from meduet_fast.pretraining import random_mix_mask
from meduet_fast.probing import (
    Exchange,
    exchange_errors,
    exchange_styles,
    far_start,
    plan_evaluation,
    untrained_like,
)

from .conftest import MakeStore


def published_way(model: MeDUET, first: Tensor, second: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """One pair at a time and stream by stream; tokens that were visible are NaN. Latents (1, C, S, S, S)."""
    tables = mix_tables(mask.expand(2, -1))
    mixed = model.factorize(model.encode(model.embed(torch.cat([first, second]), tables.mask)), tables)
    streams = model.decode(mixed, tables).tokens.view(4, 2, *mask.shape[1:], -1)
    names = ("first", "second", "first in second", "second in first")
    found = {}
    for name, (kind, number) in zip(names, ((0, 0), (0, 1), (1, 0), (1, 1)), strict=True):
        hidden = mask[0] if number == 0 else ~mask[0]
        found[name] = torch.where(hidden[:, None], streams[2 * kind + number, 0], torch.nan)
    return found


def test_each_token_is_predicted_where_it_was_hidden(config: MeDUETConfig) -> None:
    torch.manual_seed(0)
    model = untrained_like(config, 0)
    first, second = torch.randn(2, 3, 4, 8, 8, 8).unbind(0)
    result = exchange_styles(model, first, second, seed=7)
    masks = random_mix_mask(3, config.num_tokens, torch.Generator().manual_seed(7))
    for row in range(3):
        expected = published_way(model, first[row : row + 1], second[row : row + 1], masks[row : row + 1])
        got = dict(zip(expected, (patchify_3d(part[row : row + 1], 2)[0] for part in result), strict=True))
        for name, tokens in expected.items():
            shown = ~tokens.isnan()
            assert shown.float().mean() == 0.5
            torch.testing.assert_close(got[name][shown], tokens[shown], msg=f"{name} of pair {row}")
        # The other half comes from the pass in which the sources change places.
        reverse = published_way(model, second[row : row + 1], first[row : row + 1], masks[row : row + 1])
        for name, other in (("first", "second"), ("first in second", "second in first")):
            tokens = reverse[other]
            shown = ~tokens.isnan()
            torch.testing.assert_close(got[name][shown], tokens[shown], msg=f"{name} of pair {row}, reverse")


def test_without_style_weights_an_exchange_changes_nothing(config: MeDUETConfig) -> None:
    model = untrained_like(config, 0)
    with torch.no_grad():
        model.latent_entanglement.proj.weight[:, config.embed_dim :] = 0
    first, second = torch.randn(2, 2, 4, 8, 8, 8).unbind(0)
    result = exchange_styles(model, first, second)
    torch.testing.assert_close(result.first, result.first_in_second_style)
    torch.testing.assert_close(result.second, result.second_in_first_style)


def test_errors_against_known_truths(
    make_store: MakeStore, config: MeDUETConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A network that reconstructs perfectly and exchanges perfectly: the domains are 1 apart everywhere."""
    grid, origin = (24, 12, 10), (-9.0, 0.0, 3.0)
    store = make_store([(f"v{name}", name, "chest", grid, origin) for name in "ab"])
    plan = plan_evaluation(store, 8, 0.4, positions=10)

    def perfect(model: MeDUET, first: Tensor, second: Tensor) -> Exchange:
        return Exchange(first.float(), second.float(), first.float() + 1, second.float() - 1)

    monkeypatch.setattr("meduet_fast.probing.style_swap.exchange_styles", perfect)
    errors = exchange_errors(untrained_like(config, 0), store, plan, 0, 1)
    assert errors.places == 10
    assert errors.own == 0
    assert errors.kept == pytest.approx(1, abs=0.01)  # bfloat16 latents
    assert errors.exchanged == pytest.approx(0, abs=1e-4)


def test_the_style_comes_from_far_away() -> None:
    assert far_start((0, 0, 0), [(1, 1, 1), (0, 9, 0), (5, 5, 5)]) == (0, 9, 0)
