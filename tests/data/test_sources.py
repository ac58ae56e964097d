"""Every form of input is found, named and given its rule; a wrong one is refused by file and key."""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import pytest

from meduet_fast.data import sources
from meduet_fast.data.dicom import Series
from meduet_fast.data.folders import LeftOut, format_left_out
from meduet_fast.data.intensity import CT, MR, IntensityRule
from meduet_fast.data.sources import Listing, VolumeEntry, find_volumes
from meduet_fast.data.transforms import TransformConfig, content_key
from meduet_fast.errors import UserError, VolumeError

Touch = Callable[..., None]


@pytest.fixture
def touch(tmp_path: Path) -> Touch:
    """Make empty files below ``tmp_path``: finding volumes opens none of them."""

    def make(*names: str) -> None:
        for name in names:
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).touch()

    return make


def names(entries: list[VolumeEntry]) -> list[str]:
    return [entry.name for entry in entries]


def write_json(path: Path, content: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


# --- a folder of NIfTI files -----------------------------------------------------------------------


def test_a_folder_is_searched_at_every_depth_and_hidden_files_are_left_out(
    tmp_path: Path, touch: Touch
) -> None:
    touch("set/b.nii", "set/a.nii.gz", "set/deep/er/c.nii.gz")
    touch("set/._a.nii.gz", "set/.hidden/d.nii.gz", "set/notes.txt", "set/e.nii.gz.part")
    found = find_volumes(tmp_path / "set").volumes
    assert names(found) == ["set-a", "set-b", "set-deep-er-c"]
    assert [entry.path for entry in found][2] == tmp_path / "set/deep/er/c.nii.gz"
    assert {(entry.domain, entry.body_part, entry.intensity) for entry in found} == {("set", "unknown", None)}


def test_domain_body_part_and_rule_can_be_given(tmp_path: Path, touch: Touch) -> None:
    touch("set/a.nii")
    (entry,) = find_volumes(tmp_path / "set", "siemens", MR, "brain").volumes
    assert (entry.domain, entry.body_part, entry.intensity) == ("siemens", "brain", MR)
    assert entry.name == "siemens-a"


def test_the_current_folder_has_a_name(tmp_path: Path, touch: Touch, monkeypatch: pytest.MonkeyPatch) -> None:
    touch("set/a.nii")
    monkeypatch.chdir(tmp_path / "set")
    assert find_volumes(Path()).volumes[0].domain == "set"


def test_one_file_is_an_input_too(tmp_path: Path, touch: Touch) -> None:
    touch("set/a.nii.gz")
    (entry,) = find_volumes(tmp_path / "set/a.nii.gz").volumes
    assert (entry.name, entry.domain) == ("a", "a")


def test_links_to_folders_are_followed_and_circles_end(tmp_path: Path, touch: Touch) -> None:
    touch("elsewhere/a.nii", "set/b.nii")
    (tmp_path / "set/link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "set/circle").symlink_to(tmp_path / "set")
    assert names(find_volumes(tmp_path / "set").volumes) == ["set-b", "set-link-a"]


def test_names_are_unique_and_can_name_files(tmp_path: Path, touch: Touch) -> None:
    touch("set/scan.nii", "set/scan.nii.gz", "set/SCAN.nii", "set/x/y.nii", "set/x-y.nii")
    touch("set/頭 1.nii", "set/胸 1.nii", "set/" + "long" * 60 + "1.nii", "set/" + "long" * 60 + "2.nii")
    found = names(find_volumes(tmp_path / "set").volumes)
    assert len({name.casefold() for name in found}) == 8  # scan.nii is the scan of scan.nii.gz
    for name in found:
        assert 0 < len(name) <= 128
        assert not name.startswith(".")
        assert all(letter.isascii() and (letter.isalnum() or letter in "._-") for letter in name)
    assert found == names(find_volumes(tmp_path / "set").volumes)


def test_an_empty_folder_and_an_absent_path_are_refused(tmp_path: Path, touch: Touch) -> None:
    touch("set/notes.txt")
    with pytest.raises(UserError, match=r"set: no volumes found in it .*\.nii"):
        find_volumes(tmp_path / "set")
    with pytest.raises(UserError, match="absent: no such file or folder"):
        find_volumes(tmp_path / "absent")
    with pytest.raises(UserError, match=r"notes\.txt: expected a folder, a volume"):
        find_volumes(tmp_path / "set/notes.txt")


def test_a_folder_that_cannot_be_listed_is_refused(
    tmp_path: Path, touch: Touch, monkeypatch: pytest.MonkeyPatch, as_nobody: AbstractContextManager[None]
) -> None:
    touch("set/a.nii", "set/closed/b.nii")
    (tmp_path / "set/closed").chmod(0)
    monkeypatch.chdir(tmp_path / "set")
    with as_nobody, pytest.raises(UserError, match="closed: cannot read: Permission denied"):
        find_volumes(Path())


# --- Decathlon / MONAI lists -----------------------------------------------------------------------


def test_a_decathlon_list_gives_its_images_and_never_its_labels(tmp_path: Path) -> None:
    path = write_json(
        tmp_path / "Task09/dataset.json",
        {
            "name": "Spleen",
            "modality": {"0": "CT"},
            "training": [{"image": "./imagesTr/a.nii.gz", "label": "./labelsTr/a.nii.gz"}],
            "validation": [{"image": ["imagesVal/b_t1.nii.gz", "imagesVal/b_t2.nii.gz"]}],
            "test": ["./imagesTs/c.nii.gz"],
        },
    )
    found = find_volumes(path).volumes
    assert names(found) == [
        "Spleen-imagesTr-a",
        "Spleen-imagesTs-c",
        "Spleen-imagesVal-b_t1",
        "Spleen-imagesVal-b_t2",
    ]
    assert found[0].path == tmp_path / "Task09/imagesTr/a.nii.gz"
    assert {(entry.domain, entry.intensity) for entry in found} == {("Spleen", CT)}
    assert find_volumes(path.parent).volumes == found


def test_the_modality_of_a_decathlon_list_decides_the_rule_unless_one_is_given(tmp_path: Path) -> None:
    path = write_json(
        tmp_path / "Prostate/list.json", {"modality": {"0": "T2", "1": "ADC"}, "training": ["a.nii"]}
    )
    t2, adc = find_volumes(path).volumes
    assert (t2.domain, t2.intensity, t2.path) == ("Prostate", MR, adc.path)
    assert (t2.name, t2.channel, adc.name, adc.channel) == ("Prostate-a_0000", 0, "Prostate-a_0001", 1)
    rule = IntensityRule("mr_percentile", 1, 99)
    assert find_volumes(path, intensity=rule).volumes[0].intensity == rule


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("{", r"dataset\.json: not valid JSON"),
        ("[1]", r"dataset\.json: found a list, expected an object"),
        ('{"images": []}', r"found the keys \['images'\], expected 'training' .* or 'channel_names'"),
        ('{"training": {"a": 1}}', "'training': found a dict, expected a list"),
        ('{"training": [{"label": "a.nii"}]}', r"'training\[0\]': found {'label': 'a.nii'}, expected a path"),
        ('{"training": [3]}', r"'training\[0\]': found 3, expected a path"),
        ('{"training": [{"image": []}]}', r"'training\[0\]': found {'image': \[\]}, expected a path"),
        ('{"training": []}', "no volumes found in it"),
    ],
)
def test_a_wrong_list_is_refused_by_file_and_key(tmp_path: Path, content: str, reason: str) -> None:
    path = tmp_path / "dataset.json"
    path.write_text(content)
    with pytest.raises(UserError, match=reason) as caught:
        find_volumes(path)
    assert str(path) in str(caught.value)


