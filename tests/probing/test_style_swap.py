"""Changed styles: whose style a token gets, regions of any size, and verdicts on known errors."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from meduet_fast.data.held_out import HeldOut
from meduet_fast.kernels import build_mix_index, patchify_3d
from meduet_fast.models import MeDUET, MeDUETConfig
from meduet_fast.probing import (
    PairVerdict,
    Restyled,
    RestyledRegion,
    StyleChange,
    StyleStatistics,
    choose_crops,
    hiding_masks,
    measure_change,
    restyle,
    restyle_region,
    restyle_region_by_statistics,
    style_statistics,
    untrained_like,
)

from .conftest import MakeStore


@pytest.fixture
def statistics(config: MeDUETConfig) -> tuple[StyleStatistics, StyleStatistics]:
    generator = torch.Generator().manual_seed(1)
    parts = torch.rand(4, config.style_dim, generator=generator) + 0.5
    return StyleStatistics(parts[0], parts[1]), StyleStatistics(parts[2], parts[3])


def crops_of(count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    one, other = torch.randn(2, count, 4, 8, 8, 8, generator=torch.Generator().manual_seed(seed)).unbind(0)
    return one, other


def test_whole_crops_get_moved_styles_and_those_of_the_donors_tokens(
    config: MeDUETConfig, statistics: tuple[StyleStatistics, StyleStatistics]
) -> None:
    model = untrained_like(config, 0)
    crops, donors = crops_of(3)
    result = restyle(model, crops, donors, *statistics, whole=True)
    with torch.no_grad():
        factors, given = model(crops), model(donors)
        own, donor = statistics
        moved = (factors.style - own.mean) / own.deviation * donor.deviation + donor.mean
        for style, found in zip((factors.style, moved, given.style), result, strict=True):
            torch.testing.assert_close(found, model.reconstruct(factors._replace(style=style)))


def test_hidden_tokens_get_styles_by_rank_as_published(
    config: MeDUETConfig, statistics: tuple[StyleStatistics, StyleStatistics]
) -> None:
    """One pair at a time, stream by stream, against the exchange that the training decodes."""
    model = untrained_like(config, 0)
    crops, donors = crops_of(2)
    result = restyle(model, crops, donors, *statistics, whole=False)
    masks = hiding_masks(config, 2, seed=0)
    for row in range(2):
        for mask in (masks[row : row + 1], ~masks[row : row + 1]):
            index = build_mix_index(mask.expand(2, -1))
            latents = torch.cat([crops[row : row + 1], donors[row : row + 1]])
            with torch.no_grad():
                mixed = model.factorize(model.encode(model.embed(latents, index.mask)), index)
                streams = model.decode(mixed, index)
            hidden = mask[0]
            for found, expected in ((result.kept, streams.straight), (result.by_rank, streams.swapped)):
                tokens = patchify_3d(found[row : row + 1], 2)[0]  # (L, K)
                torch.testing.assert_close(tokens[hidden], expected[0][hidden])


@pytest.mark.parametrize("whole", [True, False])
def test_a_move_to_the_own_statistics_changes_nothing_and_another_does(
    config: MeDUETConfig, statistics: tuple[StyleStatistics, StyleStatistics], whole: bool
) -> None:
    model, own = untrained_like(config, 0), statistics[0]
    result = restyle(model, *crops_of(2), own, own, whole)
    torch.testing.assert_close(result.by_statistics, result.kept, rtol=1e-4, atol=1e-5)
    result = restyle(model, *crops_of(2), *statistics, whole)
    assert not torch.allclose(result.by_statistics, result.kept, atol=1e-3)
    assert not torch.allclose(result.by_rank, result.kept, atol=1e-3)


def test_statistics_are_those_of_the_volumes_tokens(make_store: MakeStore, config: MeDUETConfig) -> None:
    store = make_store([(f"v{name}", name, "chest", (24, 12, 10), (-9.0, 0.0, 3.0)) for name in "ab"])
    crops = choose_crops(store, 8, HeldOut(store.entries, 0.4), positions=8)
    model = untrained_like(config, 0)
    found = style_statistics(model, store, 1, crops.fitted[1])
    starts = crops.fitted[1]
    with torch.no_grad():
        latents = store.read_crops([1] * len(starts), starts, (8, 8, 8)).float()
        tokens = model(latents).style.flatten(0, 1)
    torch.testing.assert_close(found.mean, tokens.mean(0), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.deviation, tokens.std(0), rtol=1e-4, atol=1e-5)


def test_a_region_is_put_together_and_its_donors_come_from_elsewhere(
    config: MeDUETConfig, statistics: tuple[StyleStatistics, StyleStatistics], monkeypatch: pytest.MonkeyPatch
) -> None:
    def echo(model: MeDUET, crops: Tensor, donors: Tensor, *_: object) -> Restyled:
        return Restyled(crops, crops + 1, donors)

    monkeypatch.setattr("meduet_fast.probing.style_swap.restyle", echo)
    region, donor = torch.randn(2, 4, 19, 9, 8, generator=torch.Generator().manual_seed(0)).unbind(0)
    found = restyle_region(untrained_like(config, 0), region, donor, *statistics, whole=True)
    torch.testing.assert_close(found.result.kept, region)
    torch.testing.assert_close(found.result.by_statistics, region + 1)
    torch.testing.assert_close(found.result.by_rank, found.donated)
    assert not torch.allclose(found.donated, donor, atol=0.1)
    other = torch.randn(4, 8, 10, 12)  # another anatomy may have another size
    assert (
        restyle_region(untrained_like(config, 0), region, other, *statistics, whole=True).donated.shape
        == region.shape
    )


@pytest.mark.parametrize("whole", [True, False])
def test_statistics_alone_give_the_same_region(
    config: MeDUETConfig, statistics: tuple[StyleStatistics, StyleStatistics], whole: bool
) -> None:
    model = untrained_like(config, 0)
    region, donor = torch.randn(2, 4, 13, 9, 8, generator=torch.Generator().manual_seed(0)).unbind(0)
    found = restyle_region_by_statistics(model, region, donor, *statistics, whole)
    assert torch.equal(found, restyle_region(model, region, donor, *statistics, whole).result.by_statistics)


def test_errors_and_likeness_of_known_results() -> None:
    region, donated, noise = torch.randn(3, 2, 6, 6, 6, generator=torch.Generator().manual_seed(0)).unbind(0)
    result = Restyled(kept=region, by_statistics=region + 0.9 + 0.01 * noise, by_rank=donated)
    found = measure_change(region, RestyledRegion(result, donated), truth=region + 1)
    assert found.own == 0
    assert found.kept == pytest.approx(1, rel=1e-4)
    assert found.by_statistics == pytest.approx(0.01, abs=0.002)
    assert (found.stays_by_statistics, found.stays_by_rank) == (True, False)
    unknown = measure_change(region, RestyledRegion(result, donated), truth=None)
    assert (unknown.kept, unknown.by_statistics, unknown.by_rank) == (None, None, None)


def test_a_verdict_needs_both_nearness_and_anatomy() -> None:
    change = StyleChange(0.1, 1.0, 0.6, 1.5, stays_by_statistics=True, stays_by_rank=False)
    back = replace(change, by_statistics=0.8)
    verdict = PairVerdict.of("ct", "other", (change, back))
    assert verdict.gain("by_statistics") == pytest.approx(0.3)
    assert verdict.gain("by_rank") == pytest.approx(-0.5)
    assert verdict.works("by_statistics")
    assert not verdict.works("by_rank")
    lost = PairVerdict.of("ct", "other", (change, replace(back, stays_by_statistics=False)))
    assert not lost.works("by_statistics")
    farther = PairVerdict.of("ct", "other", (change, replace(back, by_statistics=1.5)))
    assert not farther.works("by_statistics")
