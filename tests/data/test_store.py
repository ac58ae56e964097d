from __future__ import annotations

import json
import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from meduet_fast.data import store as store_module
from meduet_fast.data.store import LatentStore
from meduet_fast.data.store_writer import StoreWriter
from meduet_fast.errors import UserError

from .conftest import MakeStore, record

TWO = {"b": ("mr", (9, 8, 7)), "a": ("ct", (6, 7, 8))}


def writer_for(path: Path, tokenizer: str = "fake-1") -> StoreWriter:
    return StoreWriter(path, tokenizer=tokenizer, tokenizer_spec="fake", channels=4, compression=4)


def edit_index(store: LatentStore, **changes: object) -> None:
    path = store.path / "index.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_volumes_and_labels_survive_the_round_trip(make_store: MakeStore) -> None:
    store, latents = make_store(TWO)
    assert [entry.name for entry in store.entries] == ["a", "b"]
    assert store.domains == ["ct", "mr"]
    assert [store.domain_id(0), store.domain_id(1)] == [0, 1]
    assert (store.index.tokenizer, store.index.channels, store.index.compression) == ("fake-1", 4, 4)
    entry = store.entries[0]
    assert (entry.body_part, entry.shape, entry.grid) == ("chest", (4, 6, 7, 8), (6, 7, 8))
    assert (entry.spacing, entry.content_key, entry.source) == ((1.5, 1.5, 1.5), "key-a", "/input/a.nii.gz")
    for index, name in enumerate("ab"):
        assert torch.equal(store.read_volume(index), latents[name])


def test_the_file_is_plain_safetensors_with_labels_in_its_header(make_store: MakeStore) -> None:
    store, latents = make_store(TWO)
    with safe_open(store.path / "latents" / "a.safetensors", "pt") as file:
        assert torch.equal(file.get_tensor("latent"), latents["a"])
        metadata = file.metadata()
    assert metadata == store.metadata(0)
    assert (metadata["domain"], metadata["body_part"], metadata["tokenizer"]) == ("ct", "chest", "fake-1")
    assert json.loads(metadata["affine"]) == np.diag([1.5, 1.5, 1.5, 1]).tolist()
    assert json.loads(metadata["spacing"]) == [1.5, 1.5, 1.5]
    assert json.loads(metadata["intensity"]) == {"kind": "ct_window", "low": -175.0, "high": 250.0}
    assert metadata["content_key"] == "key-a"


def test_everyone_whom_the_umask_allows_can_read_the_store(make_store: MakeStore) -> None:
    store, _ = make_store(TWO)
    modes = {path.stat().st_mode & 0o777 for path in store.path.rglob("*.*")}
    umask = os.umask(0)
    os.umask(umask)
    assert modes == {0o666 & ~umask}


def test_crops_equal_slices_of_the_volume(make_store: MakeStore) -> None:
    store, latents = make_store(TWO)
    crops = store.read_crops([0, 1, 0], [(0, 0, 0), (6, 4, 2), (3, 1, 5)], (3, 4, 2))
    assert crops.dtype == torch.bfloat16
    assert torch.equal(crops[0], latents["a"][:, :3, :4, :2])
    assert torch.equal(crops[1], latents["b"][:, 6:9, 4:8, 2:4])
    assert torch.equal(crops[2], latents["a"][:, 3:6, 1:5, 5:7])
    assert torch.equal(store.read_crops([1], [(1, 2, 3)], (2, 2, 2))[0], latents["b"][:, 1:3, 2:4, 3:5])


@pytest.mark.parametrize("start", [(-1, 0, 0), (4, 0, 0), (0, 5, 0), (0, 0, 6)])
def test_a_crop_that_leaves_its_volume_is_refused(make_store: MakeStore, start: tuple[int, int, int]) -> None:
    store, _ = make_store(TWO)
    with pytest.raises(ValueError, match=r"leaves volume a of \(6, 7, 8\)"):
        store.read_crops([0], [start], (3, 3, 3))


def test_open_maps_are_bounded_and_hold_no_descriptor(
    make_store: MakeStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_module, "MAX_OPEN_MAPS", 3)
    store, latents = make_store({f"v{i}": ("ct", (3, 3, 3)) for i in range(8)})
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(2):
        for index in range(8):
            assert torch.equal(store.read_volume(index), latents[f"v{index}"])
            assert len(store._maps) <= 3
    assert len(list(Path("/proc/self/fd").iterdir())) == before


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_an_open_store_is_usable_in_a_child_process(make_store: MakeStore, method: str) -> None:
    store, latents = make_store(TWO)
    store.read_volume(1)
    context = multiprocessing.get_context(method)
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        received = pool.submit(store.read_volume, 1).result(timeout=120)
    assert torch.equal(received, latents["b"])


def test_a_folder_without_a_store_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nothing: not a latent store .*meduet-fast prepare"):
        LatentStore.open(tmp_path / "nothing")
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="not a latent store"):
        LatentStore.open(tmp_path / "file")


def test_a_damaged_index_is_named(make_store: MakeStore) -> None:
    store, _ = make_store(TWO)
    (store.path / "index.json").write_text('{"format": "meduet-fa')
    with pytest.raises(UserError, match=r"index\.json: damaged index"):
        LatentStore.open(store.path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "other"}, "not the index of a latent store"),
        ({"version": 99}, "store version 99, expected 1"),
        ({"entries": [{"name": "a"}]}, "damaged index"),
        ({"entries": "a"}, "damaged index"),
        ({"channels": 8}, r"volume a has shape \(4, 6, 7, 8\), expected 8 channels"),
    ],
)
def test_a_wrong_index_is_named(make_store: MakeStore, changes: dict[str, object], message: str) -> None:
    store, _ = make_store(TWO)
    edit_index(store, **changes)
    with pytest.raises(UserError, match=message):
        LatentStore.open(store.path)