# --- nnU-Net folders -------------------------------------------------------------------------------


def nnunet(tmp_path: Path, touch: Touch, **changes: Any) -> Path:
    touch("Dataset001/imagesTr/p1_0000.nii.gz", "Dataset001/imagesTr/p1_0001.nii.gz")
    touch("Dataset001/imagesTs/p2_0000.nii.gz", "Dataset001/labelsTr/p1.nii.gz")
    content = {"channel_names": {"0": "CT", "1": "T1"}, "labels": {"background": 0}, "file_ending": ".nii.gz"}
    write_json(tmp_path / "Dataset001/dataset.json", content | changes)
    return tmp_path / "Dataset001"


def test_every_channel_of_an_nnunet_folder_is_a_volume_with_its_own_rule(
    tmp_path: Path, touch: Touch
) -> None:
    found = find_volumes(nnunet(tmp_path, touch)).volumes
    assert [(entry.name, entry.intensity) for entry in found] == [
        ("Dataset001-imagesTr-p1_0000", CT),
        ("Dataset001-imagesTr-p1_0001", MR),
        ("Dataset001-imagesTs-p2_0000", CT),
    ]
    assert {entry.domain for entry in found} == {"Dataset001"}
    assert find_volumes(tmp_path / "Dataset001/dataset.json").volumes == found


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"channel_names": ["CT"]}, r"dataset\.json: 'channel_names': found \['CT'\], expected an object"),
        (
            {"file_ending": ".png"},
            r"dataset\.json: 'file_ending': found '.png', expected one of .nii.gz, .nii",
        ),
        ({"channel_names": {"3": "CT"}}, r"p1_0001\.nii\.gz: the name states no channel of .*dataset\.json"),
        ({"file_ending": ".nii"}, "no volumes found in it"),
    ],
)
def test_a_wrong_nnunet_folder_is_refused_by_file_and_key(
    tmp_path: Path, touch: Touch, changes: dict[str, Any], reason: str
) -> None:
    with pytest.raises(UserError, match=reason):
        find_volumes(nnunet(tmp_path, touch, **changes))


def test_an_nnunet_image_of_no_channel_is_named(tmp_path: Path, touch: Touch) -> None:
    touch("Dataset001/imagesTr/p3.nii.gz", "Dataset001/imagesTr/p1_0002.nii.gz")
    listing = find_volumes(nnunet(tmp_path, touch))
    assert len(listing.volumes) == 3
    reason = "the name states no channel of dataset.json (expected case_0000, _0001.nii.gz)"
    assert [(item.path.name, item.reason) for item in listing.left_out if not item.asked] == [
        ("p1_0002.nii.gz", reason), ("p3.nii.gz", reason),
    ]  # fmt: skip


