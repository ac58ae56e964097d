"""Each series of a DICOM folder is a volume; what is none is left out by name, and a fault is refused."""

from __future__ import annotations

import json
import locale
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from meduet_fast.data.dicom import SPREAD, Series, find_series
from meduet_fast.data.folders import LeftOut, format_left_out
from meduet_fast.data.intensity import MR, IntensityRule
from meduet_fast.data.scans import read_scan, scan_files
from meduet_fast.data.sources import VolumeEntry, find_volumes
from meduet_fast.data.transforms import TransformConfig, content_key
from meduet_fast.errors import UserError, VolumeError

Positions = list[tuple[float, float, float]]
ACROSS = "0\\1\\0\\0\\0\\1"  # slices across the x axis
CT = "1.2.840.10008.5.1.4.1.1.2"


def dicom(
    sitk: Any, folder: Path, positions: Positions, series: str = "1.2.3.4", axes: str = "1\\0\\0\\0\\1\\0",
    description: str = "chest", number: str = "", first: int = 0, more: dict[str, Any] | None = None,
) -> None:  # fmt: skip
    """Write slices of 6 columns and 5 rows; slice number n has values of 1100 + 100 n.

    ``more``: tags, the same for all or one for each slice.
    """
    folder.mkdir(exist_ok=True, parents=True)
    writer = sitk.ImageFileWriter()
    writer.KeepOriginalImageUIDOn()
    for n, position in enumerate(positions):
        noise = np.random.default_rng(n).integers(0, 50, (5, 6))
        image = sitk.GetImageFromArray((noise + 1100 + 100 * n).astype(np.int16)[None])
        image.SetSpacing((0.7, 0.8, 1))
        tags = {
            "0008|0060": "CT", "0008|103e": description, "0020|000e": series, "0020|000d": "1.2.3",
            "0008|0018": f"{series}.{n + first}", "0020|0032": "\\".join(map(str, position)),
            "0020|0037": axes, "0028|1052": "-1024", "0028|1053": "1", "0020|0013": str(n),
            "0020|0011": number,
        }  # fmt: skip
        for key, value in (tags | (more or {})).items():
            image.SetMetaData(key, value if isinstance(value, str) else value[n])
        writer.SetFileName(str(folder / f"{series}-{n + first}.dcm"))
        writer.Execute(image)


def without(tag: str, *files: Path) -> None:
    """Rename a tag, which ITK's writer always writes, to the one before it, which nobody knows."""
    group, element = (int(part, 16).to_bytes(2, "little") for part in tag.split("|"))
    before = (int(tag[5:], 16) - 1).to_bytes(2, "little")
    for file in files:
        content = file.read_bytes()
        assert group + element in content
        file.write_bytes(content.replace(group + element, group + before, 1))


def along_z(*heights: float) -> Positions:
    return [(10.0, 20.0, height) for height in heights]


STACK = along_z(0, 1.5, 3, 4.5)


def left_out(items: list[LeftOut]) -> dict[str, str]:
    return {item.part or item.path.name: item.reason for item in items}


# --- one series ------------------------------------------------------------------------------------


def test_a_series(tmp_path: Path, sitk: Any) -> None:
    dicom(sitk, tmp_path / "s", along_z(4.5, 0.0, 3.0, 1.5))
    (tmp_path / "s" / "notes.txt").write_text("not an image", encoding="utf-8")
    locale.setlocale(locale.LC_ALL, "C.UTF-8")
    (entry,) = find_volumes(tmp_path / "s").volumes
    scan = read_scan(entry.path, series=entry.series)
    assert locale.setlocale(locale.LC_CTYPE) == "C.UTF-8"  # in C Python would open files as ASCII
    assert scan.voxels.shape == (6, 5, 4)
    first = scan.voxels[0, 0].round(-2)
    np.testing.assert_array_equal(first - first[0], [0, 200, 100, -100])  # by height, not by number
    assert scan.voxels[:, :, 1].min() >= 1100 + 300 - 1024
    # Columns lie 0.7 mm apart, rows 0.8 mm; x and y of LPS are turned to RAS.
    np.testing.assert_allclose(
        scan.affine, [[-0.7, 0, 0, -10], [0, -0.8, 0, -20], [0, 0, 1.5, 0], [0, 0, 0, 1]]
    )
    np.testing.assert_array_equal(read_scan(tmp_path / "s").voxels, scan.voxels)
    assert [file.name for file in scan_files(entry.path, entry.series)] == [
        f"1.2.3.4-{number}.dcm" for number in range(4)
    ]
    assert entry.name == "s"


