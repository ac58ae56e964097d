"""Scans of every format come in with the same voxels at the same places; what is not sure is refused."""

from __future__ import annotations

import builtins
import gzip
import os
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from meduet_fast.data.scans import Scan, ScanFacts, header_corrections, read_scan, scan_files
from meduet_fast.errors import VolumeError

AFFINE = np.array(
    [[-0.7, 0, 0, 90], [0, 0, 2.5, -40], [0, 0.7, 0, 11], [0, 0, 0, 1]]
)  # to the left, head, front


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(-1000, 1000, shape).astype(np.int16)


VOXELS = noise(7, 6, 5)


def save(path: Path, voxels: np.ndarray = VOXELS, kind: type = nib.Nifti1Image) -> Path:
    kind(voxels, AFFINE).to_filename(path)
    return path


def check(scan: Scan, voxels: np.ndarray = VOXELS) -> None:
    assert scan.voxels.dtype == np.float32
    np.testing.assert_array_equal(scan.voxels, voxels)
    np.testing.assert_allclose(scan.affine, AFFINE, atol=1e-5)
    assert scan.notes == ()


# --- NIfTI -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.nii", "A.NII", "a.nii.gz", "A.NII.GZ", "a.Nii.gz"])
@pytest.mark.parametrize("kind", [nib.Nifti1Image, nib.Nifti2Image])
def test_single_files_in_small_letters_and_capitals(tmp_path: Path, name: str, kind: type) -> None:
    saved = save(tmp_path / f"saved{name[1:].lower()}", kind=kind)
    check(read_scan(saved.rename(tmp_path / name)))