# --- manifests -------------------------------------------------------------------------------------

MANIFEST = """
datasets:
- name: liver
  path: liver
  body_part: abdomen
  intensity: {ct_window: [-100, 240.5]}
- {name: brain, path: brain/t1.nii.gz, intensity: {mr_percentile: [1, 99]}}
- {name: spleen, path: Task09/dataset.json}
- {name: organs, path: Dataset001, body_part: trunk}
"""


def write_manifest(tmp_path: Path, touch: Touch, text: str = MANIFEST) -> Path:
    touch("liver/1/img.nii.gz", "liver/2/img.nii.gz", "brain/t1.nii.gz")
    nnunet(tmp_path, touch)
    write_json(tmp_path / "Task09/dataset.json", {"name": "Spleen", "training": ["a.nii.gz"]})
    (tmp_path / "manifest.yaml").write_text(text)
    return tmp_path / "manifest.yaml"


def test_a_manifest_lists_every_other_form_each_a_domain(tmp_path: Path, touch: Touch) -> None:
    found = find_volumes(write_manifest(tmp_path, touch), body_part="whole").volumes
    window, percentiles = IntensityRule("ct_window", -100, 240.5), IntensityRule("mr_percentile", 1, 99)
    assert [(entry.name, entry.domain, entry.body_part, entry.intensity) for entry in found] == [
        ("brain-t1", "brain", "whole", percentiles),
        ("liver-1-img", "liver", "abdomen", window),
        ("liver-2-img", "liver", "abdomen", window),
        ("organs-imagesTr-p1_0000", "organs", "trunk", CT),
        ("organs-imagesTr-p1_0001", "organs", "trunk", MR),
        ("organs-imagesTs-p2_0000", "organs", "trunk", CT),
        ("spleen-a", "spleen", "whole", None),
    ]
    assert found[1].path == tmp_path / "liver/1/img.nii.gz"


@pytest.mark.parametrize("name", ["manifest.yaml", "manifest.yml"])
def test_a_folder_with_a_manifest_is_read_by_it(tmp_path: Path, touch: Touch, name: str) -> None:
    path = write_manifest(tmp_path, touch).rename(tmp_path / name)
    touch("labels/organs.nii.gz")
    assert find_volumes(path.parent) == find_volumes(path)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("datasets: [", "not valid YAML"),
        ("datasets: [{name: 2023-02-30, path: liver}]", "not valid YAML: day is out of range"),
        ("datasets: [{name: !!float x, path: liver}]", "not valid YAML"),
        ("datasets: [{name: !!int '', path: liver}]", "not valid YAML"),
        ("", "expected one key 'datasets' with a list"),
        ("datasets: []", "expected one key 'datasets' with a list"),
        ("datasets: [{name: a, path: liver}]\nversion: 1", "expected one key 'datasets' with a list"),
        ("datasets: [liver]", r"'datasets\[0\]': found 'liver'"),
        ("datasets: [{name: a, path: liver, bodypart: x}]", r"'datasets\[0\]\.bodypart': unknown key"),
        ("datasets: [{path: liver}]", r"'datasets\[0\]\.name': found None, expected a text"),
        ("datasets: [{name: 3, path: liver}]", r"'datasets\[0\]\.name': found 3, expected a text"),
        ("datasets: [{name: a}]", r"'datasets\[0\]\.path': found None, expected a text"),
        ("datasets: [{name: a, path: liver, body_part: }]", r"'datasets\[0\]\.body_part': found None"),
        ("datasets: [{name: a, path: livers}]", r"'datasets\[0\]\.path': no such file or folder: .*livers"),
        ("datasets: [{name: a, path: manifest.yaml}]", "a manifest cannot list another"),
        (
            "datasets: [{name: a, path: liver}, {name: a, path: brain}]",
            r"'datasets\[1\]\.name': 'a' is used twice",
        ),
        ("datasets: [{name: a, path: liver, intensity: ct}]", r"'datasets\[0\]\.intensity': found 'ct'"),
        ("datasets: [{name: a, path: liver, intensity: }]", r"'datasets\[0\]\.intensity': found None"),
        (
            "datasets: [{name: a, path: liver, intensity: {window: [0, 1]}}]",
            r"intensity': found {'window': \[0, 1\]}, expected {ct_window: \[low, high\]} in HU",
        ),
        ("datasets: [{name: a, path: liver, intensity: {ct_window: [0]}}]", r"found {'ct_window': \[0\]}"),
        (
            "datasets: [{name: a, path: liver, intensity: {ct_window: [0, x]}}]",
            r"found {'ct_window': \[0, 'x'\]}",
        ),
        (
            "datasets: [{name: a, path: liver, intensity: {ct_window: [1, 0]}}]",
            "expected finite .*low < high",
        ),
        ("datasets: [{name: a, path: liver, intensity: {ct_window: [0, .inf]}}]", "expected finite"),
        (
            "datasets: [{name: a, path: liver, intensity: {mr_percentile: [0, 101]}}]",
            "percentiles from 0 to 100",
        ),
    ],
)
def test_a_wrong_manifest_is_refused_by_file_and_key(
    tmp_path: Path, touch: Touch, text: str, reason: str
) -> None:
    path = write_manifest(tmp_path, touch, text)
    with pytest.raises(UserError, match=reason) as caught:
        find_volumes(path)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


