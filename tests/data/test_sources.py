"""Every form of input is found, named and given its rule; a wrong one is refused by file and key."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

from meduet_fast.data.intensity import CT, MR, IntensityRule
from meduet_fast.data.sources import VolumeEntry, find_volumes
from meduet_fast.errors import UserError

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


def test_a_folder_with_a_manifest_is_read_by_it(tmp_path: Path, touch: Touch) -> None:
    path = write_manifest(tmp_path, touch)
    touch("labels/organs.nii.gz")
    assert find_volumes(path.parent) == find_volumes(path)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("datasets: [", "not valid YAML"),
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