@pytest.mark.parametrize(
    ("positions", "more", "reason"),
    [
        (
            along_z(0, 1.5, 4.5, 6), {},
            "missing or unevenly spaced: 1.5 to 3 mm apart, 1.5 mm as a rule, 1 gaps",
        ),
        (along_z(0, 1.5, 3.2, 4.7), {}, "unevenly spaced"),
        (along_z(0, 1.5, 1.5, 3), {}, r"at one place, 1\.2\.3\.4-1\.dcm and 1\.2\.3\.4-2\.dcm \(several vol"),
        (along_z(0, 1.5, 1.5, 3), {"0008|0018": ["1.1", "1.2", "1.2", "1.3"]}, "the same image twice"),
        (along_z(0, 0, 0, 1.5, 1.5, 1.5), {}, "several slices at one place"),
        ([(10, 20 + 0.5 * z, 1.5 * z) for z in range(4)], {}, "tilted gantry"),
        (along_z(0, 2, 4, 6), {"0020|0012": ["1", "2", "1", "2"]}, r"several acquisitions \(1, 2\) lie betw"),
        (along_z(0, 4, 2, 6), {"0020|0012": ["1", "1", "2", "2"]}, r"several acquisitions \(1, 2\) lie betw"),
        (STACK, {"0020|0037": ["1\\0\\0\\0\\1\\0"] * 3 + ["1\\0\\0\\0\\0\\1"]}, "slices of several orient"),
    ],
)  # fmt: skip
def test_a_series_with_a_fault_is_listed_and_refused_by_name(
    tmp_path: Path, sitk: Any, positions: Positions, more: dict[str, Any], reason: str
) -> None:
    if "several orient" in reason:  # more than a localizer has
        positions = along_z(*range(40))
        more = {"0020|0037": more["0020|0037"][:3] * 13 + more["0020|0037"][3:]}
    dicom(sitk, tmp_path / "s", positions, number="3", more=more)
    (entry,) = find_volumes(tmp_path / "s").volumes
    with pytest.raises(VolumeError, match=reason) as caught:
        read_scan(entry.path, series=entry.series)
    assert entry.tell(caught.value.reason).startswith("series 3 chest: ")


@pytest.mark.parametrize(("tag", "count"), [("0020|0037", 6), ("0028|0030", 2)])
def test_slices_that_do_not_say_how_they_lie_are_refused(
    tmp_path: Path, sitk: Any, tag: str, count: int
) -> None:
    dicom(sitk, tmp_path / "s", STACK)
    without(tag, tmp_path / "s" / "1.2.3.4-2.dcm")
    (entry,) = find_volumes(tmp_path / "s").volumes
    with pytest.raises(VolumeError) as caught:
        read_scan(entry.path, series=entry.series)
    assert caught.value.reason == f"1.2.3.4-2.dcm: found None in the tag ({tag}), expected {count} numbers"