def test_a_manifest_takes_no_domain_or_rule_from_outside(tmp_path: Path, touch: Touch) -> None:
    path = write_manifest(tmp_path, touch)
    for given in ({"domain": "x"}, {"intensity": CT}):
        with pytest.raises(UserError, match=r"manifest\.yaml: a manifest states domains and intensity rules"):
            find_volumes(path, **given)  # type: ignore[arg-type]


# --- what is left out, and named -------------------------------------------------------------------


def left_out(listing: Listing) -> dict[str, str]:
    return {item.path.name: item.reason for item in listing.left_out}


@pytest.mark.parametrize("name", ["B.NII.GZ", "b.Nii", "b.nii.Gz", "PAIR.HDR", "b.hdr.gz"])
def test_endings_in_capitals_and_pairs_are_read(tmp_path: Path, touch: Touch, name: str) -> None:
    touch(f"set/{name}", "set/pair.img", "set/PAIR.IMG", "set/b.img.gz", "set/a.nii.gz")
    listing = find_volumes(tmp_path / "set")
    assert name in [entry.path.name for entry in listing.volumes]
    assert len(listing.volumes) == 2


@pytest.mark.parametrize(
    "name",
    [
        "b.mgz",
        "b.npy",
        "b.npz",
        "b.mnc",
        "B.MINC",
        "b.nii.bz2",
        "b.nii.gz.part",
        "b.nii~",
        "b.dcm",
        "b.nhdr",
        "b.img",
        "b.h5",
        "b.tar.gz",
        "b.tar.xz",
        "b.mif",
        "b.mif.gz",
        "b.mgh.gz",
        "b.dcm.gz",
        "b.niigz",
        "b.nia",
        "b.mhd.gz",
        "b.raw.gz",
        "b.npy.gz",
        "b.vol",
        "b.gz",
        "b.BZ2",
        "b.czi",
        "b.svs",
        "b.jp2",
        "b.isq",
        "b.mat",
        "b.zarr",
        "b.hdr",
        "._b.nii.gz",
        ".b.nii",
        ".hidden/b.nii",
    ],
)
def test_what_looks_like_a_volume_and_is_not_read_is_named(tmp_path: Path, touch: Touch, name: str) -> None:
    touch("set/a.nii.gz", f"set/{name}", "set/notes.txt", "set/b.nii.gz.md5", "set/a.json", "set/README")
    touch("set/physio.tsv.gz", "set/a.bval")
    listing = find_volumes(tmp_path / "set")
    assert names(listing.volumes) == ["set-a"]
    assert [item.path for item in listing.left_out] == [tmp_path / "set" / name]
    assert not listing.left_out[0].asked


@pytest.mark.parametrize(
    "name",
    [
        "segmentations/liver.nii.gz",
        "labelsTr/a.nii.gz",
        "labels/a.nii",
        "masks/1.nii",
        "gtFine/1.nii",
        "Organ_Masks/a.nii",
        "x_seg.nii.gz",
        "x-label.nii",
        "x_labels.NII.GZ",
        "brainMask.nii.gz",
        "liver_mask.nii",
        "segmentation-0.nii",
        "label0001.nii.gz",
        "sub-1_dseg.nii",
        "x_gt.nii.gz",
    ],
)
def test_masks_and_label_maps_are_left_out_by_name_unless_they_are_asked_for(
    tmp_path: Path, touch: Touch, name: str
) -> None:
    touch("set/ct.nii.gz", f"set/{name}")
    listing = find_volumes(tmp_path / "set")
    assert names(listing.volumes) == ["set-ct"]
    assert "by its name a mask or label map" in left_out(listing)[Path(name).name]
    assert len(find_volumes(tmp_path / "set" / name).volumes) == 1
    path = write_json(tmp_path / "list.json", {"training": ["set/ct.nii.gz", f"set/{name}"]})
    assert len(find_volumes(path).volumes) == 2


@pytest.mark.parametrize(
    "name",
    [
        "segmented_case/ct.nii",
        "masked_t1.nii.gz",
        "ct/label_free/1.nii",
        "regimen.nii",
        "MSD_Segmentation/a.nii",
    ],
)
def test_scans_with_names_like_those_of_labels_are_kept(tmp_path: Path, touch: Touch, name: str) -> None:
    touch(f"set/{name}")
    assert len(find_volumes(tmp_path / "set").volumes) == 1


