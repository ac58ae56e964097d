"""qform, sform, pixdim and units of a NIfTI header: what is certain is taken, the rest is refused."""

from __future__ import annotations

import re
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from meduet_fast.data.nifti_geometry import decide_geometry
from meduet_fast.errors import VolumeError

NAN = float("nan")
SCAN = (-1.3, -1.3, 10.0)  # columns of a scan of thick slices: to the right, to the back, to the head


def grid(spacing: tuple[float, float, float], degrees: float = 0.0, shear: float = 0.0) -> np.ndarray:
    """Affine (4, 4): spacing with signs, turned about z, the last axis tilted towards y."""
    turn, tilt = np.deg2rad(degrees), np.deg2rad(shear)
    rotation = np.array([[np.cos(turn), -np.sin(turn), 0], [np.sin(turn), np.cos(turn), 0], [0, 0, 1]])
    slant = np.array([[1, 0, 0], [0, 1, np.sin(tilt)], [0, 0, np.cos(tilt)]])
    affine = np.eye(4)
    affine[:3, :3] = rotation @ slant @ np.diag(spacing)
    affine[:3, 3] = 3, -5, 7
    return affine


def make(
    kind: type[nib.Nifti1Header] = nib.Nifti1Header,
    qform: np.ndarray | None = None,
    sform: np.ndarray | None = None,
    codes: tuple[int, int] = (1, 1),
    pixdim: tuple[float, ...] | None = None,
    **fields: object,
) -> nib.Nifti1Header:
    """Header of 40^3 voxels with these forms, of ``codes`` (qform, sform), then with these fields."""
    header = kind()
    header.set_data_shape((40, 40, 40))
    if qform is not None:
        header.set_qform(qform, codes[0])
    if sform is not None:
        header.set_sform(sform, codes[1])
    if pixdim is not None:
        header["pixdim"][1:4] = pixdim
    for field, value in fields.items():
        header[field] = value
    return header


def quaternion(b: float, c: float, d: float, **more: object) -> dict[str, object]:
    return {"quatern_b": b, "quatern_c": c, "quatern_d": d, **more}


