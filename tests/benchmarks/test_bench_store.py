"""A few volumes in place of many."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import bench_store
from benchmarks.bench_store import add_rows, crop_rows, loader_rows, made_up_index
from meduet_fast.data.store import LatentStore
from meduet_fast.data.store_index import INDEX_NAME


@pytest.fixture(autouse=True)
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_store, "LISTED", 30)
    monkeypatch.setattr(bench_store, "LOADED", 9)
    monkeypatch.setattr(bench_store, "GRID", (26, 25, 24))


def test_a_made_up_index_can_be_opened(tmp_path: Path) -> None:
    with (tmp_path / INDEX_NAME).open("wb") as file:
        file.writelines(made_up_index(100).lines())
    store = LatentStore.open(tmp_path)
    assert (len(store.entries), len(store.domains)) == (100, 40)


def test_every_variant_is_measured(tmp_path: Path) -> None:
    rows = [*add_rows(tmp_path, 2), *crop_rows(tmp_path, 3), *loader_rows(tmp_path, 2)]
    cases = [(row.case, row.variant) for row in rows if not row.unavailable]
    layouts = ["ours", "ours, version 1", "version 1, mapped"]
    assert [case for case in cases if "cold" not in case[0]] == [
        ("add a volume to 30", "ours"),
        ("add a volume to 30", "ours, 10 volumes"),
        *[("crop of 4x24^3, warm", name) for name in layouts],
        ("loader, 9 volumes", "ours"),
        ("loader, 9 volumes", "ours, 8 volumes"),
    ]
    cold = {row.variant: row.extra for row in rows if "cold" in row.case and not row.unavailable}
    if cold:  # else the disk does not count what is read from it
        assert list(cold) == layouts
        assert cold["ours"]["at_most"] <= 300