@pytest.mark.parametrize(
    "more",
    [
        {"0020|0012": ["1", "1", "2", "2"]},  # one acquisition above the other
        {"0020|0012": ["1", "2", "3", "4"]},  # one for each slice
        {"0020|0012": ["1", "2", "1", "2"], "0008|0060": "MR"},  # acquired in turns
    ],
)
def test_slices_of_several_acquisitions_that_make_one_volume_are_read(
    tmp_path: Path, sitk: Any, more: dict[str, Any]
) -> None:
    dicom(sitk, tmp_path / "s", STACK, more=more)
    assert read_scan(tmp_path / "s").voxels.shape == (6, 5, 4)


# --- several ---------------------------------------------------------------------------------------


@pytest.fixture
def study(tmp_path: Path, sitk: Any) -> Path:
    """Two series, of which one has a gap, among what is no volume."""
    folder = tmp_path / "study"
    dicom(sitk, folder, along_z(0, 2, 4, 6, 8), series="1.2.9", description="Thorax 1.0", number="3")
    dicom(sitk, folder, along_z(0, 1, 2, 5), series="1.2.8", description="Lung", number="10")
    dicom(sitk, folder, along_z(0, 1), series="1.2.1", description="x", number="1",
          more={"0008|0008": "ORIGINAL\\PRIMARY\\LOCALIZER"})  # fmt: skip
    return folder


def test_each_series_is_a_volume_of_its_own(study: Path) -> None:
    listing = find_volumes(study)
    assert [entry.name for entry in listing.volumes] == ["study-10_Lung", "study-3_Thorax_1.0"]
    lung, thorax = listing.volumes
    assert read_scan(thorax.path, series=thorax.series).voxels.shape == (6, 5, 5)
    with pytest.raises(VolumeError, match="1 gaps"):
        read_scan(lung.path, series=lung.series)
    assert format_left_out(listing.left_out) == [
        f"left out: {study}: series 1 x, 2 images: a localizer (scout)"
    ]
    assert not listing.left_out[0].asked
    with pytest.raises(VolumeError, match=r"2 DICOM series; series 3 Thorax 1\.0, 5 slices; series 10 Lung"):
        read_scan(study)


def test_only_its_own_files_decide_whether_a_series_is_up_to_date(
    tmp_path: Path, sitk: Any, study: Path
) -> None:
    def keys() -> dict[str, str]:
        return {
            entry.name: content_key(entry, TransformConfig(), "t") for entry in find_volumes(study).volumes
        }

    before = keys()
    (study / "notes.txt").write_text("x")
    dicom(sitk, study, along_z(0), series="1.2.5", number="5")
    assert keys() == before
    dicom(sitk, study, along_z(3), series="1.2.8", description="Lung", number="10", first=4)  # fills the gap
    after = keys()
    assert after["study-3_Thorax_1.0"] == before["study-3_Thorax_1.0"]
    assert after["study-10_Lung"] != before["study-10_Lung"]
    assert len(set(after.values())) == 2
    # Of a folder with nothing else it is what it was when a folder was one series.
    alone = tmp_path / "alone"
    alone.mkdir()
    for file in study.glob("1.2.9-*"):
        shutil.copy(file, alone)
    (entry,) = find_volumes(alone).volumes
    plain = VolumeEntry(alone, "d", "b", IntensityRule(), "n")
    assert content_key(entry, TransformConfig(), "t") == content_key(plain, TransformConfig(), "t")


def test_names_of_series_are_unique_and_stable(tmp_path: Path, sitk: Any) -> None:
    for series in ("1.2.1", "1.2.2"):
        dicom(sitk, tmp_path / "s", STACK, series=series, number="2")
    dicom(sitk, tmp_path / "s", STACK, series="1.2.3", description="")
    names = [entry.name for entry in find_volumes(tmp_path / "s").volumes]
    assert len(set(names)) == 3
    assert [name[:9] for name in names] == ["s-1.2.3", "s-2_chest", "s-2_chest"]
    dicom(sitk, tmp_path / "s", STACK, series="1.2.4", number="2")
    assert set(names) < {entry.name for entry in find_volumes(tmp_path / "s").volumes}