THICK = {"pixdim": (1.3, 1.3, 10)}
TAKEN: dict[str, tuple[nib.Nifti1Header, np.ndarray, str]] = {
    # name: header, affine that is taken, what is said ("" for nothing)
    "both": (make(qform=grid(SCAN), sform=grid(SCAN)), grid(SCAN), ""),
    "rounded pixdim": (
        make(sform=grid((0.703125, 0.703125, 2.5)), pixdim=(0.703, 0.703, 2.5)),
        grid((0.703125, 0.703125, 2.5)),
        "",
    ),
    "turned": (make(qform=grid(SCAN, 20), sform=grid(SCAN, 20)), grid(SCAN, 20), ""),
    "qform alone": (make(qform=grid(SCAN, 20)), grid(SCAN, 20), ""),
    "left-handed qform": (make(qform=grid((1.3, -1.3, 10))), grid((1.3, -1.3, 10)), ""),
    "sform of ones": (
        make(qform=grid(SCAN), sform=grid((-1, -1, 1)), **THICK),
        grid(SCAN),
        r"the sform \(code 1\) says 1 x 1 x 1 along LPS: the sform is a placeholder, the qform was taken",
    ),
    "identity beside a mirrored qform": (
        make(qform=grid((-1.3, 1.3, 10)), sform=np.eye(4), codes=(1, 2)),
        grid((-1.3, 1.3, 10)),
        "the sform is a placeholder",
    ),
    "sform of zeros": (
        make(qform=grid(SCAN), sform=np.zeros((4, 4)), **THICK),
        grid(SCAN),
        "sform: singular .*; the qform was taken",
    ),
    "sform of NaN": (
        make(qform=grid(SCAN), sform=grid((NAN, 1, 1)), **THICK),
        grid(SCAN),
        "not finite; the qform was taken",
    ),
    "template's scale": (
        make(qform=grid((1.5, 1.5, 1.5)), sform=grid((1.8, 1.8, 1.8)), codes=(1, 4), pixdim=(1.5, 1.5, 1.5)),
        grid((1.5, 1.5, 1.5)),
        r"say 1.5 x 1.5 x 1.5 along RAS, .* 1.8 .*: the qform, which is the scanner's",
    ),
    "Talairach": (
        make(qform=grid(SCAN), sform=grid((-1.2, -1.4, 9), 8, 3), codes=(1, 3), **THICK),
        grid(SCAN),
        r"\(code 3\) .* the qform, which",
    ),
    "turned to a template": (
        make(qform=grid(SCAN), sform=grid(SCAN, 15), codes=(1, 2)),
        grid(SCAN),
        "the qform, which is the scanner's",
    ),
    "qform of the template": (
        make(qform=grid(SCAN, 15), sform=grid(SCAN), codes=(4, 1)),
        grid(SCAN),
        "the sform, which is the scanner's",
    ),
    "tilted gantry": (
        make(qform=grid(SCAN), sform=grid(SCAN, shear=15), **THICK),
        grid(SCAN, shear=15),
        "tilted gantry",
    ),
    "sform beside pixdim of zeros": (
        make(sform=grid(SCAN), pixdim=(0, 0, 0)),
        grid(SCAN),
        r"\(0.0, 0.0, 0.0\) in pixdim; the sform",
    ),
    "sform beside pixdim of NaN": (
        make(sform=grid(SCAN), pixdim=(1.3, NAN, 10)),
        grid(SCAN),
        "in pixdim; the sform",
    ),
    "sform beside pixdim of ones": (
        make(sform=grid(SCAN), pixdim=(1, 1, 1)),
        grid(SCAN),
        "pixdim is all ones",
    ),
    "sform beside negative pixdim": (
        make(sform=grid(SCAN), pixdim=(-1.3, 1.3, 10)),
        grid(SCAN),
        "its signs were ignored",
    ),
    "both beside pixdim of zeros": (
        make(qform=grid(SCAN), sform=grid(SCAN), pixdim=(0, 0, 0)),
        grid(SCAN),
        r"in pixdim; the sform.*\|qform: found the spacing \(0.0, 0.0, 0.0\).*; the sform was taken",
    ),
    "broken quaternion beside a sform": (
        make(qform=grid(SCAN), sform=grid(SCAN), **quaternion(1, 1, 0)),
        grid(SCAN),
        "no rotation; the sform was taken",
    ),
    "unknown code beside a qform": (
        make(qform=grid(SCAN), sform=grid(SCAN), sform_code=300),
        grid(SCAN),
        "sform_code is 300",
    ),
    "quaternion off by a rounding": (
        make(qform=grid(SCAN), **quaternion(0, 0, 1.0004)),
        grid(SCAN),
        "",
    ),
    "qfac 0": (make(qform=grid((1.3, 1.3, 10)), pixdim=(1.3, 1.3, 10)), grid((1.3, 1.3, 10)), ""),
    "micrometres": (
        make(sform=grid((700, 700, 2500)), pixdim=(700, 700, 2500), xyzt_units=3),
        grid((0.7, 0.7, 2.5)),
        "700 x 700 x 2500 micrometres .* converted to 0.7 x 0.7 x 2.5 mm",
    ),
    "micrometres and seconds, qform": (
        make(qform=grid((700, 700, 2500)), xyzt_units=3 + 8),
        grid((0.7, 0.7, 2.5)),
        "micrometres",
    ),
    "metres": (
        make(sform=grid((0.0007, 0.0007, 0.003)), pixdim=(0.0007, 0.0007, 0.003), xyzt_units=1),
        grid((0.7, 0.7, 3)),
        "converted to 0.7 x 0.7 x 3 mm",
    ),
    "metres that are mm": (
        make(sform=grid((1.5, 1.5, 1.5)), pixdim=(1.5, 1.5, 1.5), xyzt_units=1),
        grid((1.5, 1.5, 1.5)),
        "1.5 x 1.5 x 1.5 metres .* taken for mm",
    ),
}


REFUSED: dict[str, tuple[nib.Nifti1Header, str]] = {
    "mirror images": (
        make(qform=grid((-1.3, 1.3, 10)), sform=grid((1.3, 1.3, 10))),
        r"qform \(code 1\) and pixdim say 1.3 x 1.3 x 10 along LAS, the sform \(code 1\) says .* along RAS: "
        "these are mirror images",
    ),
    "mirrored by the template": (
        make(qform=grid((-1.3, 1.3, 10)), sform=grid((1.3, 1.3, 10)), codes=(1, 4)),
        "mirror images",
    ),
    "two scanners' spacings": (
        make(qform=grid(SCAN), sform=grid((-1.3, -1.3, 5)), **THICK),
        "1.3 x 1.3 x 10 .* 1.3 x 1.3 x 5 .* cannot be told",
    ),
    "two scanners' directions": (make(qform=grid(SCAN), sform=grid(SCAN, 90)), "along LPS.*cannot be told"),
    "two templates": (
        make(qform=grid(SCAN), sform=grid((-1, -1, 8)), codes=(4, 4), **THICK),
        "cannot be told",
    ),
    "scanner's sform, another spacing": (
        make(qform=grid(SCAN), sform=grid((-1.3, -1.3, 5)), codes=(2, 1), **THICK),
        "cannot be told",
    ),
    "sform and pixdim": (
        make(sform=grid((1, 1, 1)), pixdim=(1.3, 1.3, 10)),
        r"spacing \(1.3, 1.3, 10.0\) in pixdim, but the sform \(code 1\) says 1 x 1 x 1",
    ),
    "quaternion alone": (
        make(qform=grid(SCAN), **quaternion(1, 1, 0)),
        r"quaternion \[1.0, 1.0, 0.0\] is no rotation",
    ),
    "quaternion of NaN": (make(qform=grid(SCAN), **quaternion(0, NAN, 0)), "no rotation"),
    "origin of NaN": (make(qform=grid(SCAN), pixdim=(1.3, 1.3, 10), **{"qoffset_x": NAN}), "not finite"),
    "no form and pixdim of zeros": (make(pixdim=(0, 1, 1)), r"spacing \(0.0, 1.0, 1.0\) mm in the header"),
    "no form and negative pixdim": (make(pixdim=(-1, 1, 1)), r"spacing \(-1.0, 1.0, 1.0\) mm in the header"),
    "qform with pixdim of zeros": (make(qform=grid(SCAN), pixdim=(0, 1, 1)), r"spacing \(0.0, 1.0, 1.0\) mm"),
    "sform of zeros alone": (make(sform=np.zeros((4, 4))), "singular affine"),
    "unknown code alone": (make(sform=grid(SCAN), **THICK, sform_code=7), "sform_code is 7, expected 0 to 5"),
    "micrometres that may be mm": (
        make(sform=grid((3, 3, 3)), pixdim=(3, 3, 3), xyzt_units=3),
        "3 x 3 x 3 micrometres .* no scan of a body",
    ),
    "kilometres": (make(sform=grid((90, 90, 90)), pixdim=(90, 90, 90), xyzt_units=1), "90 metres .* no scan"),
    "unknown unit": (make(qform=grid(SCAN), xyzt_units=5), "unit of length 5 in xyzt_units"),
}


