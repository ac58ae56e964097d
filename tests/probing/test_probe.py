"""Probes and retrieval on factors whose answer is known, and on a network."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from meduet_fast.data.held_out import HeldOut
from meduet_fast.models import MeDUET, MeDUETConfig
from meduet_fast.probing import (
    FactorTable,
    choose_crops,
    extract_factors,
    fill_errors,
    probe_factors,
    untrained_like,
)
from meduet_fast.probing.probe import place_retrieval, probe_accuracy

from .conftest import MakeStore

PLACES, DOMAINS, WIDTH = 40, 4, 16


def ideal_table(noise: float = 0.1) -> FactorTable:
    """Style tells the domain and nothing else, content the place and nothing else; one volume a domain."""
    random = np.random.default_rng(0)
    style_of_domain = random.standard_normal((DOMAINS, WIDTH))
    content_of_place = random.standard_normal((2, PLACES, WIDTH))
    index = np.array([(h, d, p) for d in range(DOMAINS) for h in (0, 1) for p in range(PLACES)])
    held_out, domain, position = index.T
    jitter = noise * random.standard_normal((2, len(index), WIDTH))
    return FactorTable(
        content=(content_of_place[held_out, position] + jitter[0]).astype(np.float32),
        style=(style_of_domain[domain] + jitter[1]).astype(np.float32),
        domain=domain,
        volume=domain.copy(),
        position=position,
        held_out=held_out.astype(bool),
    )


def test_the_probe_finds_domains_in_style_alone() -> None:
    table = ideal_table()
    assert probe_accuracy(table, "style") == 1.0
    # 160 held-out crops: chance 0.25, four standard errors 0.14.
    assert abs(probe_accuracy(table, "content") - 0.25) < 0.14


def test_the_probe_is_measured_on_held_out_crops_alone() -> None:
    table = ideal_table()
    table.style[table.held_out] = np.roll(table.style[table.held_out], PLACES, axis=0)  # the next domain's
    assert probe_accuracy(table, "style") == 0.0


def test_the_probes_accuracy_is_balanced() -> None:
    table = ideal_table()
    kept = ~table.held_out | (table.domain > 0) | (table.position < 2)
    table = table.rows(kept)  # two held-out crops of domain 0 are left, and both get a foreign style
    wrong = table.held_out & (table.domain == 0)
    table.style[wrong] = table.style[table.domain == 1][:2]
    assert probe_accuracy(table, "style") == pytest.approx(0.75)


def test_retrieval_finds_places_in_content_alone() -> None:
    table = ideal_table()
    group = list(range(DOMAINS))
    assert place_retrieval(table, [group], "content") == (1.0, pytest.approx(1 / PLACES))
    accuracy, chance = place_retrieval(table, [group], "style")
    # 480 searches: four standard errors of the chance rate are 0.03.
    assert abs(accuracy - chance) < 0.03


def test_retrieval_asks_other_domains_only() -> None:
    """Two volumes of one domain and one of another: content that is only shared within the domain finds
    nothing, although it would among all."""
    table = ideal_table(noise=0.0).rows(slice(0, 3 * 2 * PLACES))
    table.domain[table.volume == 1] = 0
    mirrored = table.held_out & (table.volume == 2)
    table.content[mirrored] = table.content[mirrored][::-1]
    accuracy, _ = place_retrieval(table, [[0, 1, 2]], "content")
    assert accuracy == 0.0


def test_retrieval_stays_within_a_group() -> None:
    table = ideal_table()
    assert place_retrieval(table, [[0, 1], [2, 3]], "content")[0] == 1.0


@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_factors_are_token_means_of_unmixed_crops(
    make_store: MakeStore, config: MeDUETConfig, batch_size: int
) -> None:
    store = make_store([("a1", "plain", "chest", (20, 12, 10), (-9.0, 0.0, 3.0))])
    model = untrained_like(config, 0)
    starts = [(0, 0, 0), (3, 1, 2), (12, 4, 2), (5, 0, 1)]
    content, style = extract_factors(model, store, 0, starts, batch_size)
    assert content.dtype == style.dtype == np.float32
    for row, (x, y, z) in enumerate(starts):
        crop = store.read_volume(0)[None, :, x : x + 8, y : y + 8, z : z + 8].float()
        factors = model(crop)
        torch.testing.assert_close(torch.from_numpy(content[row]), factors.content[0].mean(0).detach())
        torch.testing.assert_close(torch.from_numpy(style[row]), factors.style[0].mean(0).detach())


def test_separation_of_a_network(make_store: MakeStore, config: MeDUETConfig) -> None:
    grid, origin = (24, 12, 10), (-9.0, 0.0, 3.0)
    store = make_store([(f"v{name}", name, "chest", grid, origin) for name in "abc"])
    model, untrained = untrained_like(config, 1), untrained_like(config, 0)
    crops = choose_crops(store, 8, HeldOut(store.entries, 0.4), positions=20)
    result, _ = probe_factors(model, untrained, store, crops)
    assert result.domains == ["a", "b", "c"]
    assert result.same_anatomy
    assert result.unseen
    assert (result.crops_fitted, result.crops_tested) == (240, 60)
    assert result.probe_chance == pytest.approx(1 / 3)
    assert result.retrieval_chance == pytest.approx(1 / 20)
    assert result.retrieval is not None
    # A whole unit of offset between the domains: any network's style shows it to a probe.
    assert result.probe.style > 0.9
    assert result.gap_points == pytest.approx(100 * (result.probe.style - result.probe.content))
    assert (
        probe_factors(
            model, untrained, store, choose_crops(store, 8, HeldOut(store.entries, 0.4), positions=20)
        )[0]
        == result
    )
    same, _ = probe_factors(untrained, untrained, store, crops)
    assert same.probe.style == same.probe.untrained_style == result.probe.untrained_style
    assert json.loads(json.dumps(result.to_dict())) == result.to_dict()


def test_separation_on_whole_volumes(make_store: MakeStore, config: MeDUETConfig) -> None:
    people = [(f"{n}{i}", n, "brain", (12, 10, 9), (-9.0 - i, 0.0, 3.0)) for i in range(2) for n in "ab"]
    store = make_store(people)
    model = untrained_like(config, 0)
    crops = choose_crops(store, 8, HeldOut.of_run(store, 0.5, ["a1", "b1"]), positions=10)
    result, table = probe_factors(model, model, store, crops)
    assert result.volumes == ["a1", "b1"]
    assert result.same_anatomy
    assert result.unseen
    assert (result.crops_fitted, result.crops_tested) == (60, 20)  # all 30 places of either volume
    assert result.retrieval is not None
    assert {store.entries[index].name for index in table.volume[~table.held_out]} == {"a0", "b0"}
    assert result.probe.style > 0.9
    assert [item.domain for item in fill_errors(model, store, crops)] == ["a", "b"]


def test_without_a_shared_anatomy_there_is_no_retrieval(make_store: MakeStore, config: MeDUETConfig) -> None:
    origin = (-9.0, 0.0, 3.0)
    store = make_store([("a", "a", "chest", (24, 12, 10), origin), ("b", "b", "brain", (20, 12, 10), origin)])
    model = untrained_like(config, 0)
    result, _ = probe_factors(
        model, model, store, choose_crops(store, 8, HeldOut(store.entries, 0.4), positions=10)
    )
    assert not result.same_anatomy
    assert result.retrieval is None
    assert result.retrieval_chance is None


def test_the_untrained_network_is_the_runs_start_and_disturbs_nobody(config: MeDUETConfig) -> None:
    torch.manual_seed(5)
    start = MeDUET(config).state_dict()
    torch.manual_seed(9)
    expected = torch.rand(3)
    torch.manual_seed(9)
    again = untrained_like(config, 5).state_dict()
    assert torch.equal(torch.rand(3), expected)
    assert all(torch.equal(start[key], again[key]) for key in start)
