"""Batches of windows with their factors: which are drawn, what is in them, and what is refused."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from meduet_fast.data.held_out import HELD_OUT_VOLUMES, HeldOut
from meduet_fast.data.loader import crop_loader
from meduet_fast.data.store import LatentStore
from meduet_fast.engine import EngineConfig
from meduet_fast.errors import UserError
from meduet_fast.models import MeDUETConfig
from meduet_fast.synthesis.crops import (
    FactorCrops,
    Given,
    WindowBatches,
    check_table,
    held_out_windows,
    training_windows,
)
from meduet_fast.synthesis.factors import FactorsConfig, FactorTable, write_factors

from .material import CONFIG, PATCH_4, VOLUMES, Volumes, write_run, write_store

WINDOW = (6, 4, 2)


def table_of(
    folder: Path, volumes: Volumes, config: MeDUETConfig = CONFIG, **settings: Any
) -> tuple[LatentStore, FactorTable]:
    store = write_store(folder / "store", volumes)
    run = write_run(folder / "run", store.path, config=config)
    write_factors(run, store.path, folder / "table", FactorsConfig(device="cpu", batch_size=32, **settings))
    return store, FactorTable.open(folder / "table")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[LatentStore, FactorTable]:
    """Store and table of all tests that only read them."""
    settings = {"window": WINDOW, "stride": 2, "tokens": True, "exchanged": 2}
    return table_of(tmp_path_factory.mktemp("made"), VOLUMES, **settings)


@pytest.fixture
def store(made: tuple[LatentStore, FactorTable]) -> LatentStore:
    return made[0]


@pytest.fixture
def table(made: tuple[LatentStore, FactorTable]) -> FactorTable:
    return made[1]


def batches_of(store: LatentStore, table: FactorTable, **changes: Any) -> WindowBatches:
    places = {"batch_size": 7, "seed": 5, "held_out": HeldOut(store.entries, 0.4)}
    places |= {name: changes.pop(name) for name in places.keys() & changes.keys()}
    return WindowBatches(store, table, **places, given=Given(**changes))


def test_a_batch_holds_the_windows_that_it_names(store: LatentStore, table: FactorTable) -> None:
    batches = batches_of(store, table, tokens=True, aligned=True)
    batch = batches[3]
    assert {name: (tuple(item.shape), item.dtype) for name, item in batch.items()} == batches.layout()
    assert batch["latents"].shape == (7, 4, *WINDOW)
    assert batch["content_map"].shape == (7, 3, 2, 1, 12)
    for row, index in enumerate(batches.plan(3).tolist()):
        volume, start = int(batch["volume"][row]), batch["start"][row].tolist()
        x, y, z = start
        assert (volume, start) == (int(table.volume[index]), table.start[index].tolist())
        crop = store.read_volume(volume)[:, x : x + 6, y : y + 4, z : z + 2]
        assert torch.equal(batch["latents"][row], crop)
        assert torch.equal(batch["content"][row], table.content[index])
        assert torch.equal(batch["style"][row], table.style[index])
        assert store.domains[batch["domain"][row]] == store.entries[volume].domain
        own = table.content_map(volume, start, WINDOW)
        both = torch.cat([own, table.style_map(volume, start, WINDOW)], -1).bfloat16()
        assert torch.equal(batch["aligned_map"][row], both)
        others = [table.content_map(volume, start, WINDOW, number) for number in (0, 1)]
        found = batch["content_map"][row].float()
        assert sum(torch.equal(found, other) for other in others) == 1
        assert not torch.equal(found, own)


def test_both_exchanged_styles_are_drawn(store: LatentStore, table: FactorTable) -> None:
    batches, counts = batches_of(store, table, tokens=True), Counter[int]()
    for number in range(6):
        batch = batches[number]
        for volume, start, found in zip(batch["volume"], batch["start"], batch["content_map"], strict=True):
            place = int(volume), start.tolist(), WINDOW
            counts[int(torch.equal(found.float(), table.content_map(*place, 1)))] += 1
    assert min(counts[0], counts[1]) > 8  # of 42


def test_a_share_of_the_crops_is_shown_in_another_style(store: LatentStore, table: FactorTable) -> None:
    """With the style that it then has, and its content told in any style but that one."""
    batches = batches_of(store, table, tokens=True, aligned=True, exchanged_share=0.5)
    pairs = Counter[tuple[int | None, int | None]]()
    for number in range(8):
        batch, rows = batches[number], batches.plan(number)
        plain = batches_of(store, table, tokens=True, aligned=True)[number]
        for row, pair in enumerate(zip(*batches.styles(number), strict=True)):
            pairs[pair] += 1
            shown, told = pair
            place = int(batch["volume"][row]), batch["start"][row].tolist(), WINDOW
            assert torch.equal(batch["content"][row], table.content[rows[row]])
            assert torch.equal(batch["content_map"][row].float(), table.content_map(*place, told))
            if shown is None:
                for name in ("latents", "style", "aligned_map"):
                    assert torch.equal(batch[name][row], plain[name][row])
                continue
            latents = table.exchanged_latents(*place, shown)
            style = table.style_map(*place, shown)
            assert torch.equal(batch["latents"][row], latents)
            assert torch.equal(batch["style"][row], style.mean((0, 1, 2)))
            aligned = torch.cat([table.content_map(*place, shown), style], -1).bfloat16()
            assert torch.equal(batch["aligned_map"][row], aligned)
            assert not torch.equal(latents, plain["latents"][row])
    assert pairs.keys() == {(None, 0), (None, 1), (0, None), (0, 1), (1, None), (1, 0)}
    assert min(pairs.values()) > 2  # of 56


def test_a_crop_in_another_style_can_have_that_of_its_volume(store: LatentStore, table: FactorTable) -> None:
    batches = batches_of(store, table, factors="volume", tokens=True, exchanged_share=0.5)
    batch, (shown, told) = batches[1], batches.styles(1)
    assert {style is None for style in shown} == {False, True}
    for row, style in enumerate(shown):
        volume, start = int(batch["volume"][row]), batch["start"][row].tolist()
        record = table.volumes[volume]
        size = [edge // 2 * 2 for edge in record["shape"][1:]]
        expected = (
            table.volume_factors()[1][volume]
            if style is None
            else table.style_map(volume, record["first"], size, style).mean((0, 1, 2))
        )
        torch.testing.assert_close(batch["style"][row], expected, rtol=0, atol=1e-6)
        own = table.content_map(volume, start, WINDOW, told[row])
        assert torch.equal(batch["content_map"][row].float(), own)


def test_tokens_are_standardised_within_their_volume(store: LatentStore, table: FactorTable) -> None:
    batches = batches_of(store, table, tokens=True, standardised=True, exchanged_share=0.5)
    batch, (_, told) = batches[1], batches.styles(1)
    for row, style in enumerate(told):
        volume, start = int(batch["volume"][row]), batch["start"][row].tolist()
        first, shape = table.volumes[volume]["first"], table.volumes[volume]["shape"][1:]
        whole = table.content_map(volume, first, [edge // 2 * 2 for edge in shape], style)
        flat = whole.flatten(0, 2).double()
        box = table.content_map(volume, start, WINDOW, style).double()
        expected = (box - flat.mean(0)) / flat.std(0, correction=0)
        torch.testing.assert_close(batch["content_map"][row].double(), expected, rtol=0.02, atol=0.02)


def test_without_exchanged_styles_maps_are_in_their_own(tmp_path: Path) -> None:
    store, table = table_of(tmp_path, {"a": ("a", (6, 4, 4))}, tokens=True)
    batch = batches_of(store, table, tokens=True, held_out=HeldOut(store.entries))[0]
    for start, found in zip(batch["start"], batch["content_map"], strict=True):
        assert torch.equal(found.float(), table.content_map(0, start.tolist(), (4, 4, 4)))
    with pytest.raises(UserError, match="a table without exchanged styles; make one with `factors"):
        batches_of(store, table, exchanged_share=0.1, held_out=HeldOut(store.entries))


def test_a_volumes_own_pair_can_stand_for_its_windows(store: LatentStore, table: FactorTable) -> None:
    batch = batches_of(store, table, factors="volume")[0]
    content, style = table.volume_factors()
    assert torch.equal(batch["content"], content[batch["volume"]])
    assert torch.equal(batch["style"], style[batch["volume"]])
    assert set(batch) == {"latents", "content", "style", "domain", "volume", "start"}


@pytest.mark.parametrize("size", [1, 2, 7])
def test_domains_are_balanced_and_all_training_windows_are_drawn(
    store: LatentStore, table: FactorTable, size: int
) -> None:
    held_out = HeldOut(store.entries, 0.4)
    batches = batches_of(store, table, batch_size=size, held_out=held_out)
    drawn, of_volume = Counter[int](), Counter[int]()
    for number in range(2400 // size):
        rows = batches.plan(number)
        domains = [store.domain_id(index) for index in batches.volumes(number).tolist()]
        counts = [domains.count(domain) for domain in range(3)]
        assert max(counts) - min(counts) <= 1
        drawn.update(rows.tolist())
        of_volume.update(batches.volumes(number).tolist())
    assert sorted(drawn) == training_windows(table, held_out).tolist()
    shares = np.array([of_volume[index] for index in range(4)]) / sum(of_volume.values())
    # Six standard deviations of a share estimated from 2400 draws are below 0.06.
    assert np.abs(shares - [1 / 6, 1 / 6, 1 / 3, 1 / 3]).max() < 0.06
    for index in range(4):
        own = [count for row, count in drawn.items() if int(table.volume[row]) == index]
        assert max(own) < 3 * min(own)


@pytest.mark.parametrize("fraction", [0.0, 0.3, 0.5])
def test_windows_lie_on_one_side_of_the_border(
    store: LatentStore, table: FactorTable, fraction: float
) -> None:
    held_out = HeldOut(store.entries, fraction)
    trained, held = training_windows(table, held_out), held_out_windows(table, held_out)
    for index, entry in enumerate(store.entries):
        border = held_out.border(index, 6, 2)
        assert border == entry.grid[0] if fraction == 0 else border % 2 == 0
        assert border <= held_out.border(index, 6)
        own = table.volume == index
        for row in torch.nonzero(own).flatten().tolist():
            first = int(table.start[row, 0])
            assert (row in trained) == (first + 6 <= border)
            assert (row in held) == (first >= border)
        assert own[trained].any()
        assert own[held].any() == (fraction > 0)


def test_volumes_held_out_whole_are_never_drawn(store: LatentStore, table: FactorTable) -> None:
    held_out = HeldOut(store.entries, 0.3, "volumes", frozenset({1}))
    assert {*table.volume[held_out_windows(table, held_out)].tolist()} == {1}
    batches = batches_of(store, table, held_out=held_out)
    drawn = {index for number in range(40) for index in batches.volumes(number).tolist()}
    assert drawn == {0, 2, 3}
    crops = FactorCrops(store, table, EngineConfig(batch_size=3), held_out, Given())
    assert crops.record[HELD_OUT_VOLUMES] == ["a1"]


def test_patches_in_the_middle_have_held_out_windows_too(tmp_path: Path) -> None:
    """The grid begins behind the volume and ends before it."""
    volumes = {f"a{edge}": ("a", (edge, 8, 8)) for edge in (16, 17, 18, 19, 22, 23)}
    store, table = table_of(tmp_path, volumes, PATCH_4, stride=4)
    assert {record["first"][0] for record in table.volumes} == {0, 1}
    for rows in (HeldOut(store.entries, 0.1), HeldOut(store.entries, 0.35)):
        assert {*table.volume[held_out_windows(table, rows)].tolist()} == set(range(6))


@pytest.mark.parametrize("workers", [0, 2])
def test_readers_and_a_later_start_give_the_same_batches(
    store: LatentStore, table: FactorTable, workers: int
) -> None:
    batches = batches_of(store, table, tokens=True, aligned=True)
    for rank in (0, 1):
        loader = crop_loader(batches, rank=rank, world_size=2, start_step=2, total_steps=8, workers=workers)
        found = list(loader)
        assert len(found) == 3
        for number, batch in zip(range(2 + rank, 8, 2), found, strict=True):
            wanted = batches[number]
            assert batch.keys() == wanted.keys() == batches.layout().keys()
            assert all(torch.equal(batch[name], wanted[name]) for name in wanted)


def test_seed_and_number_each_change_the_batch(store: LatentStore, table: FactorTable) -> None:
    plans = [
        batches_of(store, table, seed=seed).plan(number).tobytes() for seed in (5, 6) for number in (0, 1)
    ]
    assert len(set(plans)) == 4
    with pytest.raises(IndexError, match="-1"):
        batches_of(store, table).plan(-1)


def test_the_engine_gets_a_stream(store: LatentStore, table: FactorTable, tmp_path: Path) -> None:
    config, held_out = EngineConfig(batch_size=5, seed=2, workers=0), HeldOut(store.entries, 0.4)
    crops = FactorCrops(store, table, config, held_out, Given())
    wanted = batches_of(store, table, batch_size=5, seed=2)
    [batch] = crops.read(3, 4, 0, 1, pin=False)
    assert all(torch.equal(batch[name], item) for name, item in wanted[3].items())
    assert crops.path == store.path
    assert crops.names(torch.tensor([2, 0])) == ["b0", "a0"]
    assert crops.reading() is None
    assert crops.record == {"factors": str(table.path), "factors_identity": table.identity}
    settings = FactorsConfig(window=WINDOW, device="cpu", seed=1)
    write_factors(store.path.parent / "run", store.path, tmp_path / "other", settings)
    other = FactorCrops(store, FactorTable.open(tmp_path / "other"), config, held_out, Given())
    assert other.identity != crops.identity


def test_what_does_not_fit_is_one_line(store: LatentStore, table: FactorTable, tmp_path: Path) -> None:
    other = write_store(tmp_path / "tokenizer", tokenizer="fake-2")
    with pytest.raises(
        UserError, match=r"table: factors of latents of tokenizer fake-1, .*tokenizer has those of"
    ):
        check_table(table, other)
    changed = write_store(tmp_path / "changed", {**VOLUMES, "b0": ("b", (12, 8, 8))})
    with pytest.raises(UserError, match=r"table: not a table of .*changed as it is: 1 volumes differ \(b0\)"):
        check_table(table, changed)
    fewer = write_store(tmp_path / "fewer", {name: VOLUMES[name] for name in ("a0", "b0")})
    with pytest.raises(UserError, match=r"2 volumes differ \(a1, c0\); make it anew"):
        check_table(table, fewer)
    with pytest.raises(UserError, match="table: volumes that cannot be divided: a0: axis of 13 cannot hold"):
        batches_of(store, table, held_out=HeldOut(store.entries, 0.8))


def test_no_training_window_and_no_tokens_are_one_line(tmp_path: Path) -> None:
    """The border leaves room for a window before it, but the grid of patches begins at 1."""
    volumes = {"a": ("a", (16, 8, 8)), "b": ("b", (18, 8, 8))}
    store, table = table_of(tmp_path, volumes, PATCH_4)
    with pytest.raises(UserError, match="table: a table without tokens; make one with `factors --tokens"):
        batches_of(store, table, tokens=True)
    with pytest.raises(UserError, match=r"table: no window to train on in b$"):
        batches_of(store, table)
