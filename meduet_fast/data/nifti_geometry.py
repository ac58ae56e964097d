"""Decide where the voxels of a NIfTI file lie: qform, sform, pixdim and units must tell one story.

===========================  ============================================================================
forms that are coded, sound  what is taken
===========================  ============================================================================
both, and they agree         the sform
both; the sform is identity  the qform, noted: a placeholder beside the spacing in pixdim
both; mirror images          refused: left and right contradict
both; one alone is scanner's the scanner's (code 1), noted; but an sform that contradicts pixdim is refused
both; the sform is sheared   the sform (a tilted gantry, which no qform can state), noted
both, any other difference   refused, with both
sform alone                  the sform, if pixdim agrees or says nothing (zeros, ones: noted); else refused
qform alone                  the qform
none is coded                pixdim, x from right to left as nibabel has it, noted
coded, but none sound        refused
===========================  ============================================================================

A form that is coded but not sound is noted beside a sound one. A quaternion that is too long by a rounding is
shortened. Units other than mm are converted, or the file is refused.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np

from meduet_fast.errors import VolumeError

SAME_SPACING = 0.01  # relative; header writers round to two or three decimals
SAME_DIRECTION = np.cos(np.deg2rad(2.0))
SHEARED_SPACING = 0.1  # relative: an edge and its height differ by 1 - cos(tilt)
SCAN_SPACING = (0.02, 25.0)  # mm: smallest and largest edge of a voxel in scans of bodies
UNITS = {
    0: ("mm", 1.0),
    1: ("metres", 1000.0),
    2: ("mm", 1.0),
    3: ("micrometres", 0.001),
}  # by xyzt_units % 8
SCANNER = 1  # code of a form that gives the scanner's coordinates; 2 to 5: aligned to something else
MAX_CODE = 5


@dataclass(frozen=True)
class Geometry:
    """Say where the voxels of a file lie.

    Attributes:
        affine: (4, 4) float64, voxel index to RAS position in mm.
        notes: sentences on what had to be decided; none if the header tells one story.
        at_face_value: the affine is that of the first coded form: sform, else qform, else pixdim.
    """

    affine: np.ndarray
    notes: tuple[str, ...] = ()
    at_face_value: bool = True


@dataclass(frozen=True)
class _Form:
    """A sound affine that a header states, in the header's unit."""

    name: str
    code: int
    affine: np.ndarray  # (4, 4)

    @property
    def edges(self) -> np.ndarray:
        """Return the length of a voxel's edges, (3,)."""
        return np.linalg.norm(self.affine[:3, :3], axis=0)

    @property
    def directions(self) -> np.ndarray:
        """Return the axes of the voxels as columns of length 1, (3, 3)."""
        return self.affine[:3, :3] / self.edges

    @property
    def mirrored(self) -> bool:
        return bool(np.linalg.det(self.directions) < 0)

    @property
    def sheared(self) -> bool:
        cosines = self.directions.T @ self.directions - np.eye(3)  # (3, 3)
        return bool(np.abs(cosines).max() > np.sqrt(1 - SAME_DIRECTION**2))

    def __str__(self) -> str:
        axes = "".join(nib.aff2axcodes(self.affine))
        return f"{format_spacing(self.edges)} along {axes}"


def format_spacing(edges: np.ndarray) -> str:
    """Format three lengths as ``0.7 x 0.7 x 2.5``."""
    return " x ".join(f"{edge:.4g}" for edge in edges)


def affine_fault(affine: np.ndarray) -> str | None:
    """Return what is wrong with an affine (4, 4) if it does not give every voxel a place of its own."""
    if not np.isfinite(affine).all():
        return "the affine is not finite"
    # The volume of a voxel over that of a box with the same edges: 1 for a proper grid, 0 for a singular one.
    axes = affine[:3, :3]  # (3, 3), a column per voxel axis
    edges = np.linalg.norm(axes, axis=0)  # (3,)
    if not edges.all() or abs(np.linalg.det(axes / edges)) < 1e-3:
        return f"singular affine: {axes.tolist()} maps the voxels onto a plane or a line"
    return None


def decide_geometry(path: Path, header: nib.Nifti1Header) -> Geometry:
    """Decide by a NIfTI-1 or -2 header, as it is in the file, where the voxels lie; see the table above.

    Raises:
        VolumeError: the header contradicts itself, or states no usable geometry.
    """
    forms: dict[str, _Form] = {}
    faults: list[str] = []
    for name, read in (("sform", _read_sform), ("qform", _read_qform)):
        code = int(header[f"{name}_code"])
        if code == 0:
            continue
        found = read(header) if 0 < code <= MAX_CODE else f"{name}_code is {code}, expected 0 to {MAX_CODE}"
        if isinstance(found, str):
            faults.append(found)
        else:
            forms[name] = _Form(name, code, found)
    notes: list[str] = []
    pixdim = np.asarray(header["pixdim"][1:4], dtype=np.float64)  # (3,)
    if "sform" in forms and "qform" in forms:
        form, note = _choose(path, forms["sform"], forms["qform"])
        notes += note
    elif "sform" in forms:
        form = forms["sform"]
        notes += _compare_with_pixdim(path, form, pixdim)
    elif "qform" in forms:
        form = forms["qform"]
    elif faults:
        raise VolumeError(path, "; ".join(faults))
    elif not (np.isfinite(pixdim) & (pixdim > 0)).all():
        raise VolumeError(
            path, f"found the spacing {tuple(pixdim.tolist())} mm in the header, expected positive numbers"
        )
    else:
        form = _Form("pixdim", 0, np.asarray(header.get_base_affine(), dtype=np.float64))
        notes.append("no orientation in the header (sform and qform have code 0): x is taken to run from "
                     "right to left, y to the front, z to the head")  # fmt: skip
    notes += [f"{fault}; the {form.name} was taken" for fault in faults]
    scale, note = _unit(path, header, form.edges)
    coded = [name for name in ("sform", "qform") if 0 < int(header[f"{name}_code"]) <= MAX_CODE]
    return Geometry(
        np.diag([scale, scale, scale, 1.0]) @ form.affine,
        (*notes, *note),
        at_face_value=form.name == (coded or ["pixdim"])[0] and scale == 1,
    )