def test_one_scan_in_two_forms_is_one_volume(tmp_path: Path, touch: Touch) -> None:
    touch("set/a.nii", "set/a.nii.gz", "set/a.hdr", "set/a.img", "set/b.nii", "set/B.nii.gz")
    listing = find_volumes(tmp_path / "set")
    assert [entry.path.name for entry in listing.volumes] == ["B.nii.gz", "a.nii.gz", "b.nii"]
    reason = "the file of the same name beside it is taken"
    assert left_out(listing) == {"a.nii": reason, "a.hdr": reason}


@pytest.mark.parametrize("there", [True, False])
def test_itk_formats_and_dicom_folders_need_itk(
    tmp_path: Path, touch: Touch, there: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    touch("set/a.mha", "set/b.mhd", "set/b.raw", "set/C.NRRD", "set/d.nii", "set/dicom/DICOMDIR")
    for number in range(3):
        (tmp_path / f"set/dicom/1.2.840.{number}").write_bytes(bytes(128) + b"DICM")
    found = ModuleSpec("SimpleITK", None) if there else None
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: found)
    monkeypatch.setattr(sources, "find_series", lambda folder: ([Series("1.2", "1", ())], []))
    listing = find_volumes(tmp_path / "set")
    files = {entry.path.name for entry in listing.volumes}
    if there:
        assert files == {"a.mha", "b.mhd", "C.NRRD", "d.nii", "dicom"}
        assert not listing.left_out
        assert names(find_volumes(tmp_path / "set/dicom").volumes) == ["dicom"]
    else:
        assert files == {"d.nii"}
        assert set(left_out(listing)) == {"a.mha", "b.mhd", "C.NRRD", "dicom"}
        assert all("pip install '.[itk]' in a clone" in item.reason for item in listing.left_out)
        path = write_json(tmp_path / "set/list.json", {"training": ["a.mha", "d.nii"]})
        assert [item.asked for item in find_volumes(path).left_out] == [True]


@pytest.mark.parametrize(
    ("begin", "named"),
    [
        (b"\x08\0\x05\0CS\x0a\0ISO_IR 100", True),
        (b"\x08\0\0\0\x04\0\0\0", True),
        (b"\x02\0\0\0UL\x04\0", True),
        (b"\x08 text", False),
        (b"", False),
    ],
)
@pytest.mark.parametrize("name", ["IM0001", "CT.1.2.3"])
def test_dicom_without_its_preamble_is_named(
    tmp_path: Path, touch: Touch, begin: bytes, named: bool, name: str
) -> None:
    touch("set/a.nii", f"set/{name}")
    (tmp_path / "set" / name).write_bytes(begin)
    assert list(left_out(find_volumes(tmp_path / "set"))) == [name] * named


def test_a_named_pipe_does_not_hang(tmp_path: Path, touch: Touch) -> None:
    touch("set/a.nii")
    os.mkfifo(tmp_path / "set/b.nii")
    os.mkfifo(tmp_path / "set/README")
    assert left_out(find_volumes(tmp_path / "set")) == {"b.nii": "not a regular file"}


def test_only_the_first_of_a_kind_are_shown() -> None:
    items = [LeftOut(Path(f"{number}\n.nii"), "hidden") for number in range(9)]
    lines = format_left_out(items)
    assert len(lines) == 6
    assert lines[0] == "left out: 0\\n.nii: hidden"
    assert lines[-1] == "left out: and 4 more: hidden"


# --- lists of all kinds ----------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_every_list_of_a_file_is_read_or_named(tmp_path: Path, touch: Touch, encoding: str) -> None:
    touch("a.nii", "b.nii", "c.nii", "d.nii", "sub/e.nii")
    content = {
        "train": [{"image": "a.nii", "fold": 0}],
        "val": ["./b.nii", str(tmp_path / "a.nii")],
        "testing": [{"image": "sub\\e.nii"}],
        "folds": {"0": [{"image": "c.nii"}]},
        "other": [{"img": "d.nii"}, "x.npy"],
        "training_labels": ["l.nii"],
        "labels": {"0": "background"},
        "authors": ["A", "B"],
    }
    path = tmp_path / "list.json"
    path.write_text(json.dumps(content), encoding=encoding)
    listing = find_volumes(path, domain="x")
    assert names(listing.volumes) == ["x-a", "x-b", "x-c", "x-sub-e"]
    assert [(item.path.name, item.asked) for item in listing.left_out] == [
        ("list.json", True), ("list.json", False), ("x.npy", True),
    ]  # fmt: skip
    assert "'other[0]': found {'img': 'd.nii'}" in listing.left_out[0].reason
    assert "'training_labels' is a list of labels" in listing.left_out[1].reason


@pytest.mark.parametrize(
    ("key", "taken"),
    [
        *((key, True) for key in ("unlabeled", "unlabelled_images", "pseudolabelled", "masked", "labeled")),
        *((key, False) for key in ("labels_tr", "test_masks", "segmentations", "ground_truth")),
    ],
)
def test_a_list_is_one_of_labels_if_its_name_says_so(
    tmp_path: Path, touch: Touch, key: str, taken: bool
) -> None:
    touch("x.nii.gz", "y.nii.gz")
    path = write_json(tmp_path / "list.json", {"training": ["x.nii.gz"], key: ["y.nii.gz"]})
    listing = find_volumes(path)
    assert [entry.path.name for entry in listing.volumes] == ["x.nii.gz", "y.nii.gz"][: 1 + taken]
    assert len(listing.left_out) == (not taken)
    path = write_json(tmp_path / "list.json", {"training": ["x.nii.gz"], key: [{"image": "y.nii.gz"}]})
    assert len(find_volumes(path).volumes) == 2