@pytest.mark.parametrize(
    ("header", "voxels"),
    [("a.hdr", "a.img"), ("A.HDR", "A.IMG"), ("a.hdr", "a.img.gz"), ("a.hdr.gz", "a.img.gz")],
)
@pytest.mark.parametrize("kind", [nib.Nifti1Pair, nib.Nifti2Pair])
def test_both_halves_of_a_pair_name_it(tmp_path: Path, header: str, voxels: str, kind: type) -> None:
    save(tmp_path / "saved.img", kind=kind)
    (tmp_path / "b.img").touch()  # another's
    for ending, name in ((".hdr", header), (".img", voxels)):
        content = (tmp_path / f"saved{ending}").read_bytes()
        (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    for name in (header, voxels):
        check(read_scan(tmp_path / name))
        assert scan_files(tmp_path / name) == (tmp_path / header, tmp_path / voxels)


def test_half_a_pair_and_an_analyze_header_are_refused(tmp_path: Path) -> None:
    save(tmp_path / "a.img", kind=nib.Nifti1Pair)
    (tmp_path / "a.img").rename(tmp_path / "b.img")
    with pytest.raises(VolumeError, match=r"other half of the pair, a\.img, is missing"):
        read_scan(tmp_path / "a.hdr")
    with pytest.raises(VolumeError, match=r"other half of the pair, b\.hdr, is missing"):
        read_scan(tmp_path / "b.img")
    nib.AnalyzeImage(VOXELS, None).to_filename(tmp_path / "c.img")
    with pytest.raises(VolumeError, match=r"Analyze header.*left and right are unknown"):
        read_scan(tmp_path / "c.hdr")


def test_one_volume_of_several_is_read_by_its_channel(tmp_path: Path) -> None:
    path = save(tmp_path / "a.nii.gz", noise(7, 6, 5, 3))
    check(read_scan(path, 0), noise(7, 6, 5, 3)[..., 0])
    check(read_scan(path, 2), noise(7, 6, 5, 3)[..., 2])
    for channel in (3, -1):
        with pytest.raises(VolumeError, match=f"expected a channel {channel} on the fourth axis"):
            read_scan(path, channel)
    with pytest.raises(VolumeError, match=r"shape \(7, 6, 5, 3\), expected 3 axes"):
        read_scan(path)
    check(read_scan(save(tmp_path / "b.nii"), 0))


@pytest.mark.parametrize(
    ("slope", "intercept", "scale"),
    [
        (2.0, 10.0, (2, 10)),
        (0.0, 10.0, (1, 0)),
        (float("nan"), float("nan"), (1, 0)),
        (float("inf"), 1.0, (1, 0)),
    ],
)
def test_the_scaling_is_nibabels(
    tmp_path: Path, slope: float, intercept: float, scale: tuple[int, int]
) -> None:
    path = save(tmp_path / "a.nii")
    content = bytearray(path.read_bytes())
    struct.pack_into("<2f", content, 112, slope, intercept)
    path.write_bytes(content)
    check(read_scan(path), VOXELS * scale[0] + scale[1])
    struct.pack_into("<2f", content, 112, 2, float("nan"))
    path.write_bytes(content)
    with pytest.raises(VolumeError, match="damaged NIfTI header: Valid slope but invalid intercept"):
        read_scan(path)


def with_offset(content: bytes, offset: float, version: int = 1) -> bytes:
    changed = bytearray(content)
    struct.pack_into("<f" if version == 1 else "<q", changed, 108 if version == 1 else 168, offset)
    return bytes(changed)


def with_extension(content: bytes, size: int) -> bytes:
    extension = struct.pack("<2i", size, 6) + bytes(size - 8)
    return content[:348] + b"\1\0\0\0" + extension + content[352:]


PLAIN = Path("a.nii")
OFFSETS: dict[str, tuple[int, Callable[[bytes], bytes]]] = {
    "0, behind the extender": (1, lambda content: with_offset(content, 0)),
    "0, behind the header": (1, lambda content: with_offset(content[:348] + content[352:], 0)),
    "348": (1, lambda content: with_offset(content[:348] + content[352:], 348)),
    "NaN": (1, lambda content: with_offset(content, float("nan"))),
    "0 of version 2": (2, lambda content: with_offset(content, 0, 2)),
    "behind an extension": (1, lambda content: with_offset(with_extension(content, 32), 384)),
    "before an extension": (1, lambda content: with_offset(with_extension(content, 32), 352)),
    "before two": (1, lambda content: with_offset(with_extension(with_extension(content, 48), 32), 352)),
    "no multiple of 16": (1, lambda content: with_offset(content[:352] + bytes(7) + content[352:], 359)),
}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", OFFSETS)
def test_the_length_tells_where_voxels_begin_that_the_header_puts_inside_itself(
    tmp_path: Path, name: str, packed: bool
) -> None:
    version, change = OFFSETS[name]
    path = save(tmp_path / "a.nii", kind=nib.Nifti1Image if version == 1 else nib.Nifti2Image)
    content = change(path.read_bytes())
    path = tmp_path / ("b.nii.gz" if packed else "b.nii")
    path.write_bytes(gzip.compress(content) if packed else content)
    check(read_scan(path))


@pytest.mark.parametrize("offset", [0, 100, 351, -16, float("nan")])
def test_an_offset_inside_the_header_of_a_file_of_odd_length_is_refused(
    tmp_path: Path, offset: float
) -> None:
    path = save(tmp_path / "a.nii")
    path.write_bytes(with_offset(path.read_bytes() + bytes(5), offset))
    with pytest.raises(VolumeError, match=r"vox_offset .* inside of the header, .* 777 bytes"):
        read_scan(path)


@pytest.mark.parametrize(
    ("field", "code", "value", "reason"),
    [
        (70, "h", 16, r"found 16 bits per voxel, but voxels of type float32"),
        (70, "h", 2, r"found 16 bits per voxel, but voxels of type uint8"),
        (72, "h", 32, r"found 32 bits per voxel, but voxels of type int16"),
        (46, "h", 4, r"found 84 bytes behind the voxels, more than a slice: the shape \(7, 6, 4\)"),
        (42, "h", 3, r"found 240 bytes behind the voxels"),
        (70, "2h", (2, 8), r"found 210 bytes behind the voxels.* or the voxel type uint8"),
    ],
)
@pytest.mark.parametrize("packed", [False, True])
def test_a_header_of_another_type_or_shape_than_the_voxels_is_refused(
    tmp_path: Path, field: int, code: str, value: Any, reason: str, packed: bool
) -> None:
    content = bytearray(save(tmp_path / "a.nii").read_bytes())
    struct.pack_into(f"<{code}", content, field, *np.ravel(value).tolist())
    path = tmp_path / ("b.nii.gz" if packed else "b.nii")
    path.write_bytes(gzip.compress(content) if packed else content)
    with pytest.raises(VolumeError, match=reason):
        read_scan(path)


def test_a_few_bytes_behind_the_voxels_are_noted_and_absent_bits_are_not(tmp_path: Path) -> None:
    path = save(tmp_path / "a.nii")
    content = bytearray(path.read_bytes())
    struct.pack_into("<h", content, 72, 0)
    path.write_bytes(content)
    check(read_scan(path))
    path.write_bytes(content + bytes(83))
    assert read_scan(path).notes == ("83 bytes behind the voxels, less than a slice, were ignored",)


# --- ITK -------------------------------------------------------------------------------------------


def itk_image(sitk: Any, voxels: np.ndarray = VOXELS) -> Any:
    """Image whose affine is AFFINE: ITK's x and y are negative, its arrays have their axes backwards."""
    image = sitk.GetImageFromArray(voxels.transpose())
    axes = np.diag([-1, -1, 1]) @ AFFINE[:3, :3]
    spacing = np.linalg.norm(axes, axis=0)
    image.SetSpacing(spacing.tolist())
    image.SetDirection((axes / spacing).ravel().tolist())
    image.SetOrigin((AFFINE[:3, 3] * [-1, -1, 1]).tolist())
    return image


@pytest.mark.parametrize("name", ["a.mha", "a.mhd", "a.nrrd", "A.MHA", "A.NRRD"])
def test_itk_formats(tmp_path: Path, sitk: Any, name: str) -> None:
    saved = tmp_path / f"saved{name[1:].lower()}"
    sitk.WriteImage(itk_image(sitk), str(saved))
    path = saved.rename(tmp_path / name)
    check(read_scan(path))
    assert scan_files(path) == ((path, tmp_path / "saved.raw") if name.endswith("mhd") else (path,))


def test_itk_voxels_are_those_of_the_same_nifti(tmp_path: Path, sitk: Any) -> None:
    sitk.WriteImage(itk_image(sitk), str(tmp_path / "a.nii.gz"))  # ITK's own NIfTI writer turns LPS to RAS
    check(read_scan(tmp_path / "a.nii.gz"))


COLUMNS = " ".join(f"({','.join(map(str, column))})" for column in AFFINE[:3, :3].T)
ORIGIN = f"space origin: ({','.join(map(str, AFFINE[:3, 3]))})\n"
DIRECTIONS = f"space directions: {COLUMNS}\n{ORIGIN}"
RAS = "space: right-anterior-superior\n"


def nrrd(path: Path, fields: str) -> Path:
    header = f"NRRD0004\ntype: short\ndimension: 3\nsizes: 7 6 5\nendian: little\nencoding: raw\n{fields}\n"
    path.write_bytes(header.encode() + VOXELS.tobytes(order="F"))
    return path


@pytest.mark.parametrize("space", ["right-anterior-superior", "Right Anterior Superior", "RAS", "ras"])
@pytest.mark.parametrize("more", ["kinds: domain domain domain\n", 'space units: "mm" "mm" "mm"\n'])
def test_an_nrrd_in_ras_coordinates(tmp_path: Path, space: str, more: str) -> None:
    pytest.importorskip("SimpleITK")
    check(read_scan(nrrd(tmp_path / "a.nrrd", f"space: {space}\n{DIRECTIONS}{more}")))


@pytest.mark.parametrize(
    ("fields", "missing"),
    [
        (f"space dimension: 3\n{DIRECTIONS}", ["no orientation in the header (no space)"]),
        ("spacings: 2 2 2\naxis mins: 1 2 3\n", ["no orientation in the header (no space)"]),
        (f"{RAS}space directions: {COLUMNS}\n", ["no position in the header (no space origin)"]),
        (
            'spacings: 2 2 2\nunits: "mm" "mm" "mm"\n',
            ["no orientation in the header (no space)", "no position in the header (no space origin)"],
        ),
        (f"{RAS}{DIRECTIONS}", []),
    ],
)
def test_an_nrrd_without_a_space_says_so(tmp_path: Path, fields: str, missing: list[str]) -> None:
    pytest.importorskip("SimpleITK")
    path = nrrd(tmp_path / "a.nrrd", fields)
    notes = read_scan(path).notes
    assert [note.partition(":")[0] for note in notes] == missing
    assert header_corrections(path) == ({"notes": notes} if notes else {})


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        (RAS + DIRECTIONS + 'space units: "um" "um" "um"\n', "found the unit of length um, expected mm"),
        (RAS + DIRECTIONS + 'space units: "mm" "mm" "um"\n', "found the unit of length um, expected mm"),
        ('spacings: 2 2 2\nunits: "um" "um" "um"\n', "found the unit of length um, expected mm"),
        ('spacings: 2 2 2\nunits: "" "" "um"\nkinds: space space space\n', "unit of length um"),
        ("", "found no spacing in the header, expected positive numbers of mm"),
        ("spacings: -2 2 2\n", "found the spacing -2 2 2 in the header"),
        ("spacings: nan nan nan\n", "found the spacing nan nan nan in the header"),
        (RAS, "found no spacing in the header"),
        (RAS + "space directions: none none none\n", "found the space directions none none none"),
        ("space: 3D-right-handed\n" + DIRECTIONS, "found the space 3D-right-handed, expected right-ant"),
        ("space: scanner-xyz\n" + DIRECTIONS, "found the space scanner-xyz, expected right-anterior-sup"),
    ],
)
def test_an_nrrd_that_does_not_state_its_geometry_is_refused(
    tmp_path: Path, fields: str, reason: str
) -> None:
    pytest.importorskip("SimpleITK")
    with pytest.raises(VolumeError, match=reason):
        read_scan(nrrd(tmp_path / "a.nrrd", fields))


