"""Which volumes share anatomy, and which places are looked at."""

from __future__ import annotations

import pytest
import torch

from meduet_fast.data.held_out import HeldOut, choose_volumes, held_out_start
from meduet_fast.data.same_anatomy import same_anatomy_sets
from meduet_fast.data.store import LatentStore
from meduet_fast.data.store_index import StoreEntry
from meduet_fast.errors import UserError
from meduet_fast.probing import choose_crops, same_anatomy_groups
from meduet_fast.probing.crops import evaluation_starts

from .conftest import MakeStore

GRID, ORIGIN = (24, 12, 10), (-10.0, 0.0, 5.0)


def names(store: LatentStore, groups: list[list[int]]) -> list[list[str]]:
    return [[store.entries[index].name for index in group] for group in groups]


def test_groups_are_one_body_part_on_one_grid_in_several_domains(make_store: MakeStore) -> None:
    store = make_store(
        [
            ("a1", "plain", "chest", GRID, ORIGIN),
            ("a2", "soft", "chest", GRID, ORIGIN),
            ("a3", "hard", "chest", GRID, (-10.0, 0.0, 5.7)),  # less than half a voxel away
            ("b1", "plain", "chest", GRID, (-12.0, 0.0, 5.0)),  # elsewhere
            ("c1", "soft", "chest", (24, 12, 12), ORIGIN),  # another shape
            ("d1", "soft", "brain", GRID, ORIGIN),  # another body part
            ("e1", "plain", "leg", GRID, ORIGIN),
            ("e2", "plain", "leg", GRID, ORIGIN),  # the same domain twice
        ]
    )
    assert names(store, same_anatomy_groups(store)) == [["a1", "a2", "a3"]]


def test_anatomies_that_one_domain_shows_twice_stay_together(make_store: MakeStore) -> None:
    """T1 and T2 of one person in one data set are no group of acquisitions, and one anatomy."""
    elsewhere = (-9.0, 0.0, 3.0)
    store = make_store(
        [
            ("p1_t1", "site", "head", GRID, ORIGIN),
            ("p1_t2", "site", "head", GRID, ORIGIN),
            ("p2_t1", "site", "head", GRID, elsewhere),
            ("p2_t2", "site", "head", GRID, elsewhere),
        ]
    )
    assert same_anatomy_groups(store) == []
    assert names(store, same_anatomy_sets(store)) == [["p1_t1", "p1_t2"], ["p2_t1", "p2_t2"]]
    assert sorted(choose_volumes(store, 0.25, seed=0)) in ([0, 1], [2, 3])


def test_two_people_on_equal_shapes_are_two_groups(make_store: MakeStore) -> None:
    store = make_store(
        [
            ("a1", "plain", "chest", GRID, (-9.0, 0.0, 3.0)),
            ("a2", "soft", "chest", GRID, (-9.0, 0.0, 3.0)),
            ("b1", "plain", "chest", GRID, (30.0, 0.0, 0.0)),
            ("b2", "soft", "chest", GRID, (30.0, 0.0, 0.0)),
        ]
    )
    assert names(store, same_anatomy_groups(store)) == [["a1", "a2"], ["b1", "b2"]]


def test_volumes_of_unknown_position_share_nothing(make_store: MakeStore) -> None:
    nowhere = (0.0, 0.0, 0.0)
    store = make_store([("a1", "plain", "chest", GRID, nowhere), ("a2", "soft", "chest", GRID, nowhere)])
    assert same_anatomy_groups(store) == []


def test_fitted_crops_end_where_held_out_crops_begin(make_store: MakeStore) -> None:
    store = make_store([("a1", "plain", "chest", GRID, ORIGIN), ("a2", "soft", "chest", GRID, ORIGIN)])
    crops = choose_crops(store, 8, HeldOut(store.entries, 0.4), positions=10)
    assert crops.volumes == [0, 1]
    assert crops.groups == [[0, 1]]
    assert crops.unseen
    border = 24 - 10  # 0.4 of 24, rounded up
    for index in crops.volumes:
        assert (len(crops.fitted[index]), len(crops.tested[index])) == (40, 10)
        assert max(start[0] for start in crops.fitted[index]) + 8 <= border
        assert min(start[0] for start in crops.tested[index]) >= border
    assert crops.tested[0] == crops.tested[1]
    assert crops.fitted[0] == crops.fitted[1]
    assert crops.num_crops == 100


def test_without_groups_all_domains_are_taken(make_store: MakeStore) -> None:
    store = make_store([("a1", "plain", "chest", GRID, ORIGIN), ("b1", "soft", "brain", GRID, ORIGIN)])
    crops = choose_crops(store, 8, HeldOut(store.entries, 0.4), positions=10)
    assert crops.volumes == [0, 1]
    assert crops.groups == []


def small_brains(make_store: MakeStore) -> LatentStore:
    """Three people, each in two acquisitions, and one in a third domain: too small for slabs."""
    people = [
        (f"{name}{i}", name, "brain", (12, 10, 9), (-9.0 - i, 0.0, 3.0)) for i in range(3) for name in "ab"
    ]
    return make_store([*people, ("c0", "c", "brain", (12, 10, 9), (50.0, 0.0, 3.0))])


def test_volumes_of_one_anatomy_are_held_out_together(make_store: MakeStore) -> None:
    store = small_brains(make_store)
    seen = set()
    for seed in range(8):
        held = HeldOut.choose(store, "volumes", 0.3, seed).names()
        assert held in (["a0", "b0"], ["a1", "b1"], ["a2", "b2"])
        seen.add(held[0])
    assert seen == {"a0", "a1", "a2"}