def _read_sform(header: nib.Nifti1Header) -> np.ndarray | str:
    """Return the affine (4, 4) of the sform, or what is wrong with it."""
    affine = np.asarray(header.get_sform(), dtype=np.float64)
    fault = affine_fault(affine)
    return affine if fault is None else f"sform: {fault}"


def _read_qform(header: nib.Nifti1Header) -> np.ndarray | str:
    """Return the affine (4, 4) of qform and pixdim, or what is wrong with them."""
    qfac, *spacing = (float(value) for value in header["pixdim"][:4])
    if not all(0 < value < np.inf for value in spacing):
        return f"qform: found the spacing {tuple(spacing)} mm in the header, expected positive numbers"
    if not (qfac >= 0 or qfac == -1):  # readers take 0, and any other positive number, for 1
        return f"qform: found {qfac:g} in pixdim[0], expected 1 or -1"
    quaternion = np.array([header[f"quatern_{axis}"] for axis in "bcd"], dtype=np.float64)
    length = float(quaternion @ quaternion)
    if not length < 1.01:  # this way round, so that NaN is refused too
        return f"qform: the quaternion {quaternion.tolist()} is no rotation"
    sound = header.copy()
    sound["pixdim"][0] = -1 if qfac == -1 else 1
    if length - 1 > abs(header.quaternion_threshold):
        for axis, value in zip("bcd", quaternion / np.sqrt(length), strict=True):
            sound[f"quatern_{axis}"] = value
    affine = np.asarray(sound.get_qform(), dtype=np.float64)
    return affine if np.isfinite(affine).all() else "qform: the affine is not finite"


def _choose(path: Path, sform: _Form, qform: _Form) -> tuple[_Form, list[str]]:
    """Choose between two sound forms; a note says what was chosen if they differ."""
    spacing = float(np.abs(sform.edges / qform.edges - 1).max())
    if spacing < SAME_SPACING and (sform.directions * qform.directions).sum(axis=0).min() > SAME_DIRECTION:
        return sform, []
    both = f"the qform (code {qform.code}) and pixdim say {qform}, the sform (code {sform.code}) says {sform}"
    if np.array_equal(np.abs(sform.affine[:3, :3]), np.eye(3)) and spacing >= SAME_SPACING:
        return qform, [f"{both}: the sform is a placeholder, the qform was taken"]
    if sform.mirrored != qform.mirrored:
        raise VolumeError(path, f"{both}: these are mirror images, left and right cannot be told; "
                                "correct the header")  # fmt: skip
    if qform.code == SCANNER and sform.code != SCANNER:
        return qform, [f"{both}: the qform, which is the scanner's, was taken"]
    if sform.code == SCANNER and qform.code != SCANNER and spacing < SAME_SPACING:
        return sform, [f"{both}: the sform, which is the scanner's, was taken"]
    if sform.code == SCANNER and sform.sheared and spacing < SHEARED_SPACING:
        return sform, [f"{both}, and is sheared (a tilted gantry): the sform was taken"]
    raise VolumeError(path, f"{both}: which is right cannot be told; correct the header")


def _compare_with_pixdim(path: Path, sform: _Form, pixdim: np.ndarray) -> list[str]:
    """Hold pixdim (3,) beside the only form, of which it is no part; a note tells of what is odd."""
    found = tuple(pixdim.round(6).tolist())
    if not np.isfinite(pixdim).all() or not pixdim.all():
        return [f"found the spacing {found} in pixdim; the sform, {sform}, was taken"]
    if np.abs(sform.edges / np.abs(pixdim) - 1).max() < (SHEARED_SPACING if sform.sheared else SAME_SPACING):
        return [] if pixdim.min() > 0 else [f"found the spacing {found} in pixdim; its signs were ignored"]
    if (pixdim == 1).all():
        return [f"pixdim is all ones, the sform (code {sform.code}) says {sform}: the sform was taken"]
    raise VolumeError(
        path,
        f"found the spacing {found} in pixdim, but the sform (code {sform.code}) says {sform}, and no qform "
        "decides; correct the header",
    )


def _unit(path: Path, header: nib.Nifti1Header, edges: np.ndarray) -> tuple[float, list[str]]:
    """Return the factor from the header's unit to mm, given the voxels' edges (3,), with a note.

    Nobody scans voxels of 1.5 m: these are mm. But voxels of 3 micrometres are what a microscope sees.
    """
    code = int(header["xyzt_units"]) % 8
    if code not in UNITS:
        raise VolumeError(path, f"found the unit of length {code} in xyzt_units, expected 1 (m), 2 (mm) or 3 "
                                "(micrometre)")  # fmt: skip
    unit, factor = UNITS[code]
    if factor == 1:
        return 1.0, []
    smallest, largest = SCAN_SPACING
    size = f"voxels of {format_spacing(edges)} {unit} by the header's unit (xyzt_units)"
    if edges.min() * factor >= smallest and edges.max() * factor <= largest:
        return factor, [f"{size}: converted to {format_spacing(edges * factor)} mm"]
    if factor > 1 and edges.min() >= smallest and edges.max() <= largest:
        return 1.0, [f"{size}: taken for mm, no scan is that coarse"]
    raise VolumeError(path, f"{size} are no scan of a body; if they are mm, correct the header's unit")
