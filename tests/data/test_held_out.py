"""The held-out slab starts where every user of it expects; whole volumes are chosen by name and seed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meduet_fast.data.held_out import HeldOut, choose_volumes, held_out_start
from meduet_fast.data.store import LatentStore
from meduet_fast.data.store_index import StoreEntry, StoreIndex
from meduet_fast.errors import UserError


@pytest.mark.parametrize(
    ("size", "fraction", "crop", "multiple", "start"),
    [
        (240, 0.25, 24, 1, 180),
        (60, 0.1, 24, 1, 36),  # the slab is at least one crop wide
        (30, 0.1, 3, 1, 27),  # 0.1 * 30 is a hair above 3
        (61, 0.25, 12, 1, 45),
        (61, 0.25, 12, 4, 44),
        (60, 0.0, 24, 4, 60),
        (24, 0.0, 24, 1, 24),
        (48, 0.5, 24, 1, 24),
    ],
)
def test_the_held_out_slab(size: int, fraction: float, crop: int, multiple: int, start: int) -> None:
    assert held_out_start(size, fraction, crop, multiple) == start


@pytest.mark.parametrize(
    ("size", "fraction", "crop", "reason"),
    [
        (47, 0.1, 24, "cannot hold a training crop and a held-out crop of 24"),
        (60, 0.8, 24, "cannot hold a training crop"),
        (23, 0.0, 24, "axis of 23 cannot hold a crop of 24"),
        (60, 1.0, 24, "found 1.0, expected 0 <= fraction < 1"),
        (60, -0.1, 24, "found -0.1"),
        (60, float("nan"), 24, "found nan"),
    ],
)
def test_a_volume_that_cannot_be_split_is_refused(size: int, fraction: float, crop: int, reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        held_out_start(size, fraction, crop)


def store_of(volumes: Sequence[tuple[str, str, str]]) -> LatentStore:
    """An open store without files, of (name, domain, source); no two volumes have one shape."""
    entries = tuple(
        StoreEntry(name, domain, "head", (4, 8, 8, 8 + number), "key", source, (1.5, 1.5, 1.5))
        for number, (name, domain, source) in enumerate(sorted(volumes))
    )
    return LatentStore(Path("store"), StoreIndex("fake", "fake", 4, 4, entries))


def numbered(counts: Sequence[int]) -> list[tuple[str, str, str]]:
    return [(f"{d}-{i}", f"d{d}", f"{d}-{i}.nii") for d, count in enumerate(counts) for i in range(count)]


def chosen_names(store: LatentStore, fraction: float, seed: int = 0) -> set[str]:
    return {store.entries[index].name for index in choose_volumes(store, fraction, seed)}


@settings(max_examples=100, deadline=None)
@given(
    counts=st.lists(st.integers(1, 12), min_size=1, max_size=4).filter(lambda counts: max(counts) > 1),
    fraction=st.floats(0.001, 0.999),
    seed=st.integers(0, 2**64 - 1),
)
def test_every_domain_that_has_two_volumes_gives_its_part_and_keeps_one(
    counts: list[int], fraction: float, seed: int
) -> None:
    store = store_of(numbered(counts))
    held = Counter(store.entries[index].domain for index in choose_volumes(store, fraction, seed))
    for number, count in enumerate(counts):
        assert held[f"d{number}"] == min(max(1, round(fraction * count)), count - 1)


def test_names_and_seed_alone_decide() -> None:
    volumes = numbered([40, 7])
    first = chosen_names(store_of(volumes), 0.25)
    assert first == chosen_names(store_of(volumes[::-1]), 0.25)
    assert first != chosen_names(store_of(volumes), 0.25, seed=1)


def test_more_volumes_change_the_choice_little() -> None:
    before = chosen_names(store_of(numbered([40, 40])), 0.25)
    after = chosen_names(store_of(numbered([44, 44])), 0.25)
    assert len(before) == 20
    assert len(after) == 22
    assert len(before - after) <= 4


def test_channels_of_one_file_are_held_out_together() -> None:
    volumes = [
        (f"p{i}-{c}", domain, f"p{i}.nii") for i in range(6) for c, domain in enumerate(["t1", "t2", "t2"])
    ]
    for seed in range(20):
        held = chosen_names(store_of(volumes), 0.3, seed)
        assert held == {
            name for name, _, _ in volumes if name.split("-")[0] in {h.split("-")[0] for h in held}
        }
        assert len(held) == 6  # two of six files


def test_a_set_larger_than_the_part_is_held_out_if_nothing_else_is_there() -> None:
    volumes = [(f"{p}{i}", "t1", f"{p}.nii") for p in "ab" for i in range(3)]
    assert chosen_names(store_of(volumes), 0.1) in ({"a0", "a1", "a2"}, {"b0", "b1", "b2"})


@pytest.mark.parametrize(
    ("volumes", "reason"),
    [
        (numbered([1, 1]), "found one volume in every domain, expected a domain with two"),
        ([("a", "t1", "x"), ("b", "t1", "x"), ("c", "t2", "x")], "whole domains show one anatomy"),
        ([("a", "t1", "x"), ("b", "t1", "y"), ("c", "t2", "x"), ("d", "t3", "y")], "whole domains show one"),
    ],
)
def test_a_store_that_can_spare_no_volume_is_refused(
    volumes: list[tuple[str, str, str]], reason: str
) -> None:
    with pytest.raises(UserError, match=f"^store: no volume can be held out: {reason}.*held_out: slab"):
        HeldOut.choose(store_of(volumes), "volumes", 0.3, 0)


def test_a_volume_is_held_out_whole_or_not_at_all() -> None:
    store = store_of(numbered([2, 1]))
    held_out = HeldOut.choose(store, "volumes", 0.3, 0)
    (index,) = held_out.volumes
    assert [held_out.border(number, 4) for number in range(3)] == [0 if i == index else 8 for i in range(3)]
    assert held_out.names() == [store.entries[index].name]
    assert held_out.describe() == f"1 of 3 volumes, whole: {store.entries[index].name}"
    assert held_out.doubts(4) == [
        "no volume is held out of d1: a domain keeps one to train on, and volumes that show one anatomy stay "
        "together"
    ]
    grid = store.entries[index].grid
    assert held_out.doubts(9)[1:] == [f"held-out volumes that cannot hold a crop of 9: 0-{index} {grid}"]


def test_slabs_are_described_and_give_no_doubts() -> None:
    held_out = HeldOut.choose(store_of(numbered([1, 1])), "slab", 0.3, 0)
    assert held_out.describe() == "30 % of every volume's left-right axis"
    assert held_out.doubts(9) == []
    assert held_out.border(0, 4) == held_out_start(8, 0.3, 4)


def test_what_a_run_held_out_stays_when_its_store_has_changed() -> None:
    before = HeldOut.choose(store_of(numbered([20])), "volumes", 0.3, 0)
    store = store_of([*numbered([40])[3:], ("00", "d0", "new")])
    after = HeldOut.of_run(store, 0.3, before.names())
    assert set(after.names()) == set(before.names()) - {"0-0", "0-1", "0-2"}
    assert HeldOut.of_run(store, 0.3, None) == HeldOut(store.entries, 0.3)
    many = HeldOut(store.entries, 0.9, "volumes", frozenset(range(30)))
    assert many.describe().endswith(" and 10 more")