def test_crops_of_whole_volumes_are_fitted_on_others_of_their_domains(make_store: MakeStore) -> None:
    store = small_brains(make_store)
    held_out = HeldOut.of_run(store, 0.3, ["a1", "b1"])
    crops = choose_crops(store, 8, held_out, positions=10)
    assert names(store, crops.groups) == [["a1", "b1"]]
    assert names(store, [list(crops.tested), list(crops.fitted)]) == [["a1", "b1"], ["a0", "a2", "b0", "b2"]]
    assert names(store, [crops.volumes]) == [["a0", "a1", "a2", "b0", "b1", "b2"]]
    assert crops.unseen
    first, second = crops.tested.values()
    assert first == second
    assert len(first) == 10
    assert max(x for x, _, _ in first) - min(x for x, _, _ in first) > 1  # no slab has as much room
    assert crops.num_crops == sum(map(len, crops.fitted.values())) + 20


def test_without_a_group_held_out_domains_are_compared(make_store: MakeStore) -> None:
    sizes = [("a", 12), ("a", 13), ("b", 14), ("b", 15), ("c", 16)]
    store = make_store([(f"v{n}", d, "brain", (n, 9, 9), ORIGIN) for d, n in sizes])
    crops = choose_crops(store, 8, HeldOut.of_run(store, 0.3, ["v12", "v15"]), positions=4)
    assert crops.groups == []
    assert names(store, [list(crops.tested), list(crops.fitted)]) == [["v12", "v15"], ["v13", "v14"]]


def test_held_out_volumes_of_one_domain_tell_nothing_of_separation(make_store: MakeStore) -> None:
    store = small_brains(make_store)
    for held in (["a0"], [], ["a0", "a1", "a2", "b0"]):
        with pytest.raises(UserError, match=r"two domains with volumes .* crop of 8 that are held out whole"):
            choose_crops(store, 8, HeldOut.of_run(store, 0.3, held))


def test_a_run_that_held_nothing_out_says_so(make_store: MakeStore) -> None:
    store = make_store([("a1", "plain", "chest", GRID, ORIGIN), ("a2", "soft", "chest", GRID, ORIGIN)])
    crops = choose_crops(store, 8, HeldOut(store.entries, 0.0), positions=4)
    assert not crops.unseen
    assert min(start[0] for start in crops.tested[0]) >= 16


def test_empty_places_are_left_out(make_store: MakeStore) -> None:
    store = make_store(
        [("a1", "plain", "chest", GRID, ORIGIN), ("a2", "soft", "chest", GRID, ORIGIN)], empty_above=4
    )
    starts = choose_crops(store, 4, HeldOut(store.entries, 0.4), positions=20).tested[0]
    assert len(starts) == 20
    assert max(z for _, _, z in starts) < 4


def test_a_store_of_small_volumes_is_refused_by_name(make_store: MakeStore) -> None:
    small = (12, 12, 12)
    store = make_store([("a1", "plain", "chest", small, ORIGIN), ("a2", "soft", "chest", small, ORIGIN)])
    with pytest.raises(UserError, match="store: separation needs two domains"):
        choose_crops(store, 8, HeldOut(store.entries, 0.4))


def test_places_do_not_depend_on_torchs_generator(make_store: MakeStore) -> None:
    store = make_store([("a1", "plain", "chest", GRID, ORIGIN), ("a2", "soft", "chest", GRID, ORIGIN)])
    torch.manual_seed(1)
    first = choose_crops(store, 8, HeldOut(store.entries, 0.4), positions=10)
    torch.manual_seed(2)
    assert choose_crops(store, 8, HeldOut(store.entries, 0.4), positions=10) == first


def of_one_volume(grid: tuple[int, int, int], fraction: float) -> HeldOut:
    """What is held out of a volume that is not in any store."""
    return HeldOut([StoreEntry("a", "plain", "chest", (4, *grid), "key", "a.nii", (1.5, 1.5, 1.5))], fraction)


def test_evaluation_corners_are_distinct_and_on_their_side() -> None:
    volume, boundary = of_one_volume((30, 12, 10), 0.2), held_out_start(30, 0.2, 4)
    held_out = evaluation_starts(volume, 0, 4, 20, seed=1, tested=True)
    training = evaluation_starts(volume, 0, 4, 20, seed=1, tested=False)
    assert len(set(held_out)) == len(set(training)) == 20
    assert all(boundary <= x <= 26 for x, _, _ in held_out)
    assert all(0 <= x <= boundary - 4 for x, _, _ in training)
    assert all(0 <= y <= 8 and 0 <= z <= 6 for _, y, z in held_out + training)
    assert held_out == evaluation_starts(volume, 0, 4, 20, seed=1, tested=True)
    assert held_out != evaluation_starts(volume, 0, 4, 20, seed=2, tested=True)


def test_evaluation_corners_of_a_tight_region_are_all_there_are() -> None:
    starts = evaluation_starts(of_one_volume((9, 5, 4), 0.2), 0, 4, 50, seed=1, tested=True)
    assert sorted(starts) == [(5, 0, 0), (5, 1, 0)]


def test_evaluation_corners_need_room() -> None:
    with pytest.raises(UserError, match=r"a: its held-out part of \(4, 3, 4\) cannot hold a crop of 4"):
        evaluation_starts(of_one_volume((9, 3, 4), 0.2), 0, 4, 5, seed=1, tested=True)
    with pytest.raises(UserError, match=r"a: its held-out part of \(0, 5, 4\) cannot hold a crop of 4"):
        evaluation_starts(of_one_volume((9, 5, 4), 0.0), 0, 4, 5, seed=1, tested=True)