def test_an_nrrd_header_without_voxels_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("SimpleITK")
    nrrd(tmp_path / "a.raw", "").write_bytes(VOXELS.tobytes(order="F"))
    with pytest.raises(VolumeError, match="an NRRD header without voxels"):
        read_scan(nrrd(tmp_path / "a.nrrd", f"{RAS}{DIRECTIONS}data file: a.raw\n"))


@pytest.mark.parametrize(
    ("fields", "found"),
    [
        ("ElementSpacing = 2 3 4", None),
        ("ElementSize = 2 3 4", None),
        ("ElementSpacing: 2 3 4", None),
        ("ElementSize = 1 1 1\nElementSpacing = 2 3 4", None),
        ("Comment = none", "no spacing"),
        ("elementspacing = 2 3 4", "no spacing"),
        ("ElementSpacing = -2 3 4", "the spacing -2 3 4"),
        ("ElementSize = 2 3 -4", "the spacing 2 3 -4"),
    ],
)
def test_a_metaimage_states_its_spacing(tmp_path: Path, fields: str, found: str | None) -> None:
    pytest.importorskip("SimpleITK")
    path = metaimage(tmp_path / "a.mha", f"{fields}\n")
    if found is None:
        np.testing.assert_array_equal(read_scan(path).affine, np.diag([-2, -3, 4, 1]))
    else:
        with pytest.raises(VolumeError, match=f"found {found} in the header, expected positive numbers of"):
            read_scan(path)