@pytest.fixture(params=[nib.Nifti1Header, nib.Nifti2Header], ids=["1", "2"])
def kind(request: pytest.FixtureRequest) -> type[nib.Nifti1Header]:
    return request.param  # type: ignore[no-any-return]


def as_kind(header: nib.Nifti1Header, kind: type[nib.Nifti1Header]) -> nib.Nifti1Header:
    """The same fields in a header of another version, unchecked."""
    other = kind(check=False)
    copied = ["dim", "pixdim", "qform_code", "sform_code", "xyzt_units", "srow_x", "srow_y", "srow_z"]
    for field in (*copied, *(f"qoffset_{axis}" for axis in "xyz"), *(f"quatern_{axis}" for axis in "bcd")):
        other[field] = header[field]
    return other


@pytest.mark.parametrize("name", TAKEN)
def test_what_is_certain_is_taken_and_said(name: str, kind: type[nib.Nifti1Header]) -> None:
    header, affine, said = TAKEN[name]
    geometry = decide_geometry(Path("scan.nii"), as_kind(header, kind))
    np.testing.assert_allclose(geometry.affine[:3, :3], affine[:3, :3], atol=1e-4)
    text = "|".join(geometry.notes)
    assert re.search(said, text)
    assert bool(text) == bool(said)


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_certain_is_refused(name: str, kind: type[nib.Nifti1Header]) -> None:
    header, reason = REFUSED[name]
    with pytest.raises(VolumeError, match=reason) as caught:
        decide_geometry(Path("scan.nii"), as_kind(header, kind))
    assert "\n" not in caught.value.reason


def test_without_any_form_x_runs_to_the_left_and_this_is_said() -> None:
    header = make(pixdim=(0.7, 0.7, 2.5))
    geometry = decide_geometry(Path("scan.nii"), header)
    np.testing.assert_array_equal(geometry.affine, header.get_base_affine())
    assert nib.aff2axcodes(geometry.affine) == ("L", "A", "S")
    assert "no orientation in the header" in geometry.notes[0]
    assert geometry.at_face_value


def test_the_origin_is_converted_too() -> None:
    geometry = decide_geometry(Path("scan.nii"), make(qform=grid((700, 700, 2500)), xyzt_units=3))
    np.testing.assert_allclose(geometry.affine[:3, 3], np.array([3, -5, 7]) / 1000)


@pytest.mark.parametrize("name", TAKEN)
def test_a_face_value_is_what_nibabel_takes_and_nothing_else_is(name: str) -> None:
    header, _, _ = TAKEN[name]
    geometry = decide_geometry(Path("scan.nii"), header)
    try:
        face = nib.Nifti1Header(header.binaryblock).get_best_affine()  # mended, as when it loads
    except ValueError:  # a quaternion that it does not read
        return
    assert geometry.at_face_value == np.array_equal(geometry.affine, face)


@pytest.mark.parametrize("qfac", [0.0, 1.0, 2.5, -1.0, -3.0, NAN])
def test_the_handedness_of_a_qform(qfac: float) -> None:
    header = make(qform=grid((1.3, 1.3, 10)))
    header["pixdim"][0] = qfac
    if qfac in (-3.0,) or np.isnan(qfac):
        with pytest.raises(VolumeError, match=r"in pixdim\[0\], expected 1 or -1"):
            decide_geometry(Path("scan.nii"), header)
    else:
        determinant = np.linalg.det(decide_geometry(Path("scan.nii"), header).affine[:3, :3])
        assert np.sign(determinant) == (-1 if qfac < 0 else 1)
