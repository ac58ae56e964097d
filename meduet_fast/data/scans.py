"""Read a scan of any format: the one door through which voxels come in."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from nibabel.orientations import apply_orientation, io_orientation

from meduet_fast.errors import VolumeError

from .dicom import Series, read_dicom
from .itk_formats import ITK_ENDINGS, itk_files, itk_notes, read_itk
from .nifti import PAIR_ENDINGS, nifti_files, read_corrections, read_nifti
from .nifti_geometry import affine_fault

NIFTI_ENDINGS = (".nii", ".nii.gz", *PAIR_ENDINGS)
SAMPLED = 1_000_000  # voxels that facts are taken from


@dataclass(frozen=True)
class Scan:
    """Hold a scan as it was stored.

    Attributes:
        voxels: (X, Y, Z) float32, all finite and not all equal.
        affine: (4, 4) float64, voxel index to RAS position in mm; not singular.
        notes: sentences on what had to be decided to read it.
    """

    voxels: np.ndarray
    affine: np.ndarray
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class ScanFacts:
    """Tell a scan from others of its data set.

    Attributes:
        size: voxels along the axes that run most to the right, to the front and to the head.
        spacing: mm along them.
        values: least, 1st percentile, 99th percentile and greatest of the voxels; the percentiles are of
            about a million voxels.
        fingerprint: hash of these voxels and the size, the same however the axes are stored.
        notes: see :class:`Scan`.
    """

    size: tuple[int, int, int]
    spacing: tuple[float, float, float]
    values: tuple[float, float, float, float]
    fingerprint: str
    notes: tuple[str, ...] = ()

    @classmethod
    def of(cls, scan: Scan) -> ScanFacts:
        """Take the facts of a scan."""
        turns = io_orientation(scan.affine)  # (3, 2): where each axis goes, and whether it is turned round
        voxels = apply_orientation(scan.voxels, turns)  # (R, A, S), a view
        edges = np.linalg.norm(scan.affine[:3, :3], axis=0)[np.argsort(turns[:, 0])]  # (3,)
        step = max(1, round((voxels.size / SAMPLED) ** (1 / 3)))
        sample = np.ascontiguousarray(voxels[::step, ::step, ::step])
        low, high = np.percentile(sample, (1, 99)).tolist()
        digest = hashlib.blake2b(repr(voxels.shape).encode(), digest_size=16)
        digest.update(sample.data)
        right, front, head = voxels.shape
        x, y, z = edges.round(6).tolist()
        return cls(
            (right, front, head), (x, y, z), (float(scan.voxels.min()), low, high, float(scan.voxels.max())),
            digest.hexdigest(), scan.notes,
        )  # fmt: skip

    def to_json(self) -> str:
        """Write the facts; :meth:`from_json` reads them."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> ScanFacts:
        """Read what :meth:`to_json` wrote.

        Raises:
            ValueError, TypeError: it is something else.
        """
        values: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in json.loads(text).items()
        }
        return cls(**values)

    @property
    def extent(self) -> tuple[float, ...]:
        """Return the edges of the scan in mm."""
        return tuple(size * edge for size, edge in zip(self.size, self.spacing, strict=True))


def read_scan(path: Path, channel: int | None = None, series: Series | None = None) -> Scan:
    """Read one 3D volume by the ending of its name, in small letters or capitals.

    ``.nii``, ``.hdr`` with ``.img``, each also with ``.gz``, are read by nibabel; ``.mha``, ``.mhd``,
    ``.nrrd``, and a folder of DICOM slices by SimpleITK (the extra ``itk``).

    Args:
        path: the file or folder.
        channel: position on the fourth axis, for files that hold several volumes.
        series: which of a DICOM folder; None: the one that there is.

    Raises:
        VolumeError: with a plain reason, if it cannot be read, is damaged, is not 3D or has no certain
            geometry; if its voxels are no real numbers, not finite or all equal.
    """
    name = path.name.lower()
    notes: tuple[str, ...] = ()
    if name.endswith(NIFTI_ENDINGS):
        voxels, affine, notes = read_nifti(path, channel)
    elif name.endswith(ITK_ENDINGS):
        voxels, affine, notes = read_itk(path, channel)
    elif path.is_dir():
        if channel is not None:
            raise VolumeError(path, f"found a channel ({channel}) for a DICOM series, which has none")
        voxels, affine = read_dicom(path, series)
    else:
        expected = ", ".join((*NIFTI_ENDINGS, *ITK_ENDINGS))
        raise VolumeError(
            path, f"no format that is read: expected {expected}, or a folder with a DICOM series"
        )

    fault = affine_fault(affine)
    if fault is not None:
        raise VolumeError(path, fault)
    low, high = float(voxels.min()), float(voxels.max())
    if not (math.isfinite(low) and math.isfinite(high)):
        raise VolumeError(path, f"{int((~np.isfinite(voxels)).sum())} voxels are not finite (NaN or Inf)")
    if low == high:
        raise VolumeError(path, f"constant image: every voxel is {low:g}")
    return Scan(voxels, affine, notes)


def scan_files(path: Path, series: Series | None = None) -> tuple[Path, ...]:
    """Return the files whose bytes are the scan: one, a header and its voxels, or the slices of a series.

    Without ``series`` those are all files of a folder.

    Raises:
        VolumeError: one of them is missing, or their folder can't be read.
    """
    name = path.name.lower()
    if name.endswith(NIFTI_ENDINGS):
        return nifti_files(path)
    if name.endswith(ITK_ENDINGS) or not path.is_dir():
        return itk_files(path)
    if series is not None:
        return tuple(path / name for name in series.files)
    try:
        return tuple(
            sorted(file for file in path.iterdir() if file.is_file() and not file.name.startswith("."))
        )
    except OSError as error:
        raise VolumeError(path, f"cannot be read: {error.strerror}") from error


def header_corrections(path: Path) -> dict[str, Any]:
    """Return what a header was corrected to, for JSON, and what else is read otherwise than it once was.

    Returns:
        ``geometry``: an affine (4, 4), or the reason for which the header is refused; ``offset``: the byte
        where the voxels begin; ``notes``: what a header of ITK's formats leaves out. Only what is not taken
        at its face value: what was prepared of other scans before headers were checked is still right.
        ``grid`` of a NIfTI file that lies obliquely: the prepared grid begins with its first voxel, and once
        began half a voxel beside it.
    """
    if path.name.lower().endswith(ITK_ENDINGS):
        try:
            notes = itk_notes(path)
        except VolumeError as error:
            return {"geometry": error.reason}
        return {"notes": notes} if notes else {}
    if not path.name.lower().endswith(NIFTI_ENDINGS):
        return {}
    try:
        geometry, offset = read_corrections(path)
    except VolumeError as error:
        return {"geometry": error.reason}
    corrections: dict[str, Any] = {} if geometry.at_face_value else {"geometry": geometry.affine.tolist()}
    if offset is not None:
        corrections["offset"] = offset
    if np.count_nonzero(geometry.affine[:3, :3]) > 3:
        corrections["grid"] = "from the first voxel"
    return corrections
