"""Import the latent cache of the published MeDUET code.

The cache is one folder with four files a case: ``<case>_latent.nii.gz`` (channels first or last),
``<case>_domain.npy`` (number of the data set), ``<case>_voxel.npy`` (spacing of the original scan in mm) and
``<case>_bp.npy`` (number of the body part).
"""

from __future__ import annotations

import gzip
import hashlib
import json
import zlib
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
from nibabel.filebasedimages import ImageFileError
from nibabel.spatialimages import HeaderDataError

from meduet_fast.data.intensity import CT
from meduet_fast.data.sources import VolumeEntry
from meduet_fast.data.store_index import IMPORTED
from meduet_fast.data.store_writer import StoreWriter, VolumeRecord
from meduet_fast.errors import UserError, VolumeError

from .update import PrepareSummary, locate, one_by_one, update_store

TOKENIZER = IMPORTED
CHANNELS, COMPRESSION = 4, 4
SPACING = (1.5, 1.5, 1.5)  # mm; of the prepared images, whatever the original scan had (spec section 1)
BODY_PARTS = {-1: "unknown", 0: "abdomen", 1: "chest", 2: "spleen", 3: "head-neck", 4: "whole body"}
_LATENT_ENDING = "_latent.nii.gz"


def import_reference_cache(
    folder: Path, output: Path, domain_names: Sequence[str] | None = None
) -> PrepareSummary:
    """Make or update the latent store ``output``: the cases of ``folder``, and no others.

    A bad case is recorded and the rest goes on. The cache does not say where a volume lies, so the affines
    state the spacing alone.

    Args:
        folder: the cache.
        output: the store.
        domain_names: name of data set 0, 1, ...; "domain_0", "domain_1", ... if not given.

    Raises:
        UserError: no cache in the folder, or the store is in use or cannot be written.
    """
    latents = sorted(folder.glob(f"*{_LATENT_ENDING}")) if folder.is_dir() else []
    if not latents:
        raise UserError(f"{folder}: no reference cache (expected files named <case>{_LATENT_ENDING})")
    volumes: list[VolumeEntry] = []
    spacings: dict[str, list[float]] = {}  # of the original scans, by case
    failed: list[tuple[Path, str]] = []
    for latent in latents:
        case = latent.name.removesuffix(_LATENT_ENDING)
        try:
            domain = _read_integer(_companion(latent, "domain"))
            if domain < 0 or (domain_names is not None and domain >= len(domain_names)):
                expected = "0 or more" if domain_names is None else f"0 to {len(domain_names) - 1}"
                raise VolumeError(_companion(latent, "domain"), f"domain {domain}, expected {expected}")
            body_part = _read_integer(_companion(latent, "bp"))
            spacing = _read_array(_companion(latent, "voxel")).ravel()  # (3,)
            if spacing.shape != (3,) or not (np.isfinite(spacing) & (spacing > 0)).all():
                raise VolumeError(
                    _companion(latent, "voxel"), f"spacing {spacing.tolist()}, expected 3 sizes in mm"
                )
        except VolumeError as error:
            failed.append((error.path, error.reason))
            continue
        spacings[case] = spacing.tolist()
        name = f"domain_{domain}" if domain_names is None else domain_names[domain]
        volumes.append(
            VolumeEntry(latent, name, BODY_PARTS.get(body_part, f"body_part_{body_part}"), CT, case)
        )
    with StoreWriter(
        output, tokenizer=TOKENIZER, tokenizer_spec=TOKENIZER, channels=CHANNELS, compression=COMPRESSION
    ) as writer:
        summary = update_store(
            writer, volumes, one_by_one(_content_key),
            one_by_one(lambda volume: _read_latents(volume, _content_key(volume), spacings[volume.name])),
        )  # fmt: skip
    summary.failed[:0] = failed
    return summary


def _companion(latent: Path, what: str) -> Path:
    return latent.with_name(f"{latent.name.removesuffix(_LATENT_ENDING)}_{what}.npy")


def _read_array(path: Path) -> np.ndarray:
    try:
        array = np.load(path, allow_pickle=False)
    except FileNotFoundError:
        raise VolumeError(path, "missing, although the latents are there") from None
    except (OSError, EOFError, ValueError) as error:
        raise VolumeError(path, f"not a readable array file: {error}") from error
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "iuf":
        raise VolumeError(path, "expected one array of numbers")
    return array


def _read_integer(path: Path) -> int:
    array = _read_array(path)
    if array.size != 1 or array.dtype.kind not in "iu":
        raise VolumeError(path, f"{array.dtype} of shape {array.shape}, expected one integer")
    return int(array.item())


def _content_key(volume: VolumeEntry) -> str:
    """Hash the four files of a case (SHA-256, hex)."""
    digest = hashlib.sha256(TOKENIZER.encode())
    for path in (volume.path, *(_companion(volume.path, what) for what in ("domain", "voxel", "bp"))):
        try:
            content = path.read_bytes()
        except OSError as error:
            raise VolumeError(path, f"cannot be read: {error.strerror}") from error
        digest.update(hashlib.sha256(content).digest())
    return digest.hexdigest()


def _read_latents(volume: VolumeEntry, key: str, original_spacing: list[float]) -> VolumeRecord:
    path = volume.path
    try:
        array = nib.Nifti1Image.from_filename(path).get_fdata(dtype=np.float32)
    except (OSError, EOFError, zlib.error, gzip.BadGzipFile, ValueError) as error:
        raise VolumeError(path, f"not a readable NIfTI file: {error}") from error
    except (ImageFileError, HeaderDataError) as error:
        raise VolumeError(path, f"not a NIfTI file: {error}") from error
    if array.ndim != 4 or (array.shape[0] == CHANNELS) == (array.shape[-1] == CHANNELS):
        raise VolumeError(
            path,
            f"shape {array.shape}, expected {CHANNELS} channels either first or last: "
            f"({CHANNELS}, X, Y, Z) or (X, Y, Z, {CHANNELS})",
        )
    if array.shape[-1] == CHANNELS:
        array = np.moveaxis(array, -1, 0)
    return VolumeRecord(
        name=volume.name,
        domain=volume.domain,
        body_part=volume.body_part,
        content_key=key,
        source=locate(path),
        latent=torch.from_numpy(np.ascontiguousarray(array)),  # (C, X, Y, Z)
        affine=np.diag([*SPACING, 1.0]),
        spacing=SPACING,
        intensity=asdict(CT),
        notes={"original_spacing": json.dumps(original_spacing)},
    )
