from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

from meduet_fast.data.store import LatentStore
from meduet_fast.errors import UserError
from meduet_fast.prepare.import_cache import import_reference_cache


def write_case(
    folder: Path, case: str, domain: int = 0, body_part: int = 1, first: bool = False
) -> np.ndarray:
    """The four files of a case as the published code writes them; returns the latents, channels first."""
    latent = np.random.default_rng(len(case)).normal(size=(4, 6, 7, 8)).astype(np.float32)
    stored = latent if first else np.moveaxis(latent, 0, -1)
    nib.save(nib.Nifti1Image(stored, np.eye(4)), folder / f"{case}_latent.nii.gz")
    np.save(folder / f"{case}_domain.npy", np.array([domain]))
    np.save(folder / f"{case}_voxel.npy", np.array([[0.7, 0.7, 2.5]], dtype=np.float32))
    np.save(folder / f"{case}_bp.npy", np.array([body_part]))
    return latent


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    folder = tmp_path / "cache"
    folder.mkdir()
    return folder


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return tmp_path / "store"


def test_cases_become_volumes(cache: Path, store: Path) -> None:
    last = write_case(cache, "BTCV_0", domain=0, body_part=0)
    first = write_case(cache, "Covid 19_12", domain=3, body_part=9, first=True)
    summary = import_reference_cache(cache, store)
    assert (summary.written, summary.failed) == (["BTCV_0", "Covid 19_12"], [])
    opened = LatentStore.open(store)
    assert opened.index.tokenizer == "reference-cache"
    assert opened.domains == ["domain_0", "domain_3"]
    assert [entry.body_part for entry in opened.entries] == ["abdomen", "body_part_9"]
    assert torch.equal(opened.read_volume(0), torch.from_numpy(last).bfloat16())
    assert torch.equal(opened.read_volume(1), torch.from_numpy(first).bfloat16())
    assert opened.entries[0].spacing == (1.5, 1.5, 1.5)
    assert json.loads(opened.metadata(0)["original_spacing"]) == pytest.approx([0.7, 0.7, 2.5])


def test_domains_can_be_named(cache: Path, store: Path) -> None:
    write_case(cache, "a", domain=1)
    write_case(cache, "b", domain=2)
    summary = import_reference_cache(cache, store, ["BTCV", "MM-WHS"])
    assert LatentStore.open(store).domains == ["MM-WHS"]
    assert [(path.name, reason) for path, reason in summary.failed] == [
        ("b_domain.npy", "domain 2, expected 0 to 1")
    ]


def test_a_second_import_does_only_what_changed(cache: Path, store: Path) -> None:
    write_case(cache, "a")
    write_case(cache, "bb")
    import_reference_cache(cache, store)
    before = (store / "latents" / "a.safetensors").stat().st_mtime_ns
    changed = write_case(cache, "bb", first=True) * 0 + 1
    nib.save(nib.Nifti1Image(changed, np.eye(4)), cache / "bb_latent.nii.gz")
    summary = import_reference_cache(cache, store)
    assert (summary.written, summary.up_to_date) == (["bb"], ["a"])
    assert (store / "latents" / "a.safetensors").stat().st_mtime_ns == before
    assert (LatentStore.open(store).read_volume(1) == 1).all()


def _pickled(path: Path) -> None:
    np.save(path, np.array([{"a": 1}], dtype=object))


@pytest.mark.parametrize(
    ("companion", "damage", "message"),
    [
        ("domain", Path.unlink, "missing, although the latents are there"),
        ("voxel", Path.unlink, "missing"),
        ("bp", Path.unlink, "missing"),
        ("domain", _pickled, "not a readable array file"),
        ("domain", lambda path: path.write_bytes(b""), "not a readable array file"),
        ("domain", lambda path: np.save(path, np.array([1, 2])), r"shape \(2,\), expected one integer"),
        ("domain", lambda path: np.save(path, np.array([-1])), "domain -1, expected 0 or more"),
        ("bp", lambda path: np.save(path, np.array(["chest"])), "expected one array of numbers"),
        ("voxel", lambda path: np.save(path, np.array([1.0, 0.0, 1.0])), "expected 3 sizes in mm"),
        ("latent", lambda path: path.write_bytes(path.read_bytes()[:-20]), "not a readable NIfTI"),
        ("latent", lambda path: path.write_bytes(b"nonsense"), "not a"),
        (
            "latent",
            lambda path: nib.save(nib.Nifti1Image(np.zeros((4, 5, 6, 4)), np.eye(4)), path),
            r"shape \(4, 5, 6, 4\), expected 4 channels either first or last",
        ),
        (
            "latent",
            lambda path: nib.save(nib.Nifti1Image(np.full((4, 5, 6, 7), np.nan), np.eye(4)), path),
            "not finite",
        ),
    ],
)
def test_a_bad_case_is_named_and_the_rest_goes_on(
    cache: Path, store: Path, companion: str, damage: Callable[[Path], object], message: str
) -> None:
    write_case(cache, "good")
    write_case(cache, "bad")
    ending = ".nii.gz" if companion == "latent" else ".npy"
    path = cache / f"bad_{companion}{ending}"
    damage(path)
    summary = import_reference_cache(cache, store)
    assert [entry.name for entry in LatentStore.open(store).entries] == ["good"]
    [(failed, reason)] = summary.failed
    assert failed == path
    assert re.search(message, reason)


def test_a_folder_without_a_cache_is_named(cache: Path, store: Path) -> None:
    for folder in (cache, cache / "nothing"):
        with pytest.raises(UserError, match="no reference cache"):
            import_reference_cache(folder, store)
    assert not store.exists()
