from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from meduet_fast.data.crops import CropBatches, sample_crops
from meduet_fast.data.held_out import HeldOut, held_out_start
from meduet_fast.data.store import LatentStore
from meduet_fast.data.store_index import StoreEntry, StoreIndex
from meduet_fast.errors import UserError

from .conftest import THREE_DOMAINS, MakeStore, small


def store_without_files(tmp_path: Path, volumes_per_domain: list[int]) -> LatentStore:
    """An open store whose plans can be made; nothing of it can be read."""
    entries = tuple(
        StoreEntry(f"{d}-{i}", f"d{d:03d}", "chest", (4, 12, 12, 12), "key", "source", (1.5, 1.5, 1.5))
        for d, count in enumerate(volumes_per_domain)
        for i in range(count)
    )
    return LatentStore(tmp_path, StoreIndex("fake", "fake", 4, 4, entries))


def test_a_batch_holds_the_crops_that_it_names(make_store: MakeStore) -> None:
    store, latents = make_store(THREE_DOMAINS)
    batch = small(store)[3]
    assert batch["latents"].shape == (8, 4, 4, 4, 4)
    assert batch["latents"].dtype == torch.bfloat16
    assert [batch[key].dtype for key in ("domain", "volume", "start")] == [torch.int64] * 3
    for row in range(8):
        entry = store.entries[batch["volume"][row]]
        x, y, z = batch["start"][row].tolist()
        assert torch.equal(batch["latents"][row], latents[entry.name][:, x : x + 4, y : y + 4, z : z + 4])
        assert store.domains[batch["domain"][row]] == entry.domain


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    volumes=st.lists(st.integers(1, 3), min_size=1, max_size=7).filter(lambda counts: sum(counts) > 1),
    half=st.integers(1, 12),
    seed=st.integers(0, 2**64 - 1),
    step=st.integers(0, 2**40),
)
def test_every_batch_is_balanced_and_never_pairs_a_volume_with_itself(
    tmp_path: Path, volumes: list[int], half: int, seed: int, step: int
) -> None:
    store = store_without_files(tmp_path, volumes)
    held_out = HeldOut(store.entries, 0.2)
    batches = CropBatches(store, crop_size=4, batch_size=2 * half, seed=seed, held_out=held_out)
    domain, volume, start = batches.plan(step)
    assert (volume != volume[::-1]).all()
    assert [store.domain_id(index) for index in volume] == domain.tolist()
    counts = Counter({**dict.fromkeys(range(len(volumes)), 0), **Counter(domain.tolist())})
    assert max(counts.values()) - min(counts.values()) <= 1
    assert (start >= 0).all()
    assert (start[:, 0] + 4 <= held_out_start(12, 0.2, 4)).all()
    assert (start[:, 1:] + 4 <= 12).all()


def test_volumes_and_corners_are_uniform(tmp_path: Path) -> None:
    store = store_without_files(tmp_path, [3, 1, 2])
    batches = small(store, batch_size=12)
    plans = [batches.plan(step) for step in range(2000)]
    volumes = np.bincount(np.concatenate([volume for _, volume, _ in plans]), minlength=6) / (12 * 2000)
    # Six standard deviations of a share estimated from 24 000 draws are below 0.02.
    assert np.abs(volumes - [1 / 9, 1 / 9, 1 / 9, 1 / 3, 1 / 6, 1 / 6]).max() < 0.02
    starts = np.concatenate([start for _, _, start in plans])
    for axis in range(3):
        assert np.abs(np.bincount(starts[:, axis], minlength=9) / len(starts) - 1 / 9).max() < 0.02


def test_partners_may_share_a_domain_but_not_a_volume(tmp_path: Path) -> None:
    batches = small(store_without_files(tmp_path, [3, 1, 2]), batch_size=6)
    pairs: Counter[tuple[int, int]] = Counter()
    for step in range(500):
        domain, _, _ = batches.plan(step)
        pairs.update(zip(domain[:3].tolist(), domain[:2:-1].tolist(), strict=True))
    assert {(0, 0), (2, 2), (0, 1), (1, 0), (0, 2), (2, 1)} <= set(pairs)
    assert (1, 1) not in pairs


def test_seed_and_number_each_change_the_batch(tmp_path: Path) -> None:
    store = store_without_files(tmp_path, [3, 3])
    plans = [
        small(store, seed=seed).plan(number)[2].tobytes()
        for seed in (5, 6, 2**64 - 2, 2**64 - 1)
        for number in (0, 1, 2, 2**40)
    ]
    assert len(set(plans)) == 16


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 7}, "batch_size: found 7, expected an even number"),
        ({"batch_size": 0}, "batch_size: found 0"),
        ({"seed": -1}, "seed: found -1"),
        ({"crop_size": 0}, "crop_size: found 0"),
        (
            {"crop_size": 9},
            r"cannot hold a training crop: .*a1 \(13, 8, 8\) is smaller than a crop of 9",
        ),
    ],
)
def test_bad_arguments_are_named(make_store: MakeStore, change: dict[str, float], message: str) -> None:
    store, _ = make_store(THREE_DOMAINS)
    with pytest.raises(UserError, match=message):
        small(store, **change)


def test_volumes_that_leave_no_room_before_the_slab_are_named(tmp_path: Path) -> None:
    store = store_without_files(tmp_path, [1, 1])
    with pytest.raises(UserError, match="0-0: axis of 12 cannot hold a training crop"):
        small(store, held_out=HeldOut(store.entries, 0.8))


def test_volumes_held_out_whole_are_never_drawn_and_the_others_are_drawn_whole(tmp_path: Path) -> None:
    store = store_without_files(tmp_path, [3, 1, 2])
    held_out = HeldOut(store.entries, 0.3, "volumes", frozenset({1, 4}))
    batches = small(store, batch_size=12, held_out=held_out)
    plans = [batches.plan(step) for step in range(300)]
    assert {index for _, volume, _ in plans for index in volume.tolist()} == {0, 2, 3, 5}
    assert all((volume != volume[::-1]).all() for _, volume, _ in plans)
    starts = np.concatenate([start for _, _, start in plans])
    assert (starts.min(0) == 0).all()
    assert (starts.max(0) == 12 - 4).all()


def test_a_held_out_volume_may_be_too_small_but_one_must_be_left_to_mix(make_store: MakeStore) -> None:
    store, _ = make_store({"a0": ("a", (8, 8, 8)), "a1": ("a", (8, 8, 8)), "a2": ("a", (3, 8, 8))})
    small(store, held_out=HeldOut(store.entries, 0.3, "volumes", frozenset({2})))
    with pytest.raises(UserError, match=r"1 volume\(s\) to train on"):
        small(store, held_out=HeldOut(store.entries, 0.6, "volumes", frozenset({1, 2})))


def test_one_volume_is_refused_and_so_is_a_negative_step(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"1 volume\(s\) to train on, 0 held out, expected at least 2"):
        small(store_without_files(tmp_path, [1]))
    with pytest.raises(IndexError, match="-1"):
        small(store_without_files(tmp_path, [2])).plan(-1)


def test_crops_at_given_corners(make_store: MakeStore) -> None:
    store, latents = make_store(THREE_DOMAINS)
    crops = sample_crops(store, 3, [(0, 0, 0), (10, 4, 2)], 4)
    assert torch.equal(crops[0], latents["b0"][:, :4, :4, :4])
    assert torch.equal(crops[1], latents["b0"][:, 10:14, 4:8, 2:6])