def metaimage(path: Path, fields: str) -> Path:
    header = f"ObjectType = Image\nNDims = 3\nDimSize = 7 6 5\nElementType = MET_SHORT\n{fields}"
    path.write_bytes(header.encode() + b"ElementDataFile = LOCAL\n" + VOXELS.tobytes(order="F"))
    return path


@pytest.mark.parametrize(
    ("fields", "missing"),
    [
        ("", ["no orientation in the header (no TransformMatrix)", "no position in the header (no Offset)"]),
        ("Offset = 0 0 0\n", ["no orientation in the header (no TransformMatrix)"]),
        ("transformmatrix = 0 1 0 1 0 0 0 0 1\nOrigin = 1 2 3\n", ["no orientation in the header (no Tra"]),
        ("AnatomicalOrientation = RAI\nPosition = 1 2 3\n", ["no orientation in the header (no Transform"]),
        ("TransformMatrix = 1 0 0 0 1 0 0 0 1\n", ["no position in the header (no Offset)"]),
        ("Rotation = 1 0 0 0 1 0 0 0 1\nOffset = 0 0 0\n", []),
        ("AnatomicalOrientation = LPI\nOrientation = -1 0 0 0 -1 0 0 0 1\nOrigin = 0 0 0\n", []),
    ],
)  # fmt: skip
def test_a_metaimage_that_leaves_out_its_geometry_says_so(
    tmp_path: Path, fields: str, missing: list[str]
) -> None:
    pytest.importorskip("SimpleITK")
    path = metaimage(tmp_path / "a.mha", f"ElementSpacing = 2 3 4\n{fields}")
    notes = read_scan(path).notes
    assert len(notes) == len(missing)
    assert all(note.startswith(begin) for note, begin in zip(notes, missing, strict=True))
    assert header_corrections(path) == ({"notes": notes} if notes else {})