def test_a_description_that_is_not_utf8_is_escaped(tmp_path: Path, sitk: Any) -> None:
    """As of most scanners in Europe; it also becomes a part of the stored metadata."""
    for series, number in (("1.2.1", "1"), ("1.2.2", "2")):
        dicom(sitk, tmp_path / "s", STACK, series=series, number=number, description="Schaedel")
    for path in (tmp_path / "s").iterdir():
        path.write_bytes(path.read_bytes().replace(b"Schaedel", "Sch\xe4del\n".encode("latin1")))
    listing = find_volumes(tmp_path / "s")
    assert [entry.name for entry in listing.volumes] == ["s-1_Sch_xe4del", "s-2_Sch_xe4del"]
    series = listing.volumes[0].series
    assert series is not None
    assert series.label == "1 Sch\\xe4del"


def test_a_list_that_names_a_folder_means_its_series(tmp_path: Path, sitk: Any, study: Path) -> None:
    dicom(sitk, tmp_path / "scout", along_z(0, 1), description="Topogram 0.6")
    path = tmp_path / "list.json"
    path.write_text(json.dumps({"name": "l", "training": ["study", "scout"]}))
    listing = find_volumes(path)
    assert [entry.name for entry in listing.volumes] == ["l-study-10_Lung", "l-study-3_Thorax_1.0"]
    assert {item.path.name: item.asked for item in listing.left_out} == {"study": False, "scout": True}


# --- what is no volume -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("positions", "more", "reason"),
    [
        (along_z(0), {}, "a single DICOM image"),
        (along_z(0, 1.5, 3), {}, "fewer than 4 slices"),
        (along_z(0, 0, 0, 0, 0), {}, "DICOM images of one place, one after another"),
        (STACK, {"0008|103e": "AP_Scout"}, "a localizer (scout)"),
        (STACK, {"0008|0008": "ORIGINAL\\PRIMARY\\LOCALIZER"}, "a localizer (scout)"),
        (STACK, {"0020|0037": ["1\\0\\0\\0\\1\\0"] * 2 + [ACROSS] * 2}, "a localizer (scout)"),
        (STACK, {}, "DICOM images without a position"),
    ],
)
def test_what_is_no_volume_is_left_out_by_name(
    tmp_path: Path, sitk: Any, positions: Positions, more: dict[str, Any], reason: str
) -> None:
    dicom(sitk, tmp_path / "set/a", STACK)
    dicom(sitk, tmp_path / "set/b", positions, number="7", more=more)
    if "position" in reason:
        without("0020|0032", *(tmp_path / "set/b").iterdir())
    listing = find_volumes(tmp_path / "set")
    assert [entry.path.name for entry in listing.volumes] == ["a"]
    (item,) = listing.left_out
    assert reason in item.reason
    assert not item.asked
    assert item.part.startswith("series 7 ")
    assert item.path.is_relative_to(tmp_path / "set/b")
    with pytest.raises(UserError, match=r"no volumes found in it .*series 7"):
        find_volumes(tmp_path / "set/b")
    with pytest.raises(VolumeError, match=r"a folder without a DICOM series of slices; left out: .*series 7"):
        read_scan(tmp_path / "set/b")


def test_a_rounding_of_the_orientation_makes_no_localizer(tmp_path: Path, sitk: Any) -> None:
    axes = [f"0.992157\\{0.125 + rest}\\0\\-0.125\\0.992157\\0" for rest in (1e-5, -1e-5, 0, 1e-5)]
    dicom(sitk, tmp_path / "s", STACK, more={"0020|0037": axes})
    (entry,) = find_volumes(tmp_path / "s").volumes
    assert read_scan(entry.path, series=entry.series).voxels.shape == (6, 5, 4)


