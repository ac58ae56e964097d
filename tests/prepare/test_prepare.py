from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib.image
import nibabel as nib
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from meduet_fast.autoencoder import Tokenizer
from meduet_fast.data.dicom import Series
from meduet_fast.data.folders import LeftOut
from meduet_fast.data.intensity import IntensityRule
from meduet_fast.data.sources import VolumeEntry
from meduet_fast.data.store import LatentStore
from meduet_fast.data.transforms import TransformConfig, load_volume
from meduet_fast.errors import UserError
from meduet_fast.prepare import prepare as prepare_module
from meduet_fast.prepare.prepare import PrepareConfig, prepare, prepare_volumes
from meduet_fast.prepare.update import PrepareSummary, format_summary, locate

RULE = IntensityRule("ct_window", 0.0, 1000.0)
CONFIG = PrepareConfig(transform=TransformConfig(spacing=1.5, max_size=(64, 64, 64), min_size=16))


class PoolingTokenizer(Tokenizer):
    """Average pooling: as fast as can be, and easy to check."""

    channels, compression, scale = 4, 4, 1.0

    def __init__(self, identity: str = "pooling-1") -> None:
        self.identity = identity

    def encode(
        self, volume: Tensor, sample: bool = False, generator: torch.Generator | None = None
    ) -> Tensor:
        mean = F.avg_pool3d(volume, 4).repeat(1, 4, 1, 1, 1)
        return mean + torch.randn(mean.shape, generator=generator) if sample else mean

    def decode(self, latents: Tensor) -> Tensor:
        return F.interpolate(latents[:, :1].float(), scale_factor=4).clamp(0, 1)


def write_volume(path: Path, seed: int) -> None:
    voxels = np.random.default_rng(seed).integers(1, 1000, (20, 22, 24)).astype(np.int16)
    nib.save(nib.Nifti1Image(voxels, np.diag([1.5, 1.5, 1.5, 1.0])), path)


def entry(path: Path, domain: str = "ct", rule: IntensityRule = RULE) -> VolumeEntry:
    return VolumeEntry(path, domain, "chest", rule, path.name.removesuffix(".nii.gz"))


@pytest.fixture
def volumes(tmp_path: Path) -> list[VolumeEntry]:
    folder = tmp_path / "input"
    folder.mkdir()
    paths = [folder / f"{name}.nii.gz" for name in "abc"]
    for seed, path in enumerate(paths):
        write_volume(path, seed)
    return [entry(path, domain) for path, domain in zip(paths, ("ct", "ct", "mr"), strict=True)]


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return tmp_path / "store"


def run(
    volumes: list[VolumeEntry], store: Path, config: PrepareConfig = CONFIG, tokenizer: str = "pooling-1"
) -> PrepareSummary:
    return prepare_volumes(volumes, store, PoolingTokenizer(tokenizer), config)


def outcome(summary: PrepareSummary) -> tuple[str, str, str, int]:
    written, up_to_date, removed = (
        "".join(sorted(names)) for names in (summary.written, summary.up_to_date, summary.removed)
    )
    return written, up_to_date, removed, len(summary.failed)


def expected(volume: VolumeEntry, config: PrepareConfig = CONFIG) -> Tensor:
    image = load_volume(volume, config.transform).image[None]
    return PoolingTokenizer().encode(image)[0].bfloat16()


def files_with_times(store: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in store.rglob("*") if path.is_file()}


def test_every_volume_becomes_latents_with_its_labels(volumes: list[VolumeEntry], store: Path) -> None:
    assert outcome(run(volumes, store)) == ("abc", "", "", 0)
    opened = LatentStore.open(store)
    assert opened.index.tokenizer == "pooling-1"
    assert [item.name for item in opened.entries] == ["a", "b", "c"]
    assert [item.domain for item in opened.entries] == ["ct", "ct", "mr"]
    for index, volume in enumerate(volumes):
        assert torch.equal(opened.read_volume(index), expected(volume))
        assert opened.entries[index].source == str(volume.path)
        assert opened.entries[index].spacing == (1.5, 1.5, 1.5)
        metadata = opened.metadata(index)
        assert json.loads(metadata["intensity"]) == {"kind": "ct_window", "low": 0.0, "high": 1000.0}
        assert np.array_equal(json.loads(metadata["affine"]), load_volume(volume, CONFIG.transform).affine)


def found(picture: np.ndarray, plane: np.ndarray) -> bool:
    """Whether a picture (H, W) has a plane somewhere, but for the frame on its edge."""
    plane = plane[1:-1, 1:-1]
    windows = np.lib.stride_tricks.sliding_window_view(picture, plane.shape)  # (H', W', h, w)
    return bool((np.abs(windows - plane).max((2, 3)) < 0.01).any())