def test_an_entry_cannot_point_outside_the_store(make_store: MakeStore) -> None:
    store, _ = make_store(TWO)
    entries = json.loads((store.path / "index.json").read_text())["entries"]
    edit_index(store, entries=[{**entries[0], "name": "../../a"}])
    with pytest.raises(UserError, match="is not a file name"):
        LatentStore.open(store.path)


def _missing(path: Path) -> None:
    path.unlink()


def _truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


def _empty(path: Path) -> None:
    path.write_bytes(b"")


def _header_garbage(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[8:40] = b"\xff" * 32
    path.write_bytes(data)


def _other_dtype(path: Path) -> None:
    save_file({"latent": torch.zeros(4, 6, 7, 8)}, path, metadata={"content_key": "key-a"})


def _other_shape(path: Path) -> None:
    save_file({"latent": torch.zeros(4, 6, 7, 9).bfloat16()}, path, metadata={"content_key": "key-a"})


def _other_key(path: Path) -> None:
    save_file({"latent": torch.zeros(4, 6, 7, 8).bfloat16()}, path, metadata={"content_key": "other"})


def _other_tensor(path: Path) -> None:
    save_file({"image": torch.zeros(4, 6, 7, 8).bfloat16()}, path, metadata={"content_key": "key-a"})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_missing, "missing"),
        (_truncated, "truncated or altered"),
        (_empty, r"not a safetensors file, or truncated \(0 bytes\)"),
        (_header_garbage, "damaged header"),
        (_other_dtype, "tensor F32"),
        (_other_shape, r"shape \(4, 6, 7, 9\), the index says \(4, 6, 7, 8\)"),
        (_other_key, "content key differs"),
        (_other_tensor, "damaged header"),
    ],
)
def test_a_damaged_latent_file_is_named_when_first_read(
    make_store: MakeStore, damage: Callable[[Path], object], message: str
) -> None:
    store, latents = make_store(TWO)
    damage(store.path / "latents" / "a.safetensors")
    reopened = LatentStore.open(store.path)
    with pytest.raises(UserError, match=r"a\.safetensors: .*" + message):
        reopened.read_volume(0)
    assert torch.equal(reopened.read_volume(1), latents["b"])


def test_a_second_writer_is_refused_until_the_first_leaves(make_store: MakeStore) -> None:
    store, _ = make_store(TWO)
    with writer_for(store.path), pytest.raises(UserError, match="in use by process"):
        writer_for(store.path).__enter__()
    with writer_for(store.path) as writer:
        assert set(writer.entries) == {"a", "b"}


def test_a_folder_with_other_content_is_refused(tmp_path: Path) -> None:
    (tmp_path / "holiday.jpg").write_text("x")
    with pytest.raises(UserError, match="not empty and not a latent store"):
        writer_for(tmp_path).__enter__()
    with pytest.raises(UserError, match="cannot be used as a latent store"):
        writer_for(tmp_path / "holiday.jpg").__enter__()
    assert [item.name for item in tmp_path.iterdir()] == ["holiday.jpg"]


def test_another_tokenizer_empties_the_store(make_store: MakeStore) -> None:
    store, _ = make_store(TWO)
    with writer_for(store.path, tokenizer="fake-2") as writer:
        assert writer.entries == {}
    assert LatentStore.open(store.path).entries == []
    assert list((store.path / "latents").iterdir()) == []


def test_what_a_killed_writer_left_is_removed(make_store: MakeStore) -> None:
    store, _ = make_store(TWO)
    leftovers = [
        store.path / "latents" / ".c.safetensors.tmp123",
        store.path / "latents" / "c.safetensors",
        store.path / ".index.json.tmp123",
    ]
    for leftover in leftovers:
        leftover.write_bytes(b"half")
    with writer_for(store.path):
        pass
    assert not any(leftover.exists() for leftover in leftovers)
    assert sorted(item.name for item in (store.path / "latents").iterdir()) == [
        "a.safetensors",
        "b.safetensors",
    ]


def test_dropping_unlists_and_deletes(make_store: MakeStore) -> None:
    store, latents = make_store(TWO)
    with writer_for(store.path) as writer:
        writer.drop(["a"])
        assert [entry.name for entry in LatentStore.open(store.path).entries] == ["b"]
    assert not (store.path / "latents" / "a.safetensors").exists()
    assert torch.equal(LatentStore.open(store.path).read_volume(0), latents["b"])


def test_a_failed_write_leaves_the_old_content_visible(
    make_store: MakeStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, latents = make_store(TWO)

    def no_space(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", no_space)
    with (
        pytest.raises(UserError, match=r"c\.safetensors: cannot be written: .*No space left"),
        writer_for(store.path) as writer,
    ):
        writer.add(record("c", "ct", latents["a"]))
    reopened = LatentStore.open(store.path)
    assert [e.name for e in reopened.entries] == ["a", "b"]
    assert torch.equal(reopened.read_volume(0), latents["a"])


def test_latents_of_another_channel_count_are_refused(make_store: MakeStore) -> None:
    store, latents = make_store(TWO)
    with writer_for(store.path) as writer, pytest.raises(ValueError, match=r"expected \(4, X, Y, Z\)"):
        writer.add(record("c", "ct", latents["a"][:3]))