@pytest.mark.parametrize(
    ("item", "reason"),
    [
        ("a\0.nii", "embedded null byte"),
        ("\ud800.nii", "surrogates not allowed"),
        ("a" * 300 + ".nii", "File name too long"),
        ("/", "no file name"),
        ({"image": "x.nii", "image2": "y.nii"}, "only 'image' is read"),
        ({"image": "x.nii", "images": ["y.nii"]}, "only 'image' is read"),
    ],
)
@pytest.mark.parametrize("key", ["training", "dataset"])
def test_one_odd_item_is_left_out_and_the_rest_is_taken(
    tmp_path: Path, touch: Touch, item: Any, reason: str, key: str
) -> None:
    touch("x.nii", "y.nii")
    content: dict[str, Any] = {"training": ["x.nii", item]}
    if key == "dataset" and isinstance(item, str):
        cases = {"a": {"images": ["x.nii"]}, "b": {"images": [item]}}
        content = {"channel_names": {"0": "CT"}, "dataset": cases}
    listing = find_volumes(write_json(tmp_path / "list.json", content))
    assert [entry.path.name for entry in listing.volumes] == ["x.nii"]
    assert [item.asked for item in listing.left_out] == [True]
    assert reason in listing.left_out[0].reason
    assert "".join(format_left_out(listing.left_out)).isprintable()


@pytest.mark.parametrize("key", ["training", "version 1", "dataset"])
@pytest.mark.parametrize("length", [244, 248, 251, 255, 256, 300])
@pytest.mark.parametrize("ending", [".nii.gz", ".img", ".hdr", ".mhd", ".xyz"])
def test_a_long_name_that_is_not_there_fails_alone(
    tmp_path: Path, touch: Touch, key: str, length: int, ending: str
) -> None:
    touch("x.nii", "y_0000.nii.gz")
    long = "a" * (length - len(ending)) + ending
    content: dict[str, Any] = {"training": ["x.nii", long]}
    if key == "dataset":
        cases = {"a": {"images": ["x.nii"]}, "b": {"images": [long]}}
        content = {"channel_names": {"0": "CT"}, "dataset": cases}
    elif key == "version 1":
        content = {"modality": {"0": "CT"}, "training": ["x.nii", "y.nii.gz", long]}
    listing = find_volumes(write_json(tmp_path / "list.json", content))
    found = [entry.path for entry in listing.volumes if len(entry.path.name) < 20]
    assert len(found) == 1 + (key == "version 1")
    for entry in listing.volumes:
        if entry.path not in found:
            with pytest.raises(VolumeError, match=r"No such file|other half of the pair"):
                content_key(entry, TransformConfig(), "t")
    assert len(listing.volumes) - len(found) + sum(item.asked for item in listing.left_out) == 1


def test_a_long_name_that_is_there_is_found(tmp_path: Path, touch: Touch) -> None:
    header, raw = "h" * 251 + ".hdr", "r" * 251 + ".raw"
    touch(f"set/{header}", f"set/{raw}", "set/a.nii")
    listing = find_volumes(tmp_path / "set")
    assert names(listing.volumes) == ["set-a"]
    assert set(left_out(listing)) == {header, raw}


def test_a_listed_file_in_a_closed_folder_fails_alone(
    tmp_path: Path, touch: Touch, monkeypatch: pytest.MonkeyPatch, as_nobody: AbstractContextManager[None]
) -> None:
    touch("set/x.nii", "set/closed/y.nii", "set/closed/z_0000.nii.gz")
    write_json(tmp_path / "set/l.json", {"training": ["x.nii", "closed/y.nii", "closed\\z.nii.gz"]})
    (tmp_path / "set/closed").chmod(0)
    monkeypatch.chdir(tmp_path / "set")
    with as_nobody:
        listing = find_volumes(Path("l.json"))
    assert [entry.path.name for entry in listing.volumes] == ["x.nii"]
    assert [item.asked for item in listing.left_out] == [True, True]
    assert all("Permission denied" in item.reason for item in listing.left_out)


@pytest.mark.parametrize(
    ("labels", "asked"),
    [
        (["l1.nii", "l2.nii"], False),  # one for each image of a list
        (["l1.nii", "l2.nii", "l3.nii"], False),  # of all
        (["labelsTr/1.nii"], False),
        (["a_seg.nii", "b_mask.nii", "/data/gt/c.nii"], False),
        (["p1.nii", "p2.nii", "p3.nii", "p4.nii"], True),
        (["p1_ct.nii", "a_seg.nii", "x.nii", "y.nii"], True),
        ([{"file": "p1_ct.nii"}] * 4, True),
    ],
)
@pytest.mark.parametrize("key", ["segmentations", "training_labels", "Labels"])
def test_a_list_of_labels_by_its_name_that_may_be_one_of_scans_is_asked_for(
    tmp_path: Path, touch: Touch, labels: list[Any], asked: bool, key: str
) -> None:
    touch("a.nii", "b.nii")
    (item,) = find_volumes(
        write_json(tmp_path / "list.json", {"training": ["a.nii", "b.nii"], "test": ["c.nii"], key: labels})
    ).left_out
    assert item.reason.startswith(f"'{key}' is a list of labels by its name")
    assert item.asked == asked
    assert item.reason.endswith("if it is one of scans, give it another name") == asked