def test_previews_show_the_three_middle_slices(volumes: list[VolumeEntry], store: Path) -> None:
    run(volumes, store)
    picture = matplotlib.image.imread(store / "previews" / "a.png")
    image = load_volume(volumes[0], CONFIG.transform).image[0].numpy()
    decoded = PoolingTokenizer().decode(expected(volumes[0])[None])[0, 0].numpy()
    grey = picture[..., 0]  # (H, W)
    for axis, size in enumerate(image.shape):
        plane, output = (np.flipud(volume.take(size // 2, axis).T) for volume in (image, decoded))
        assert found(grey, plane)
        for shown in (plane, output):
            assert found(grey, shown.repeat(3, 0).repeat(3, 1))
        assert not found(grey, output)


def test_a_second_run_writes_nothing(volumes: list[VolumeEntry], store: Path) -> None:
    run(volumes, store)
    before = files_with_times(store)
    assert outcome(run(volumes, store)) == ("", "abc", "", 0)
    assert files_with_times(store) == before


def test_only_a_changed_input_is_made_again(volumes: list[VolumeEntry], store: Path) -> None:
    run(volumes, store)
    before = files_with_times(store)
    write_volume(volumes[1].path, seed=77)
    assert outcome(run(volumes, store)) == ("b", "ac", "", 0)
    assert torch.equal(LatentStore.open(store).read_volume(1), expected(volumes[1]))
    after = files_with_times(store)
    changed = {Path(path).name for path in after if after[path] != before[path]}
    assert changed == {"b.safetensors", "b.png", "index.jsonl"}


def test_only_a_changed_intensity_rule_is_applied_again(volumes: list[VolumeEntry], store: Path) -> None:
    run(volumes, store)
    volumes[2] = replace(volumes[2], intensity=IntensityRule("ct_window", 0.0, 500.0))
    assert outcome(run(volumes, store)) == ("c", "ab", "", 0)
    assert torch.equal(LatentStore.open(store).read_volume(2), expected(volumes[2]))


def test_changed_labels_are_stored(volumes: list[VolumeEntry], store: Path) -> None:
    run(volumes, store)
    volumes[0] = replace(volumes[0], domain="mr", body_part="head")
    assert outcome(run(volumes, store)) == ("a", "bc", "", 0)
    opened = LatentStore.open(store)
    assert (opened.entries[0].domain, opened.entries[0].body_part) == ("mr", "head")
    assert (opened.metadata(0)["domain"], opened.metadata(0)["body_part"]) == ("mr", "head")


def test_other_transforms_another_tokenizer_and_sampling_make_everything_again(
    volumes: list[VolumeEntry], store: Path
) -> None:
    run(volumes, store)
    finer = replace(CONFIG, transform=replace(CONFIG.transform, spacing=1.0))
    assert outcome(run(volumes, store, finer)) == ("abc", "", "", 0)
    assert torch.equal(LatentStore.open(store).read_volume(0), expected(volumes[0], finer))
    assert outcome(run(volumes, store, finer, "pooling-2")) == ("abc", "", "", 0)
    assert LatentStore.open(store).index.tokenizer == "pooling-2"
    for changes in ({"sample": True}, {"sample": True, "seed": 1}):
        sampled = replace(finer, **changes)
        assert outcome(run(volumes, store, sampled, "pooling-2")) == ("abc", "", "", 0)
        assert outcome(run(volumes, store, sampled, "pooling-2")) == ("", "abc", "", 0)


def test_sampled_latents_depend_on_the_seed_and_the_volume_alone(
    volumes: list[VolumeEntry], tmp_path: Path
) -> None:
    sampled = replace(CONFIG, sample=True)
    run(volumes, tmp_path / "all", sampled)
    run(volumes[1:], tmp_path / "some", sampled)
    run(volumes, tmp_path / "other", replace(sampled, seed=1))
    latents = LatentStore.open(tmp_path / "all").read_volume(1)
    assert torch.equal(latents, LatentStore.open(tmp_path / "some").read_volume(0))
    assert not torch.equal(latents, LatentStore.open(tmp_path / "other").read_volume(1))
    assert not torch.equal(latents, expected(volumes[1]))


def test_volumes_that_left_the_input_leave_the_store(volumes: list[VolumeEntry], store: Path) -> None:
    run(volumes, store)
    summary = run(volumes[:2], store)
    assert outcome(summary) == ("", "ab", "c", 0)
    assert sorted(path.name for path in store.rglob("*") if path.is_file() and path.suffix) == [
        "a.png",
        "a.safetensors",
        "b.png",
        "b.safetensors",
        "index.jsonl",
    ]
    assert "removed, no longer in the input: c" in format_summary(summary)


def test_a_moved_input_is_recognised(volumes: list[VolumeEntry], store: Path, tmp_path: Path) -> None:
    run(volumes, store)
    (tmp_path / "input").rename(tmp_path / "moved")
    moved = [replace(volume, path=tmp_path / "moved" / volume.path.name) for volume in volumes]
    assert outcome(run(moved, store)) == ("", "abc", "", 0)
    assert LatentStore.open(store).entries[0].source == str(moved[0].path)


def test_it_does_not_matter_how_a_path_is_typed(
    volumes: list[VolumeEntry], store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(volumes, store)
    before = files_with_times(store)
    monkeypatch.chdir(tmp_path)
    typed = [replace(volume, path=Path("input", volume.path.name)) for volume in volumes]
    assert outcome(run(typed, store)) == ("", "abc", "", 0)
    assert files_with_times(store) == before


def test_facts_of_the_scans_are_kept_and_shown(volumes: list[VolumeEntry], store: Path) -> None:
    volumes[2].path.write_bytes(volumes[0].path.read_bytes())
    header = nib.load(volumes[1].path).header
    header.set_sform(None, 0)
    nib.save(nib.Nifti1Image(nib.load(volumes[1].path).dataobj, None, header), volumes[1].path)
    made = run(volumes, store)
    scan = json.loads(LatentStore.open(store).metadata(0)["scan"])
    assert (scan["size"], scan["spacing"], scan["notes"]) == ([20, 22, 24], [1.5, 1.5, 1.5], [])
    assert len(scan["values"]) == 4
    text = format_summary(made)
    assert "  ct: 2 volumes, ct_window [0, 1000]" in text
    assert "    spacing  1.5 x 1.5 x 1.5 mm" in text
    assert "    note: b: no orientation in the header" in text
    assert "  THE SAME SCAN IN SEVERAL DATA SETS: a (ct), c (mr)" in text
    again = run(volumes, store)
    assert again.facts == made.facts
    assert format_summary(again).splitlines()[1:] == text.splitlines()[1:]


def test_the_summary_has_the_order_of_the_input(volumes: list[VolumeEntry], store: Path) -> None:
    volumes[1].path.write_bytes(b"not a volume")
    assert run(volumes[::-1], store).written == ["c", "a"]
    write_volume(volumes[1].path, seed=1)
    volumes[0].path.unlink()
    summary = run(volumes, store)
    assert (summary.written, summary.up_to_date) == (["b"], ["c"])
    assert [path for path, _ in summary.failed] == [volumes[0].path]


def test_a_negative_number_of_workers_is_refused() -> None:
    with pytest.raises(UserError, match="workers: found -1, expected 0 or more"):
        replace(CONFIG, workers=-1)


@pytest.mark.slow
def test_the_store_is_the_same_with_workers(volumes: list[VolumeEntry], tmp_path: Path) -> None:
    volumes[1].path.write_bytes(b"not a volume")
    summaries = [run(volumes, tmp_path / str(n), replace(CONFIG, workers=n, sample=True)) for n in (0, 2)]
    assert summaries[0] == replace(summaries[1], store=summaries[0].store)
    stores = [LatentStore.open(tmp_path / name) for name in ("0", "2")]
    assert stores[0].index == stores[1].index
    for index, item in enumerate(stores[0].entries):
        assert torch.equal(stores[0].read_volume(index), stores[1].read_volume(index))
        assert stores[0].metadata(index) == stores[1].metadata(index)
        preview = Path("previews", f"{item.name}.png")
        assert (tmp_path / "0" / preview).read_bytes() == (tmp_path / "2" / preview).read_bytes()


@pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.write_bytes(path.read_bytes()[:-1])])
def test_missing_and_damaged_latent_files_are_made_again(
    volumes: list[VolumeEntry], store: Path, damage: Callable[[Path], object]
) -> None:
    run(volumes, store)
    damage(store / "latents" / "b.safetensors")
    assert outcome(run(volumes, store)) == ("b", "ac", "", 0)
    assert torch.equal(LatentStore.open(store).read_volume(1), expected(volumes[1]))


def test_a_bad_volume_is_named_and_the_rest_goes_on(volumes: list[VolumeEntry], store: Path) -> None:
    volumes[1].path.write_bytes(b"not a volume")
    summary = run(volumes, store)
    assert outcome(summary) == ("ac", "", "", 1)
    assert summary.failed[0][0] == volumes[1].path
    text = format_summary(summary)
    assert "2 volumes of 2 domains (2 written, 0 up to date, 0 removed, 1 failed)" in text
    assert f"failed: {volumes[1].path}: {summary.failed[0][1]}" in text


@pytest.mark.parametrize(
    ("part", "said"),
    [({"channel": 5}, "channel 5"), ({"series": Series("1.2", "3 Lung", ())}, "series 3 Lung")],
)
def test_a_failure_says_which_part_of_a_file_it_is_about(
    volumes: list[VolumeEntry], store: Path, part: dict[str, Any], said: str
) -> None:
    if "series" in part:
        volumes[1].path.unlink()
        volumes[1].path.mkdir()
    ((path, reason),) = run([replace(volumes[1], **part)], store).failed
    assert path == volumes[1].path
    assert reason.startswith(f"{said}: ")


def test_a_volume_that_went_bad_does_not_keep_its_old_latents(
    volumes: list[VolumeEntry], store: Path
) -> None:
    run(volumes, store)
    volumes[1].path.write_bytes(b"not a volume")
    assert outcome(run(volumes, store)) == ("", "ac", "", 1)
    assert [item.name for item in LatentStore.open(store).entries] == ["a", "c"]


def test_a_volume_that_cannot_be_read_now_keeps_its_latents(volumes: list[VolumeEntry], store: Path) -> None:
    run(volumes, store)
    volumes[1].path.unlink()
    assert outcome(run(volumes, store)) == ("", "ac", "", 1)
    assert torch.equal(LatentStore.open(store).read_volume(0), expected(volumes[0]))
    assert [item.name for item in LatentStore.open(store).entries] == ["a", "b", "c"]


def test_a_store_of_version_1_is_upgraded_once_and_nothing_is_encoded(
    volumes: list[VolumeEntry],
    store: Path,
    as_version_1: Callable[[Path], LatentStore],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run(volumes, store)
    as_version_1(store)

    def encode(*args: object) -> Tensor:
        raise AssertionError("encoded anew")

    monkeypatch.setattr(PoolingTokenizer, "encode", encode)
    summary = run(volumes, store)
    assert outcome(summary) == ("", "abc", "", 0)
    assert summary.upgraded == ["a", "b", "c"]
    assert "3 latent files of an earlier format written anew in chunks" in format_summary(summary)
    before = files_with_times(store)
    summary = run(volumes, store)
    assert summary.upgraded == []
    assert "earlier format" not in format_summary(summary)
    assert files_with_times(store) == before
    monkeypatch.undo()
    for index, volume in enumerate(volumes):
        assert torch.equal(LatentStore.open(store).read_volume(index), expected(volume))


@pytest.mark.parametrize(
    ("module", "function", "error"), [(Path, "write_bytes", errno.ENOSPC), (os, "preadv", errno.EIO)]
)
def test_a_store_that_cannot_be_upgraded_keeps_its_latents(
    volumes: list[VolumeEntry],
    store: Path,
    as_version_1: Callable[[Path], LatentStore],
    monkeypatch: pytest.MonkeyPatch,
    module: Any,
    function: str,
    error: int,
) -> None:
    run(volumes, store)
    as_version_1(store)

    def fail(*_: object) -> None:
        raise OSError(error, os.strerror(error))

    with monkeypatch.context() as patch:
        patch.setattr(module, function, fail)
        with pytest.raises(UserError, match=os.strerror(error)):
            run(volumes, store)
    for index, volume in enumerate(volumes):
        assert torch.equal(LatentStore.open(store).read_volume(index), expected(volume))


def test_latents_that_are_not_finite_are_refused(
    volumes: list[VolumeEntry], store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode = PoolingTokenizer.encode

    def overflow(self: PoolingTokenizer, volume: Tensor, *args: object) -> Tensor:
        return encode(self, volume) * float("inf")

    monkeypatch.setattr(PoolingTokenizer, "encode", overflow)
    summary = run(volumes, store)
    assert [reason for _, reason in summary.failed] == ["its latents are not finite (NaN or Inf)"] * 3
    assert "The store is empty" in format_summary(summary)


def test_a_volume_too_large_for_the_device_is_named_and_the_rest_goes_on(
    volumes: list[VolumeEntry], store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode, calls = PoolingTokenizer.encode, []

    def fill(self: PoolingTokenizer, volume: Tensor, *arguments: Any) -> Tensor:
        calls.append(volume)
        if len(calls) == 2:
            raise torch.OutOfMemoryError("tried to allocate 3 GiB")
        return encode(self, volume, *arguments)

    monkeypatch.setattr(PoolingTokenizer, "encode", fill)
    summary = run(volumes, store)
    assert outcome(summary) == ("ac", "", "", 1)
    assert "does not fit into the memory of cpu: tried to allocate 3 GiB" in summary.failed[0][1]


def test_the_grid_must_fit_the_tokenizer(volumes: list[VolumeEntry], store: Path) -> None:
    config = replace(CONFIG, transform=replace(CONFIG.transform, multiple=2))
    with pytest.raises(UserError, match=r"transform\.multiple: found 2, expected a multiple .* 4"):
        run(volumes, store, config)


def test_prepare_finds_the_volumes_and_the_tokenizer(
    volumes: list[VolumeEntry], store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepare_module, "load_tokenizer", lambda spec, device: PoolingTokenizer(spec))
    config = replace(CONFIG, tokenizer="mine", domain="here", intensity=RULE, body_part="leg")
    summary = prepare(volumes[0].path.parent, store, config)
    assert len(summary.written) == 3
    opened = LatentStore.open(store)
    assert (opened.index.tokenizer, opened.index.tokenizer_spec) == ("mine", "mine")
    assert {(item.domain, item.body_part) for item in opened.entries} == {("here", "leg")}


def test_a_device_that_does_not_exist_is_named(volumes: list[VolumeEntry], store: Path) -> None:
    with pytest.raises(UserError, match="device 'nowhere' can't be used"):
        prepare(volumes[0].path.parent, store, replace(CONFIG, device="nowhere"))
    assert not store.exists()


@pytest.mark.slow
def test_twenty_kills_never_leave_a_broken_store(tmp_path: Path) -> None:
    """A process that prepares is killed at random moments; see prepare_killed.py."""
    script = Path(__file__).with_name("prepare_killed.py")
    result = subprocess.run(
        [sys.executable, script, tmp_path],
        stdout=subprocess.PIPE,
        text=True,
        timeout=300,
        check=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    seen = json.loads(result.stdout)
    assert seen["kills"] == 20
    # Of three volumes the latents and the preview are renamed; half and whole are their lines and a removal.
    assert seen["changes"] >= 3 * 2 + 2 * (3 + 1)
    assert seen["upgrades"] >= 1 + 3  # the index, the latents
    assert len(set(seen["entries"])) >= 3, "the kills were not spread over the work"
    assert seen["final"] == seen["volumes"]


def test_a_rule_by_the_values_is_kept_and_told(store: Path, tmp_path: Path) -> None:
    voxels = np.full((24, 24, 24), -1000, np.int16)
    voxels[3:-3, 3:-3, 3:-3] = np.random.default_rng(0).integers(-100, 200, (18, 18, 18))
    nib.save(nib.Nifti1Image(voxels, np.diag([1.5, 1.5, 1.5, 1.0])), tmp_path / "a.nii.gz")
    looked = [replace(entry(tmp_path / "a.nii.gz"), intensity=None)]
    for state in (("a", "", "", 0), ("", "a", "", 0)):
        summary = run(looked, store)
        assert outcome(summary) == state
        assert "CT by its values, ct_window [-175, 250]" in format_summary(summary)
    metadata = LatentStore.open(store).metadata(0)
    assert json.loads(metadata["intensity"]) == {"kind": "ct_window", "low": -175, "high": 250}


def test_only_what_was_asked_for_makes_a_summary_incomplete(store: Path) -> None:
    summary = run([], store)
    summary.left_out = [LeftOut(Path("a.mgz"), "of a format that is not read")]
    assert summary.complete
    assert "1 left out" in format_summary(summary)
    assert "left out: a.mgz: of a format that is not read" in format_summary(summary)
    summary.left_out.append(LeftOut(Path("b.mgz"), "of a format that is not read", asked=True))
    assert not summary.complete


def test_the_source_of_a_volume_can_be_written_and_does_not_depend_on_how_it_is_typed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "link").symlink_to(tmp_path)
    assert locate(tmp_path / "link/a.nii") == locate(tmp_path / "a.nii") == str(tmp_path / "a.nii")
    monkeypatch.chdir(tmp_path / "link")
    assert locate(Path()) == str(tmp_path)
    assert locate(Path("..")) == str(tmp_path.parent)
    assert locate(tmp_path / os.fsdecode(b"K\xf6ln\n.nii")) == str(tmp_path / r"K\xf6ln\n.nii")
