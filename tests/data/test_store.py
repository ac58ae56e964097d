from __future__ import annotations

import ctypes
import itertools
import json
import mmap
import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from meduet_fast.data.latent_file import CropReader, open_latents, read_header
from meduet_fast.data.store import LatentStore
from meduet_fast.data.store_writer import StoreWriter
from meduet_fast.errors import UserError

from .conftest import MakeStore, record

TWO = {"b": ("mr", (9, 8, 7)), "a": ("ct", (6, 7, 8))}


def writer_for(path: Path, tokenizer: str = "fake-1") -> StoreWriter:
    return StoreWriter(path, tokenizer=tokenizer, tokenizer_spec="fake", channels=4, compression=4)


def edit_head(store: LatentStore, **changes: object) -> None:
    path = store.path / "index.jsonl"
    head, rest = path.read_text().split("\n", 1)
    path.write_text(f"{json.dumps({**json.loads(head), **changes})}\n{rest}")


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
    with safe_open(store.path / "latents" / "b.safetensors", "pt") as file:
        chunks = file.get_tensor("latent")
        metadata = file.metadata()
    assert chunks.shape == (2, 1, 1, 4, 8, 8, 8)
    whole = chunks.permute(3, 0, 4, 1, 5, 2, 6).reshape(4, 16, 8, 8)
    assert torch.equal(whole[:, :9, :, :7], latents["b"])
    assert not whole[:, 9:].any()
    assert not whole[..., 7:].any()
    assert metadata == store.metadata(1)
    assert json.loads(metadata["shape"]) == [4, 9, 8, 7]
    assert (metadata["domain"], metadata["body_part"], metadata["tokenizer"]) == ("mr", "chest", "fake-1")
    assert json.loads(metadata["affine"]) == np.diag([1.5, 1.5, 1.5, 1]).tolist()
    assert json.loads(metadata["spacing"]) == [1.5, 1.5, 1.5]
    assert json.loads(metadata["intensity"]) == {"kind": "ct_window", "low": -175.0, "high": 250.0}
    assert metadata["content_key"] == "key-b"


def test_everyone_whom_the_umask_allows_can_read_the_store(make_store: MakeStore) -> None:
    store, _ = make_store(TWO)
    modes = {path.stat().st_mode & 0o777 for path in store.path.rglob("*.*")}
    umask = os.umask(0)
    os.umask(umask)
    assert modes == {0o666 & ~umask}


@pytest.mark.parametrize("version", [1, 2])
def test_crops_equal_slices_of_the_volume(
    make_store: MakeStore, as_version_1: Callable[[Path], LatentStore], version: int
) -> None:
    store, latents = make_store({**TWO, "c": ("ct", (17, 25, 19))})
    if version == 1:
        store = as_version_1(store.path)
    crops = store.read_crops([0, 1, 0], [(0, 0, 0), (6, 4, 2), (3, 1, 5)], (3, 4, 2))
    assert crops.dtype == torch.bfloat16
    assert torch.equal(crops[0], latents["a"][:, :3, :4, :2])
    assert torch.equal(crops[1], latents["b"][:, 6:9, 4:8, 2:4])
    assert torch.equal(crops[2], latents["a"][:, 3:6, 1:5, 5:7])
    assert torch.equal(store.read_crops([1], [(1, 2, 3)], (2, 2, 2))[0], latents["b"][:, 1:3, 2:4, 3:5])
    grid = (17, 25, 19)
    for size in ((1, 1, 1), (8, 8, 8), (9, 16, 3), grid):
        choices = [{0, 7, 8, whole - edge} for whole, edge in zip(grid, size, strict=True)]
        for x, y, z in itertools.product(*choices):
            window = (slice(None), slice(x, x + size[0]), slice(y, y + size[1]), slice(z, z + size[2]))
            if latents["c"][window].shape[1:] == size:
                assert torch.equal(store.read_crops([2], [(x, y, z)], size)[0], latents["c"][window])


def test_a_cold_crop_reads_its_chunks_and_no_more(make_store: MakeStore) -> None:
    store, latents = make_store({"a": ("ct", (60, 60, 56))})
    path = store.path / "latents" / "a.safetensors"
    for start in ((5, 13, 23), (0, 0, 0), (36, 36, 32)):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            held = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            before = pages_in_memory(held)
            crop = LatentStore.open(store.path).read_crops([0], [start], (24, 24, 24))
            read = pages_in_memory(held) - before
        window = tuple(slice(first, first + 24) for first in start)
        assert torch.equal(crop[0], latents["a"][(slice(None), *window)])
        assert before == 0
        assert 27 <= read <= 1 + 64, start  # pages of 4 KiB: the header, and a chunk each