def test_an_image_of_an_nnunet_folder_with_a_name_like_a_label_is_taken(tmp_path: Path, touch: Touch) -> None:
    touch("Dataset001/imagesTs/mask_7_0000.nii.gz", "Dataset001/imagesTs/mask_7_0001.nii.gz")
    touch("Dataset001/imagesTs/p2_0001.nii.gz", "Dataset001/imagesTs/p2_seg.nii.gz")
    listing = find_volumes(nnunet(tmp_path, touch))
    assert [entry.path.name for entry in listing.volumes if "mask" in entry.path.name] == [
        "mask_7_0000.nii.gz", "mask_7_0001.nii.gz",
    ]  # fmt: skip
    assert set(left_out(listing)) == {"p2_seg.nii.gz"}


def test_labels_beside_an_image_are_not_named(tmp_path: Path, touch: Touch) -> None:
    touch("x.nii")
    item = {"image": "x.nii", "label": "l.nii", "seg": "s.nii", "brain_mask": "m.nii", "age": 3}
    assert not find_volumes(write_json(tmp_path / "list.json", {"training": [item]})).left_out


def test_cases_that_are_missing_from_a_list_are_counted(tmp_path: Path, touch: Touch) -> None:
    touch("x.nii")
    (item,) = find_volumes(
        write_json(tmp_path / "list.json", {"numTraining": 3, "training": ["x.nii"]})
    ).left_out
    assert (item.reason, item.asked) == ("'numTraining' states 3 cases, found 1", True)


def version_1(tmp_path: Path, modality: Any) -> Path:
    items = [{"image": f"./imagesTr/{case}.nii.gz"} for case in ("p1", "p2", "p3")]
    content = {"name": "X", "modality": modality, "training": items, "test": []}
    return write_json(tmp_path / "Task501/dataset.json", content).parent


def test_an_nnunet_version_1_folder_is_read_channel_by_channel(tmp_path: Path, touch: Touch) -> None:
    touch("Task501/imagesTr/p1_0000.nii.gz", "Task501/imagesTr/p1_0001.nii.gz")
    touch("Task501/imagesTr/p2_0000.nii.gz", "Task501/imagesTr/p9_0000.nii.gz", "Task501/labelsTr/p1.nii.gz")
    listing = find_volumes(version_1(tmp_path, {"0": "Computed Tomography", "1": "PET"}))
    # p2_0001 and p3 are not there: reading will say so.
    assert [(entry.name.removeprefix("X-imagesTr-"), entry.intensity) for entry in listing.volumes] == [
        ("p1_0000", CT), ("p1_0001", MR), ("p2_0000", CT), ("p2_0001", MR), ("p3_0000", CT), ("p3_0001", MR),
    ]  # fmt: skip
    assert left_out(listing) == {"p9_0000.nii.gz": "in none of the lists"}


@pytest.mark.parametrize(
    ("modality", "rule"),
    [
        *((text, CT) for text in ({"0": "ct "}, "CTA", ["CT"])),
        ({0: "MRI"}, MR),
        *((text, None) for text in ({"0": "noNorm"}, None, "CT/PET", 3)),
    ],
)
def test_modalities_in_all_their_forms(
    tmp_path: Path, touch: Touch, modality: Any, rule: IntensityRule | None
) -> None:
    touch("Task501/imagesTr/p1_0000.nii.gz")
    assert find_volumes(version_1(tmp_path, modality)).volumes[0].intensity == rule


def test_a_channel_of_a_4d_file_is_a_volume(tmp_path: Path, touch: Touch) -> None:
    touch("b.nii.gz")
    path = write_json(
        tmp_path / "l.json", {"name": "B", "modality": {"0": "CT", "1": "T1w"}, "training": ["b.nii.gz"]}
    )
    assert [(entry.name, entry.channel, entry.intensity) for entry in find_volumes(path).volumes] == [
        ("B-b_0000", 0, CT), ("B-b_0001", 1, MR),
    ]  # fmt: skip