@pytest.mark.parametrize("named", ["LPI", "asl"])
def test_a_metaimage_that_names_axes_without_a_matrix_is_refused(tmp_path: Path, named: str) -> None:
    pytest.importorskip("SimpleITK")
    path = metaimage(tmp_path / "a.mha", f"ElementSpacing = 2 3 4\nAnatomicalOrientation = {named}\n")
    with pytest.raises(
        VolumeError, match=f"found AnatomicalOrientation {named.upper()} and no Transf"
    ) as caught:
        read_scan(path)
    assert header_corrections(path) == {"geometry": caught.value.reason}


@pytest.mark.parametrize("name", ["a.mha", "a.nrrd"])
def test_an_image_at_the_origin_is_taken_at_its_face_value(tmp_path: Path, sitk: Any, name: str) -> None:
    sitk.WriteImage(sitk.GetImageFromArray(VOXELS.transpose()), str(tmp_path / name))
    assert read_scan(tmp_path / name).notes == ()
    assert header_corrections(tmp_path / name) == {}


def test_a_name_that_is_not_utf8_is_refused_before_itk_ends_the_process(tmp_path: Path) -> None:
    pytest.importorskip("SimpleITK")
    odd = os.fsdecode(b"K\xf6ln")
    nrrd(tmp_path / f"{odd}.nrrd", RAS + DIRECTIONS)
    (tmp_path / "a.mhd").write_bytes(b"NDims = 3\nElementDataFile = K\xf6ln.raw\n")
    for folder in (odd, "slices"):
        (tmp_path / folder).mkdir()
    (tmp_path / "slices" / f"{odd}.dcm").touch()
    for name, said in (
        (f"{odd}.nrrd", ""),
        (odd, ""),
        ("a.mhd", f"{odd}.raw: "),
        ("slices", f"{odd}.dcm: "),
    ):
        with pytest.raises(VolumeError) as caught:
            read_scan(tmp_path / name)
        assert caught.value.reason == f"{said}the name is not UTF-8, which ITK cannot open: rename it"