def pages_in_memory(held: mmap.mmap) -> int:
    states = (ctypes.c_ubyte * -(-len(held) // mmap.PAGESIZE))()
    address = np.frombuffer(held, dtype=np.uint8).ctypes.data
    library = ctypes.CDLL(None, use_errno=True)
    assert library.mincore(ctypes.c_void_p(address), ctypes.c_size_t(len(held)), states) == 0
    return sum(state & 1 for state in states)


def test_no_file_stays_open(make_store: MakeStore) -> None:
    store, latents = make_store({f"v{i}": ("ct", (3, 3, 3)) for i in range(8)})
    before = len(list(Path("/proc/self/fd").iterdir()))
    for index in range(8):
        assert torch.equal(store.read_volume(index), latents[f"v{index}"])
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


@pytest.mark.parametrize(
    "text",
    [
        "",
        '{"format": "meduet-fa',
        "{HEAD}{nothing\n",
        "{HEAD}[]\n",
        '{HEAD}{"name": "a"}\n',
        '{HEAD}{"name": "a", "shape": [4, 6, 7]}\n',
    ],
)
def test_a_damaged_index_is_named(make_store: MakeStore, text: str) -> None:
    store, _ = make_store(TWO)
    index = store.path / "index.jsonl"
    head = index.read_text().partition("\n")[0] + "\n"
    index.write_text(text.replace("{HEAD}", head))
    with pytest.raises(UserError, match=r"index\.jsonl: damaged index .* prepare it again"):
        LatentStore.open(store.path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "other"}, "not the index of a latent store"),
        ({"version": 99}, "store version 99, expected 2"),
        ({"channels": "four"}, "damaged index"),
        ({"channels": 8}, r"volume a has shape \(4, 6, 7, 8\), expected 8 channels"),
    ],
)
def test_a_wrong_index_is_named(make_store: MakeStore, changes: dict[str, object], message: str) -> None:
    store, _ = make_store(TWO)
    edit_head(store, **changes)
    with pytest.raises(UserError, match=message):
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
def test_a_wrong_index_of_version_1_is_named(
    make_store: MakeStore,
    as_version_1: Callable[[Path], LatentStore],
    changes: dict[str, object],
    message: str,
) -> None:
    store = as_version_1(make_store(TWO)[0].path)
    path = store.path / "index.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(UserError, match=rf"index\.json: .*{message}"):
        LatentStore.open(store.path)


@pytest.mark.parametrize("name", ["../../a", "", "..", "a/b"])
def test_an_entry_cannot_point_outside_the_store(make_store: MakeStore, name: str) -> None:
    store, _ = make_store(TWO)
    index = store.path / "index.jsonl"
    index.write_text(index.read_text().replace('"name": "a"', f'"name": "{name}"'))
    with pytest.raises(UserError, match="is not a file name"):
        LatentStore.open(store.path)


def test_a_volume_is_listed_as_soon_as_it_is_whole(make_store: MakeStore) -> None:
    store, latents = make_store(TWO)
    index = store.path / "index.jsonl"
    before = index.read_bytes()
    with writer_for(store.path) as writer:
        for name in ("d", "c"):
            writer.add(record(name, "ct", latents["a"]))
            opened = LatentStore.open(store.path)
            assert torch.equal(opened.read_volume(2), latents["a"])
            assert index.read_bytes().startswith(before), "rewritten"
        assert [entry.name for entry in opened.entries] == ["a", "b", "c", "d"]
        writer.drop(["b"])
        assert [entry.name for entry in LatentStore.open(store.path).entries] == ["a", "c", "d"]
        assert index.read_bytes().startswith(before), "rewritten"
    lines = index.read_text().splitlines()
    assert [json.loads(line).get("name") for line in lines] == [None, "a", "c", "d"]


def test_half_a_line_at_the_end_does_not_count(make_store: MakeStore) -> None:
    store, latents = make_store(TWO)
    index = store.path / "index.jsonl"
    whole = index.read_bytes()
    end = whole.index(b'{"name": "b"')
    for cut in range(end, len(whole)):
        index.write_bytes(whole[:cut])
        assert [entry.name for entry in LatentStore.open(store.path).entries] == ["a"]
    with writer_for(store.path) as writer:  # of a volume that is not listed the file goes
        assert not (store.path / "latents" / "b.safetensors").exists()
        writer.add(record("b", "mr", latents["b"]))
    assert index.read_bytes() == whole