def test_the_key_dataset_of_an_nnunet_folder_is_followed(tmp_path: Path, touch: Touch) -> None:
    touch("elsewhere/x.nii.gz", "elsewhere/y.nii.gz")
    absolute, relative = str(tmp_path / "elsewhere/x.nii.gz"), "../elsewhere/y.nii.gz"
    cases = {"c": {"images": [absolute, relative], "label": "l.nii.gz"}, "d": {"label": "l.nii.gz"}}
    listing = find_volumes(nnunet(tmp_path, touch, dataset=cases))
    assert [(entry.path.name, entry.intensity) for entry in listing.volumes] == [
        ("x.nii.gz", CT), ("y.nii.gz", MR), ("p2_0000.nii.gz", CT),
    ]  # fmt: skip
    assert {item.path.name for item in listing.left_out if item.asked} == {"dataset.json", "p2_0001.nii.gz"}
    assert {item.path.name for item in listing.left_out if not item.asked} == {
        "p1_0000.nii.gz",
        "p1_0001.nii.gz",
    }


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (
            {"dataset": {"c": {"images": ["imagesTr/p1_0000.nii.gz"]}}},
            "'channel_names' has 2 channels, found 1",
        ),
        (
            {"training": [{"image": "./imagesTr/p9.nii.gz"}]},
            "'training' lists it, and it is none of the images",
        ),
    ],
)
def test_what_an_nnunet_description_lists_and_is_not_there_is_named(
    tmp_path: Path, touch: Touch, changes: dict[str, Any], reason: str
) -> None:
    touch("Dataset001/imagesTs/p2_0001.nii.gz")
    (item,) = [item for item in find_volumes(nnunet(tmp_path, touch, **changes)).left_out if item.asked]
    assert reason in item.reason


def test_the_lists_of_version_1_name_the_cases_of_an_nnunet_folder(tmp_path: Path, touch: Touch) -> None:
    touch("Dataset001/imagesTs/p2_0001.nii.gz")
    lists = {"training": [{"image": "./imagesTr/p1.nii.gz", "label": "l"}], "test": ["imagesTs/p2.nii.gz"]}
    assert not find_volumes(nnunet(tmp_path, touch, **lists)).left_out


def test_cases_that_are_missing_from_an_nnunet_folder_are_counted(tmp_path: Path, touch: Touch) -> None:
    missing = [item for item in find_volumes(nnunet(tmp_path, touch, numTraining=4)).left_out if item.asked]
    assert missing[-1].reason == "'numTraining' states 4 cases, found 1"


def test_the_images_folder_of_a_data_set_is_read_by_its_description(tmp_path: Path, touch: Touch) -> None:
    whole = find_volumes(nnunet(tmp_path, touch)).volumes
    part = find_volumes(tmp_path / "Dataset001/imagesTr").volumes
    assert part == [entry for entry in whole if entry.path.parent.name == "imagesTr"]


def test_the_images_folder_of_a_list_of_roundabout_paths_is_found(tmp_path: Path, touch: Touch) -> None:
    touch("dec/imagesTr/a.nii.gz")
    write_json(tmp_path / "dec/dataset.json", {"training": ["../dec/imagesTr/a.nii.gz"]})
    assert find_volumes(tmp_path / "dec/imagesTr") == find_volumes(tmp_path / "dec")


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_manifests_with_a_byte_order_mark_are_read(tmp_path: Path, touch: Touch, encoding: str) -> None:
    touch("liver/a.nii")
    path = tmp_path / "m.yaml"
    path.write_text("datasets: [{name: liver, path: liver}]", encoding=encoding)
    assert names(find_volumes(path).volumes) == ["liver-a"]


# --- names and paths -------------------------------------------------------------------------------


def test_names_that_are_no_utf8_or_hold_control_characters_are_printable(tmp_path: Path) -> None:
    folder = tmp_path / os.fsdecode(b"K\xf6ln")
    folder.mkdir()
    for name in (b"M\xfc.nii", b"M\xf6.nii", b"x\n\x1b[31m.nii", b"seg_\xe4.nii.bz2"):
        (folder / os.fsdecode(name)).touch()
    listing = find_volumes(folder)
    assert {entry.domain for entry in listing.volumes} == {r"K\xf6ln"}
    assert len(set(names(listing.volumes))) == 3
    text = "".join(names(listing.volumes) + format_left_out(listing.left_out))
    text += "".join(str(VolumeError(entry.path, "bad")) for entry in listing.volumes)
    assert text.isprintable()
    assert r"K\xf6ln/seg_\xe4.nii.bz2" in text


def test_names_do_not_depend_on_how_the_path_is_written(
    tmp_path: Path, touch: Touch, monkeypatch: pytest.MonkeyPatch
) -> None:
    touch("data/set/x/y.nii", "data/set/x-y.nii", "data/outside/z.nii", "data/set/z.nii")
    content = {"training": [str(tmp_path / "data/set/x/y.nii"), "x-y.nii", "../outside/z.nii"]}
    write_json(tmp_path / "data/set/list.json", content)
    (tmp_path / "link").symlink_to(tmp_path / "data/set")
    monkeypatch.chdir(tmp_path / "data")
    for file in ("", "list.json"):
        ways = [f"{tmp_path}/data/set/{file}", f"set/{file}", f"./set/../set/{file}", f"../link/{file}"]
        found = [find_volumes(Path(way)).volumes for way in ways]
        assert len(found[0]) == 3
        assert all(names(entries) == names(found[0]) for entries in found)
        assert all({entry.domain for entry in entries} == {"set"} for entries in found)
