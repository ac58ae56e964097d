"""Samples as files: where they lie, what their values are, how they are told; nothing is overwritten."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from nibabel.nifti1 import load
from PIL import Image

from meduet_fast.autoencoder import load_tokenizer
from meduet_fast.data.intensity import IntensityRule
from meduet_fast.data.nifti import read_nifti
from meduet_fast.data.store import LatentStore
from meduet_fast.errors import UserError
from meduet_fast.files import file_sha256
from meduet_fast.synthesis.pipeline import MeDUETPipeline, Sample
from meduet_fast.synthesis.sample import SampleConfig, decode_values, sample

from .pipelines import AFFINE, CT, MR, make_network, make_parts, make_run


@pytest.fixture(autouse=True)
def _one_thread(one_thread: None) -> None:
    """Every test here."""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sample")
    make_parts(folder)
    return make_run(folder, make_network())


def test_a_ct_lies_where_its_content_does_and_has_its_units(run: Path, tmp_path: Path) -> None:
    config = SampleConfig(
        steps=2,
        content="ct_b",
        style="ct",
        count=2,
        seed=4,
        size=(32, 40, 32),
        start=(8, 0, 16),
        voxels="image",
    )
    summary = sample(run, tmp_path / "made", config)
    pipeline = MeDUETPipeline.from_run(run)
    made = pipeline("ct_b", "ct", [4, 5], (8, 10, 8), (2, 0, 4), steps=2)
    affine = AFFINE.copy()
    affine[:3, 3] += [1 + 1.5 * 8, 0, 1.5 * 16]
    for file, one in zip(summary.files, made, strict=True):
        image = load(file)
        assert np.array_equal(image.affine, affine)
        assert np.array_equal(image.get_qform(), affine)
        assert image.get_data_dtype() == np.int16
        expected = -175 + 425 * pipeline.decode(one.latents)
        assert np.abs(np.asarray(image.dataobj) - expected).max() <= 0.5001
        assert image.header["descrip"].item() == b"HU, clipped to -175 .. 250"
        voxels, read, notes = read_nifti(file)  # as others' files are read
        assert (voxels.shape, notes) == ((32, 40, 32), ())
        assert np.array_equal(read, affine)
    record = json.loads((tmp_path / "made" / "samples.json").read_text())
    one, two = record["samples"]
    assert (one["file"], one["seed"], two["seed"]) == ("sample_000.nii.gz", 4, 5)
    assert (one["values"], one["intensity"]) == ("HU, clipped to -175 .. 250", CT)
    assert one["content"] == {"volume": "ct_b", "domain": "ct"}
    assert one["affine"] == affine.tolist()
    assert set(one["clipped"]) == {"low", "high"}
    network = run / "checkpoints" / "7" / "power_0.100.safetensors"
    assert record["network"]["weights_sha256"] == file_sha256(network)
    assert record["settings"]["content"] == "ct_b"
    assert record["sampler"] == "dpm++"
    assert "2 samples by MeDUETTransformer3D of " in str(summary)
    with Image.open(tmp_path / "made" / "samples.png") as picture:
        assert picture.width > 200
    assert sorted(path.name for path in (tmp_path / "made").iterdir()) == [
        "sample_000.nii.gz", "sample_001.nii.gz", "samples.json", "samples.png",
    ]  # fmt: skip


def test_an_mr_stays_between_0_and_1_and_says_so(run: Path, tmp_path: Path) -> None:
    [file] = sample(run, tmp_path / "made", SampleConfig(steps=1, content="ct_a@2,2,0", style="mr")).files
    image = load(file)
    values = np.asarray(image.dataobj)
    assert (image.get_data_dtype(), values.min() >= 0, values.max() <= 1) == (np.float32, True, True)
    assert image.header["descrip"].item().startswith(b"[0, 1], no units")
    [said] = json.loads((tmp_path / "made" / "samples.json").read_text())["samples"]
    assert (said["values"][:16], said["intensity"]) == ("[0, 1], no units", MR)
    [again] = sample(run, tmp_path / "again", SampleConfig(steps=1, content="ct_a@2,2,0", style="mr")).files
    assert file.read_bytes() == again.read_bytes()


def test_units_of_a_crop_are_those_of_the_tokenizer(run: Path) -> None:
    tokenizer, store = load_tokenizer(), LatentStore.open(run.parent / "store")
    latents = store.read_crops([0], [(1, 2, 0)], (12, 8, 8))[0].float()
    expected = -100 + 600 * tokenizer.decode(latents[None])[0, 0].numpy()
    one = Sample(latents, AFFINE, IntensityRule("ct_window", -100, 500), 0, {})
    values, about = decode_values(tokenizer, one)
    assert np.abs(values - expected).max() <= 0.5001
    assert about["clipped"] == {
        "low": round(float((expected == -100).mean()), 4), "high": round(float((expected == 500).mean()), 4),
    }  # fmt: skip


def test_a_saved_pipeline_makes_the_same_files(run: Path, tmp_path: Path) -> None:
    MeDUETPipeline.from_run(run).save_pretrained(tmp_path / "pipeline")
    config = SampleConfig(steps=1, count=2)
    for file, other in zip(
        sample(run, tmp_path / "one", config).files,
        sample(tmp_path / "pipeline", tmp_path / "two", config).files,
        strict=True,
    ):
        assert file.read_bytes() == other.read_bytes()


def test_what_is_there_stays(run: Path, tmp_path: Path) -> None:
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="notes: is there already: expected a new or empty folder"):
        sample(run, tmp_path / "notes")


def test_sources_that_are_none_are_told(run: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="absent: no such folder, expected a pipeline"):
        sample(tmp_path / "absent", tmp_path / "made")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"empty: neither a run \(no checkpoints\) nor a pipeline"):
        sample(tmp_path / "empty", tmp_path / "made")
    with pytest.raises(UserError, match=r"size: found \(8, 8, 6\) image voxels, expected multiples of 4"):
        sample(run, tmp_path / "made", SampleConfig(size=(8, 8, 6), voxels="image"))
    for wrong in ({"count": 0}, {"seed": -1}, {"size": (0, 8, 8)}, {"start": (-1, 0, 0)}):
        with pytest.raises(UserError, match=f"{next(iter(wrong))}: found "):
            SampleConfig(**wrong)  # type: ignore[arg-type]
    assert not (tmp_path / "made").exists()