@pytest.mark.parametrize(
    ("name", "content", "torn"),
    [
        ("x.dcm", b"", True),
        ("x.dcm", b"<html>", True),
        ("IM0005", b"", True),
        ("IM0005", bytes(300), True),
        ("1.2.3.5", bytes(60), True),
        ("IM0005", b"notes", False),
        ("VERSION", b"", False),
        ("notes.txt", b"", False),
    ],
)
def test_a_slice_that_is_not_even_dicom_any_more_is_named(
    tmp_path: Path, sitk: Any, name: str, content: bytes, torn: bool
) -> None:
    dicom(sitk, tmp_path / "set/s", STACK)
    (tmp_path / "set/s" / name).write_bytes(content)
    (tmp_path / "list.json").write_text(json.dumps({"training": ["set/s"]}))
    for path in (tmp_path / "set", tmp_path / "list.json"):
        listing = find_volumes(path)
        assert len(listing.volumes) == 1
        assert [(item.path.name, item.asked) for item in listing.left_out] == [(name, True)] * torn
        assert all("is the file whole?" in item.reason for item in listing.left_out)


def test_one_file_of_a_series_is_no_input(tmp_path: Path, sitk: Any) -> None:
    dicom(sitk, tmp_path / "s", STACK)
    with pytest.raises(UserError, match=r"1\.2\.3\.4-1\.dcm: one DICOM file: name its folder"):
        find_volumes(tmp_path / "s" / "1.2.3.4-1.dcm")


def test_a_long_stack_named_after_a_scout_is_a_volume(tmp_path: Path, sitk: Any) -> None:
    dicom(sitk, tmp_path / "s", along_z(*range(17)), description="AAHead_Scout")
    assert len(find_volumes(tmp_path / "s").volumes) == 1


def test_pictures_within_a_series_are_left_out_of_it(tmp_path: Path, sitk: Any) -> None:
    dicom(sitk, tmp_path / "s", STACK)
    dicom(sitk, tmp_path / "s", along_z(9), first=8)
    without("0020|0032", tmp_path / "s" / "1.2.3.4-8.dcm")
    dicom(sitk, tmp_path / "s", along_z(20), first=9, more={"0008|0008": "ORIGINAL\\PRIMARY\\LOCALIZER"})
    colours = sitk.GetImageFromArray(np.zeros((1, 5, 6, 3), np.uint8), isVector=True)
    frames = sitk.GetImageFromArray(np.zeros((3, 5, 6), np.uint8))
    for name, image in (("colours", colours), ("frames", frames)):
        image.SetMetaData("0020|000e", "1.2.3.4")
        image.SetMetaData("0008|103e", "chest")
        writer = sitk.ImageFileWriter()
        writer.KeepOriginalImageUIDOn()
        writer.SetFileName(str(tmp_path / "s" / f"{name}.dcm"))
        writer.Execute(image)
    listing = find_volumes(tmp_path / "s")
    (entry,) = listing.volumes
    assert read_scan(entry.path, series=entry.series).voxels.shape == (6, 5, 4)
    assert {item.path.name: item.reason.split(",")[0][:26] for item in listing.left_out} == {
        "1.2.3.4-8.dcm": "DICOM images without a pos",
        "1.2.3.4-9.dcm": "a localizer (scout)",
        "colours.dcm": "DICOM images in colours",
        "frames.dcm": "several slices in one DICO",
    }


@pytest.mark.parametrize(
    ("kind", "damaged"),
    [
        (CT, True),
        ("1.2.840.10008.5.1.4.1.1.128", True),
        ("1.2.840.10008.5.1.4.1.1.88.22", False),  # a report
        ("1.2.840.10008.5.1.4.1.1.481.3", False),  # contours
        ("1.3.12.2.1107.5.9.1", False),  # a vendor's own
    ],
)
def test_a_damaged_slice_is_not_taken_for_a_report(
    tmp_path: Path, sitk: Any, kind: str, damaged: bool
) -> None:
    dicom(sitk, tmp_path / "s", along_z(*range(5)))
    path = tmp_path / "s" / "1.2.3.4-4.dcm"
    content = path.read_bytes()
    assert CT.encode() in content
    meta = b"\2\0\2\0UI" + len(kind).to_bytes(2, "little") + kind.encode()
    path.write_bytes(content[:132] + meta + content[200:-20])
    listing = find_volumes(tmp_path / "s")
    assert len(listing.volumes) == 1
    (item,) = listing.left_out
    assert (item.path, item.asked) == (path, damaged)
    assert ("is the file whole?" if damaged else "but no image (a report") in item.reason