def test_a_full_disk_leaves_no_half_line_before_the_next(
    make_store: MakeStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, latents = make_store(TWO)
    write = os.write
    left = [5]

    def little_space(descriptor: int, data: memoryview) -> int:
        if not left[0]:
            raise OSError(28, "No space left on device")
        written = write(descriptor, data[: left[0]])
        left[0] -= written
        return written

    with writer_for(store.path) as writer:
        with monkeypatch.context() as patch:
            patch.setattr(os, "write", little_space)
            with pytest.raises(UserError, match=r"index\.jsonl: cannot be written: No space left"):
                writer.drop(["a"])
        writer.add(record("c", "ct", latents["a"]))
        assert [entry.name for entry in LatentStore.open(store.path).entries] == ["a", "b", "c"]


def test_a_store_of_version_1_is_read_and_becomes_one_of_version_2(
    make_store: MakeStore, as_version_1: Callable[[Path], LatentStore]
) -> None:
    store, latents = make_store(TWO)
    index_before = (store.path / "index.jsonl").read_bytes()
    sizes = [(store.path / entry.file).stat().st_size for entry in store.entries]
    labels = [store.metadata(index) for index in (0, 1)]
    old = as_version_1(store.path)
    assert (old.entries, old.index) == (store.entries, store.index)
    for index, name in enumerate("ab"):
        assert torch.equal(old.read_volume(index), latents[name])
        assert "shape" not in old.metadata(index)
    with writer_for(store.path) as writer:
        assert writer.upgrade("a")[1]
        assert not writer.upgrade("a")[1]
        half = LatentStore.open(store.path)
        for index, name in enumerate("ab"):
            assert torch.equal(half.read_volume(index), latents[name])
            assert torch.equal(old.read_volume(index), latents[name])  # opened before
        assert writer.upgrade("b")[1]
    assert (store.path / "index.jsonl").read_bytes() == index_before
    assert not (store.path / "index.json").exists()
    assert [(store.path / entry.file).stat().st_size for entry in store.entries] == sizes
    assert [store.metadata(index) for index in (0, 1)] == labels
    for index, name in enumerate("ab"):
        assert torch.equal(store.read_volume(index), latents[name])


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


def _chunks_of_another_shape(path: Path) -> None:
    labels = {"content_key": "key-a", "shape": "[4, 6, 7, 9]"}
    save_file({"latent": torch.zeros(1, 1, 1, 4, 8, 8, 8).bfloat16()}, path, metadata=labels)


def _chunks_without_a_shape(path: Path) -> None:
    labels = {"content_key": "key-a"}
    save_file({"latent": torch.zeros(1, 1, 1, 4, 8, 8, 8).bfloat16()}, path, metadata=labels)


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
        (_chunks_of_another_shape, r"tensor BF16 \(1, 1, 1, 4, 8, 8, 8\)"),
        (_chunks_without_a_shape, "damaged header"),
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


def _is_a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_missing, "listed in the index but missing"),
        (_truncated, "truncated or altered"),
        (lambda path: os.truncate(path, 100), r"truncated \(100 bytes\)"),
        (_other_key, "content key differs"),
        (_is_a_folder, "cannot be read: Is a directory"),
    ],
)
def test_a_file_that_is_harmed_after_it_was_read_is_named(
    make_store: MakeStore,
    as_version_1: Callable[[Path], LatentStore],
    damage: Callable[[Path], object],
    message: str,
    version: int,
) -> None:
    store, latents = make_store(TWO)
    if version == 1:
        store = as_version_1(store.path)
    store.read_volume(0)
    damage(store.path / "latents" / "a.safetensors")
    with pytest.raises(UserError, match=r"a\.safetensors: .*" + message):
        store.read_crops([1, 0], [(0, 0, 0), (1, 1, 1)], (2, 2, 2))
    assert torch.equal(store.read_volume(1), latents["b"])


def test_a_file_that_is_cut_short_while_it_is_read_is_named(make_store: MakeStore) -> None:
    store, _ = make_store(TWO)
    path = store.path / "latents" / "a.safetensors"
    crop = np.empty((4, 2, 2, 2), dtype=np.int16)
    with open_latents(path) as descriptor:
        _, layout = read_header(descriptor, path, store.entries[0])
        os.truncate(path, layout.first + 100)
        with pytest.raises(UserError, match=r"a\.safetensors: ends before byte 8192: truncated or altered"):
            CropReader().read(descriptor, path, layout, (0, 0, 0), crop)


def test_names_and_labels_may_be_in_any_script(make_store: MakeStore) -> None:
    store, latents = make_store({"a": ("ct", (2, 2, 2))})
    name, source = "Müller.1 日本", "/scans/caf\udce9.nii"  # a file name that is not UTF-8
    with writer_for(store.path) as writer:
        writer.add(replace(record(name, "Größe", latents["a"]), source=source))
        assert LatentStore.open(store.path).entries[0].source == source
    opened = LatentStore.open(store.path)
    assert [(entry.name, entry.domain) for entry in opened.entries] == [(name, "Größe"), ("a", "ct")]
    assert torch.equal(opened.read_volume(0), latents["a"])


def test_a_second_writer_is_refused_until_the_first_leaves(make_store: MakeStore) -> None:
    store, _ = make_store(TWO)
    with writer_for(store.path), pytest.raises(UserError, match="in use by process"):
        writer_for(store.path).__enter__()
    with writer_for(store.path) as writer:
        assert set(writer.entries) == {"a", "b"}


def test_a_writer_whose_store_was_taken_over_changes_nothing_more(
    make_store: MakeStore, as_version_1: Callable[[Path], LatentStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    store, _ = make_store(TWO)
    as_version_1(store.path)
    file, index = store.path / "latents" / "a.safetensors", store.path / "index.jsonl"
    before = file.read_bytes()
    writer = writer_for(store.path).__enter__()
    monkeypatch.setattr(writer._lock, "_taken_by", "another")
    index.write_bytes(b"the other's")
    for change in (lambda: writer.upgrade("a"), lambda: writer.drop(["a"]), writer.__exit__):
        with pytest.raises(UserError, match="taken over by another"):
            change()
    assert index.read_bytes() == b"the other's"
    assert file.read_bytes() == before


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
        store.path / ".index.jsonl.tmp123",
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