def test_a_channel_of_an_itk_file(tmp_path: Path, sitk: Any) -> None:
    image = sitk.JoinSeries([itk_image(sitk, VOXELS + add) for add in (0, 1)])
    sitk.WriteImage(image, str(tmp_path / "a.mha"))
    vector = sitk.Compose([itk_image(sitk, VOXELS + add) for add in (0, 1)])
    sitk.WriteImage(vector, str(tmp_path / "b.nrrd"))
    for name in ("a.mha", "b.nrrd"):
        check(read_scan(tmp_path / name, 1), VOXELS + 1)
        with pytest.raises(VolumeError, match=r"shape \(7, 6, 5, 2\), expected 3 axes"):
            read_scan(tmp_path / name)
        with pytest.raises(VolumeError, match="expected a channel 2 on the fourth axis"):
            read_scan(tmp_path / name, 2)


def test_bad_itk_files_are_refused(tmp_path: Path, sitk: Any) -> None:
    with pytest.raises(VolumeError, match="cannot be read: No such file"):
        read_scan(tmp_path / "absent.mha")
    (tmp_path / "text.nrrd").write_text("no image\n", encoding="utf-8")
    with pytest.raises(VolumeError, match=r"ITK cannot read it: \S") as caught:
        read_scan(tmp_path / "text.nrrd")
    assert "\n" not in caught.value.reason
    sitk.WriteImage(itk_image(sitk), str(tmp_path / "a.mhd"))
    (tmp_path / "a.raw").unlink()
    with pytest.raises(VolumeError, match="cannot be read: No such file") as caught:
        read_scan(tmp_path / "a.mhd")
    assert caught.value.path == tmp_path / "a.raw"
    (tmp_path / "b.mhd").write_text("NDims = 3\nElementDataFile = slice%03d.raw 1 9 1\n", encoding="utf-8")
    with pytest.raises(VolumeError, match=r"slice%03d.*expected the name of one file"):
        read_scan(tmp_path / "b.mhd")


def test_without_itk_its_formats_say_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def absent(name: str, *arguments: Any, **more: Any) -> Any:
        if name == "SimpleITK":
            raise ImportError(name)
        return real(name, *arguments, **more)

    monkeypatch.setattr(builtins, "__import__", absent)
    for name in ("a.mha", "a.mhd", "a.nrrd", "A.NRRD"):
        (tmp_path / name).touch()
        with pytest.raises(VolumeError, match=r"pip install '\.\[itk\]' in a clone"):
            read_scan(tmp_path / name)
    with pytest.raises(VolumeError, match=r"pip install '\.\[itk\]' in a clone"):
        read_scan(tmp_path)


def test_other_files_are_no_scans(tmp_path: Path) -> None:
    (tmp_path / "a.png").touch()
    with pytest.raises(VolumeError, match=r"no format that is read: expected \.nii, .*\.nrrd, or a folder"):
        read_scan(tmp_path / "a.png")


# --- facts -----------------------------------------------------------------------------------------


def test_facts_are_the_same_however_the_axes_are_stored(tmp_path: Path) -> None:
    image = nib.Nifti1Image(VOXELS, AFFINE)
    image.to_filename(tmp_path / "a.nii")
    nib.as_closest_canonical(image).to_filename(tmp_path / "b.nii.gz")
    nib.Nifti1Image(VOXELS.astype(np.float64), AFFINE).to_filename(tmp_path / "c.nii")
    facts = [ScanFacts.of(read_scan(tmp_path / name)) for name in ("a.nii", "b.nii.gz", "c.nii")]
    assert facts[0] == facts[1] == facts[2]
    assert facts[0].size == (7, 5, 6)
    assert facts[0].spacing == pytest.approx((0.7, 2.5, 0.7))
    assert facts[0].extent == pytest.approx((4.9, 12.5, 4.2))
    assert (facts[0].values[0], facts[0].values[3]) == (VOXELS.min(), VOXELS.max())
    assert facts[0].values[1:3] == pytest.approx(np.percentile(VOXELS, (1, 99)))
    assert ScanFacts.from_json(facts[0].to_json()) == facts[0]
    other = replace(read_scan(tmp_path / "a.nii"), voxels=VOXELS[::-1].astype(np.float32))
    assert ScanFacts.of(other).fingerprint != facts[0].fingerprint