def test_a_slice_that_went_bad_after_it_was_listed_is_refused(tmp_path: Path, sitk: Any) -> None:
    dicom(sitk, tmp_path / "s", STACK)
    (entry,) = find_volumes(tmp_path / "s").volumes
    path = tmp_path / "s" / "1.2.3.4-3.dcm"
    path.write_bytes(path.read_bytes()[:-10])
    for _ in range(2):
        with pytest.raises(VolumeError, match=r"1\.2\.3\.4-3\.dcm: a DICOM image that cannot be read"):
            read_scan(entry.path, series=entry.series)
        path.unlink(missing_ok=True)
    with pytest.raises(VolumeError, match="cannot be read: No such file"):
        content_key(entry, TransformConfig(), "t")


@pytest.mark.parametrize(
    ("modality", "rule"), [("CT", IntensityRule()), ("MR", MR), ("PT", MR), ("OT", None), ("", None)]
)
def test_the_modality_of_a_series_decides_where_none_is_stated(
    tmp_path: Path, sitk: Any, modality: str, rule: IntensityRule | None
) -> None:
    dicom(sitk, tmp_path / "s", STACK, more={"0008|0060": modality})
    stated = IntensityRule("ct_window", 0, 80)
    assert [entry.intensity for entry in find_volumes(tmp_path / "s").volumes] == [rule]
    assert [entry.intensity for entry in find_volumes(tmp_path / "s", intensity=stated).volumes] == [stated]


@pytest.mark.parametrize("slices", [1, 2, 4])
def test_a_series_in_several_folders_is_named_and_no_part_of_it_is_taken(
    tmp_path: Path, sitk: Any, slices: int
) -> None:
    heights = np.arange(8) * 1.5
    for number in range(8 // slices):
        part = along_z(*heights[number * slices : (number + 1) * slices])
        dicom(sitk, tmp_path / f"study/{number}", part, number="3", first=number * slices)
    dicom(sitk, tmp_path / "study" / "whole", STACK, series="1.2.7")
    listing = find_volumes(tmp_path / "study")
    assert [entry.path.name for entry in listing.volumes] == ["whole"]
    assert listing.left_out == [
        LeftOut(tmp_path / "study", SPREAD, True, f"series 3 chest, 8 images in {8 // slices} folders")
    ]
    shutil.copytree(tmp_path / "study" / "whole", tmp_path / "study" / "copy")  # which prepare names
    assert [entry.path.name for entry in find_volumes(tmp_path / "study").volumes] == ["copy", "whole"]


def test_an_old_simple_itk_which_does_not_miss_what_is_cut_off_is_refused(
    tmp_path: Path, sitk: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    dicom(sitk, tmp_path / "s", STACK)
    monkeypatch.setattr(sitk.Version, "VersionString", lambda: "2.5.3")
    with pytest.raises(VolumeError, match=r"needs SimpleITK 2\.5\.4 or later, found 2\.5\.3"):
        read_scan(tmp_path / "s")


def test_a_folder_without_slices_is_no_series(tmp_path: Path) -> None:
    pytest.importorskip("SimpleITK")
    with pytest.raises(VolumeError, match="a folder without a DICOM series"):
        read_scan(tmp_path)
    with pytest.raises(VolumeError, match="cannot be read: No such file"):
        find_series(tmp_path / "absent")
    assert Series("1", "a", ()) == Series("1", "a", ())
