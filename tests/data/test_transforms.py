"""Preparation keeps every voxel at its place in the world; a bad file is refused with its reason."""

from __future__ import annotations

import gzip
import hashlib
import json
import struct
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict, replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.transforms import (
    CenterSpatialCrop,
    Compose,
    CropForeground,
    DivisiblePad,
    Orientation,
    Spacing,
    SpatialPad,
)

from meduet_fast.data.intensity import IntensityRule
from meduet_fast.data.scans import read_scan
from meduet_fast.data.sources import VolumeEntry
from meduet_fast.data.transforms import PreparedVolume, TransformConfig, content_key, load_volume
from meduet_fast.errors import UserError, VolumeError

UNIT = IntensityRule("ct_window", 0.0, 1.0)
SMALL = TransformConfig(spacing=1.5, max_size=(64, 64, 64), min_size=24, multiple=4)


def write(path: Path, voxels: np.ndarray, affine: np.ndarray | None = None) -> VolumeEntry:
    nib.Nifti1Image(voxels, np.eye(4) if affine is None else affine).to_filename(path)
    return entry_of(path)


def entry_of(path: Path, rule: IntensityRule = UNIT) -> VolumeEntry:
    return VolumeEntry(path, "here", "chest", rule, "volume")


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).uniform(0.1, 0.9, shape).astype(np.float32)


def grid_affine(axes: str, spacing: tuple[float, float, float], degrees: float = 0.0) -> np.ndarray:
    """Affine of a grid with these axis codes, turned about an oblique axis, and with an odd origin."""
    columns = {
        "R": (1, 0, 0),
        "A": (0, 1, 0),
        "S": (0, 0, 1),
        "L": (-1, 0, 0),
        "P": (0, -1, 0),
        "I": (0, 0, -1),
    }
    matrix = np.array([columns[axis] for axis in axes], dtype=float).T
    axis = np.array([1.0, 2.0, 0.5]) / np.linalg.norm([1.0, 2.0, 0.5])
    cross = np.cross(np.eye(3), axis)
    angle = np.deg2rad(degrees)
    turn = np.eye(3) + np.sin(angle) * cross + (1 - np.cos(angle)) * cross @ cross
    affine = np.eye(4)
    affine[:3, :3] = turn @ matrix * spacing
    affine[:3, 3] = (-31.0, 17.0, 240.0)
    return affine


def positions(shape: tuple[int, ...], affine: np.ndarray) -> np.ndarray:
    """World position of every voxel, (X, Y, Z, 3)."""
    index = np.stack(np.meshgrid(*(np.arange(size) for size in shape), indexing="ij"), axis=-1)
    return index @ affine[:3, :3].T + affine[:3, 3]


@pytest.mark.parametrize(
    ("axes", "spacing", "degrees"),
    [
        ("RAS", (1.5, 1.5, 1.5), 0.0),
        ("LAS", (0.7, 0.7, 2.5), 0.0),
        ("LPI", (2.0, 1.0, 1.5), 0.0),
        ("SRP", (3.0, 0.9, 1.1), 0.0),
        ("RAS", (1.0, 0.98, 0.98), 12.0),
        ("PIR", (0.8, 1.7, 1.2), -20.0),
    ],
)
def test_every_voxel_stays_at_its_position_in_the_world(
    tmp_path: Path, axes: str, spacing: tuple[float, float, float], degrees: float
) -> None:
    """Trilinear interpolation reproduces a linear ramp over the world exactly, if the affine is right."""
    affine = grid_affine(axes, spacing, degrees)
    shape = (50, 44, 40)
    slope = np.array([0.004, -0.003, 0.002])
    world = positions(shape, affine)
    middle = world.reshape(-1, 3).mean(axis=0)
    ramp = ((world - middle) @ slope + 0.5).astype(np.float32)
    assert 0 < ramp.min() < ramp.max() < 1
    # An axis that is cropped (40), one that is padded to the minimum, one that is padded to the multiple.
    config = TransformConfig(spacing=1.5, max_size=(40, 40, 80), min_size=36, multiple=4)

    volume = load_volume(write(tmp_path / "ramp.nii.gz", ramp, affine), config)

    assert nib.aff2axcodes(volume.affine) == ("R", "A", "S")
    np.testing.assert_allclose(np.linalg.norm(volume.affine[:3, :3], axis=0), 1.5, rtol=1e-6)
    there = positions(volume.image.shape[1:], volume.affine)
    source = np.linalg.inv(affine)
    inside = there @ source[:3, :3].T + source[:3, 3]
    known = ((inside >= 0) & (inside <= np.array(shape) - 1)).all(axis=-1)
    assert known.sum() > 15000
    expected = (there - middle) @ slope + 0.5
    np.testing.assert_allclose(volume.image[0].numpy()[known], expected[known], atol=2e-4)


def by_monai(
    voxels: np.ndarray, affine: np.ndarray, config: TransformConfig
) -> tuple[np.ndarray, np.ndarray]:
    """The same grid by MONAI's transforms: voxels (X, Y, Z) and affine."""
    to_grid = Compose(
        [
            Orientation("RAS", labels=(("L", "R"), ("P", "A"), ("I", "S"))),
            Spacing(config.spacing, mode="bilinear", dtype=np.float32),
            CropForeground(allow_smaller=True),
            CenterSpatialCrop(config.max_size),
            SpatialPad([config.min_size] * 3),
            DivisiblePad(config.multiple),
        ]
    )
    image = to_grid(MetaTensor(torch.from_numpy(voxels.copy())[None], affine=torch.from_numpy(affine)))
    return image.as_tensor()[0].numpy(), np.asarray(image.affine)


@pytest.mark.parametrize(
    ("axes", "spacing", "shear"),
    [
        ("RAS", (1.5, 1.5, 1.5), 0.0),
        ("RAS", (1.50000006, 1.4999999, 1.5), 0.0),
        ("LPS", (0.7, 0.71, 2.5), 0.0),
        ("SRP", (3.0, 0.9, 1.1), 0.0),
        ("ILA", (1.0, 0.5, 4.0), 0.0),
        ("RAS", (0.9, 1.2, 2.0), 0.2),
        ("PIR", (0.8, 1.7, 1.2), -0.1),
    ],
)
def test_the_grid_is_that_of_monai(
    tmp_path: Path, axes: str, spacing: tuple[float, float, float], shear: float
) -> None:
    """Also of a sheared scan, and with air around a body, and odd sizes."""
    voxels = np.zeros((67, 45, 52), np.float32)
    voxels[6:61, 3:40, 5:47] = noise(55, 37, 42)
    affine = grid_affine(axes, spacing)
    affine[:3, 2] += shear * affine[:3, 1]
    config = TransformConfig(spacing=1.5, max_size=(40, 40, 48), min_size=25, multiple=4)
    entry = write(tmp_path / "a.nii", voxels, affine)
    volume = load_volume(entry, config)
    scan = read_scan(entry.path)
    expected, grid = by_monai(scan.voxels, scan.affine, config)
    assert volume.voxels.shape == expected.shape
    np.testing.assert_allclose(volume.affine, grid, atol=1e-4)
    np.testing.assert_allclose(volume.voxels, expected, atol=1e-4)


def test_a_scan_of_one_thin_axis_is_refused_and_not_misread(tmp_path: Path) -> None:
    with pytest.raises(VolumeError, match="too small"):
        load_volume(write(tmp_path / "a.nii", noise(40, 40, 1)), SMALL)


def test_crop_and_pad_are_centred_and_exact(tmp_path: Path) -> None:
    voxels = noise(70, 30, 42)
    affine = np.diag([1.5, 1.5, 1.5, 1.0])
    config = TransformConfig(spacing=1.5, max_size=(64, 64, 64), min_size=40, multiple=4)
    image = load_volume(write(tmp_path / "a.nii", voxels, affine), config).image
    assert image.shape == (1, 64, 40, 44)
    # 70 -> 64: three off each side; 30 -> 40: five on each side; 42 -> 44: one on each side.
    np.testing.assert_allclose(image[0, :, 5:35, 1:43], voxels[3:67], atol=1e-5)
    assert image[0, :, :5].abs().max() == 0
    assert image[0, :, 35:].abs().max() == 0


def test_the_background_is_cropped_off(tmp_path: Path) -> None:
    voxels = np.full((80, 80, 80), -1000, np.int16)
    voxels[20:50, 30:64, 10:46] = 40
    voxels[25:45, 35:60, 15:40] = 41
    affine = np.diag([1.5, 1.5, 1.5, 1.0])
    write(tmp_path / "a.nii.gz", voxels, affine)
    entry = entry_of(tmp_path / "a.nii.gz", IntensityRule("ct_window", -175, 250))
    volume = load_volume(entry, replace(SMALL, multiple=2))
    assert volume.image.shape == (1, 30, 34, 36)
    np.testing.assert_allclose(volume.affine[:3, 3], np.array([20, 30, 10]) * 1.5, atol=1e-6)
    assert volume.image.min() == pytest.approx((40 + 175) / 425)


def test_the_ct_window_is_linear_between_its_limits_and_clipped_outside(tmp_path: Path) -> None:
    voxels = np.full((32, 32, 32), 37.5, np.float32)
    voxels[:8], voxels[8:16], voxels[16:20], voxels[28:] = 3000, 250, 143.75, -175
    path = tmp_path / "a.nii.gz"
    write(path, voxels, np.diag([1.5, 1.5, 1.5, 1]))
    image = load_volume(entry_of(path, IntensityRule("ct_window", -175, 250)), SMALL).image
    np.testing.assert_allclose(image[0, :16], 1, atol=1e-5)
    assert image[0, 17, 0, 0] == pytest.approx(0.75)
    assert image[0, 25, 0, 0] == pytest.approx(0.5)


def test_mr_percentiles_are_those_of_the_non_zero_voxels(tmp_path: Path) -> None:
    voxels = np.zeros((48, 48, 48), np.int16)
    voxels[8:40, 8:40, 8:40] = np.arange(32**3).reshape(32, 32, 32) % 101 + 1
    path = tmp_path / "a.nii.gz"
    write(path, voxels, np.diag([1.5, 1.5, 1.5, 1]))
    image = load_volume(entry_of(path, IntensityRule("mr_percentile", 10, 90)), SMALL).image
    low, high = np.percentile(voxels[voxels > 0], [10, 90])
    assert (low, high) == (11, 91)
    expected = np.clip((voxels[8:40, 8:40, 8:40] - low) / (high - low), 0, 1)
    np.testing.assert_allclose(image[0], expected, atol=1e-5)


def test_header_scaling_nifti2_big_endian_and_a_fourth_axis_of_one_are_read(tmp_path: Path) -> None:
    stored = np.random.default_rng(1).integers(0, 200, (32, 32, 32, 1)).astype(">i2")
    image = nib.Nifti2Image(stored, np.diag([1.5, 1.5, 1.5, 1]), nib.Nifti2Header(endianness=">"))
    image.header.set_slope_inter(0.004, 0.1)
    image.to_filename(tmp_path / "a.nii.gz")
    volume = load_volume(entry_of(tmp_path / "a.nii.gz"), SMALL)
    np.testing.assert_allclose(volume.image[0], stored[..., 0] * 0.004 + 0.1, atol=1e-5)


def test_a_plain_contiguous_tensor_comes_back(tmp_path: Path) -> None:
    volume = load_volume(write(tmp_path / "a.nii.gz", noise(40, 40, 40)), SMALL)
    assert isinstance(volume, PreparedVolume)
    assert type(volume.image) is torch.Tensor
    assert volume.image.dtype == torch.float32
    assert volume.image.is_contiguous()
    assert volume.affine.dtype == np.float64
    assert volume.spacing == (1.5, 1.5, 1.5)


# --- bad files -------------------------------------------------------------------------------------


def patch(path: Path, offset: int, code: str, *values: float) -> None:
    """Overwrite header fields of an uncompressed NIfTI-1 file: pixdim at 76, sform_code 254, srow at 280."""
    content = bytearray(path.read_bytes())
    struct.pack_into("<" + code, content, offset, *values)
    path.write_bytes(content)


def truncated_gzip(path: Path) -> None:
    write(path, noise(40, 40, 40))
    path.write_bytes(path.read_bytes()[:-20000])


def truncated_inside_the_header(path: Path) -> None:
    write(path, noise(40, 40, 40))
    path.write_bytes(path.read_bytes()[:60])


def corrupt_gzip(path: Path) -> None:
    """One flipped bit in the last stored block: only the checksum at the end of the stream can tell."""
    write(path, noise(40, 40, 40))
    plain = gzip.decompress(path.read_bytes())
    content = bytearray(gzip.compress(plain, compresslevel=0))
    content[-1000] ^= 1
    path.write_bytes(content)


def truncated(path: Path) -> None:
    write(path, noise(40, 40, 40))
    path.write_bytes(path.read_bytes()[:-4])


def not_gzip(path: Path) -> None:
    path.write_bytes(b"PK\x03\x04 something else" * 100)


def text_in_gzip(path: Path) -> None:
    path.write_bytes(gzip.compress(b"not an image at all " * 100))


def empty(path: Path) -> None:
    path.touch()


def pair_header(path: Path) -> None:
    write(path, noise(40, 40, 40))
    patch(path, 344, "4s", b"ni1\0")  # type: ignore[arg-type]


def two_axes(path: Path) -> None:
    write(path, noise(40, 40))


def four_axes(path: Path) -> None:
    write(path, noise(30, 30, 30, 2))


def rgb(path: Path) -> None:
    write(path, np.zeros((30, 30, 30), np.dtype([("R", "u1"), ("G", "u1"), ("B", "u1")])))


def with_value(value: float) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        voxels = noise(40, 40, 40)
        voxels[3, 4, 5] = value
        write(path, voxels)

    return make


def with_spacing(value: float) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        write(path, noise(40, 40, 40))
        patch(path, 80, "f", value)

    return make


def with_affine(*rows: float) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        write(path, noise(40, 40, 40))
        patch(path, 254, "h", 1)
        patch(path, 280, "12f", *rows)

    return make


def constant(path: Path) -> None:
    write(path, np.full((40, 40, 40), 0.5, np.float32))


def outside_the_window(path: Path) -> None:
    write(path, noise(40, 40, 40) + 5)


def tiny(path: Path) -> None:
    write(path, noise(40, 40, 6))


def spacing_in_micrometres(path: Path) -> None:
    write(path, noise(40, 40, 40), np.diag([700.0, 700.0, 700.0, 1]))


def unknown_type(path: Path) -> None:
    write(path, noise(40, 40, 40))
    patch(path, 70, "h", 999)


def enormous(path: Path) -> None:
    write(path, noise(40, 40, 40))
    content = bytearray(gzip.decompress(path.read_bytes()))
    struct.pack_into("<3h", content, 42, 32000, 32000, 32000)
    path.write_bytes(gzip.compress(content))


BAD: list[tuple[str, Callable[[Path], None], str]] = [
    (".nii.gz", truncated_gzip, "damaged or truncated gzip"),
    (".nii.gz", truncated_inside_the_header, "damaged or truncated gzip"),
    (".nii.gz", corrupt_gzip, "damaged or truncated gzip: CRC"),
    (".nii", truncated, "truncated: expected 256000 bytes of voxels after 352, found 256348"),
    (".nii.gz", not_gzip, "damaged or truncated gzip: Not a gzipped file"),
    (".nii.gz", text_in_gzip, "not a NIfTI file"),
    (".nii.gz", empty, "not a NIfTI file"),
    (".nii", empty, "not a NIfTI file"),
    (".nii", pair_header, "not a single-file NIfTI"),
    (".nii", two_axes, r"shape \(40, 40\), expected 3 axes"),
    (".nii.gz", four_axes, r"shape \(30, 30, 30, 2\), expected 3 axes"),
    (".nii.gz", rgb, "voxels of type .*expected integers or floats"),
    (".nii.gz", with_value(float("nan")), "1 voxels are not finite"),
    (".nii.gz", with_value(float("inf")), "1 voxels are not finite"),
    (".nii.gz", with_value(float("-inf")), "1 voxels are not finite"),
    (".nii", with_spacing(-1.5), r"spacing \(-1.5, 1.0, 1.0\) in pixdim, but the sform .* says 1 x 1 x 1"),
    (
        ".nii",
        with_affine(1, 0, 0, 0, 1, 0, 0, 0, 0, 0, 1, 0),
        "singular affine",
    ),  # an axis without a direction
    (".nii", with_affine(1, 1, 0, 0, 1, 1, 0, 0, 0, 0, 1, 0), "singular affine"),  # two axes along one line
    (".nii", with_affine(float("nan"), 0, 0, 0, 0, 1, 0, 0, 0, 0, 1, 0), "the affine is not finite"),
    (".nii.gz", constant, "constant image: every voxel is 0.5"),
    (".nii.gz", outside_the_window, r"constant image after ct_window \[0, 1\]"),
    (".nii.gz", tiny, r"too small: \(.*\) voxels of 1.5 mm are not empty, expected at least 6"),
    (".nii.gz", spacing_in_micrometres, "is the spacing in mm"),
    (".nii", unknown_type, "damaged NIfTI header: voxel type 999 is unknown"),
    (".nii.gz", enormous, "truncated: expected 131072000000000 bytes"),
]


@pytest.mark.parametrize(("ending", "make", "reason"), BAD)
def test_a_bad_file_is_refused_with_its_reason(
    tmp_path: Path, ending: str, make: Callable[[Path], None], reason: str
) -> None:
    path = tmp_path / f"bad{ending}"
    make(path)
    with pytest.raises(VolumeError, match=reason) as caught:
        load_volume(entry_of(path), SMALL)
    assert caught.value.path == path
    assert str(caught.value) == f"{path}: {caught.value.reason}"
    assert "\n" not in caught.value.reason


def test_every_bad_file_differs_from_a_good_one_by_its_fault_alone(tmp_path: Path) -> None:
    load_volume(write(tmp_path / "good.nii.gz", noise(40, 40, 40)), SMALL)


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(VolumeError, match="cannot be read: No such file"):
        load_volume(entry_of(tmp_path / "absent.nii.gz"), SMALL)
    (tmp_path / "folder.nii.gz").mkdir()
    with pytest.raises(VolumeError, match="cannot be read: Is a directory"):
        load_volume(entry_of(tmp_path / "folder.nii.gz"), SMALL)


def test_a_file_without_read_permission_is_refused(
    tmp_path: Path, as_nobody: AbstractContextManager[None]
) -> None:
    entry = write(tmp_path / "closed.nii.gz", noise(40, 40, 40))
    entry.path.chmod(0)
    with as_nobody:
        with pytest.raises(VolumeError, match="cannot be read: Permission denied"):
            load_volume(entry, SMALL)
        with pytest.raises(VolumeError, match="cannot be read: Permission denied"):
            content_key(entry, SMALL, "tokenizer")


def test_random_damage_never_raises_anything_but_a_volume_error(tmp_path: Path) -> None:
    """400 files with one to four damaged header bytes: each loads, or is refused as it should be."""
    random = np.random.default_rng(7)
    write(tmp_path / "good.nii", noise(24, 24, 24), np.diag([1.5, 1.5, 1.5, 1]))
    good = (tmp_path / "good.nii").read_bytes()
    path = tmp_path / "damaged.nii"
    refused = 0
    for _ in range(400):
        content = bytearray(good)
        for offset in random.integers(0, 352, random.integers(1, 5)):
            content[offset] = random.integers(0, 256)
        path.write_bytes(content)
        try:
            image = load_volume(entry_of(path), SMALL).image
        except VolumeError:
            refused += 1
        else:
            assert torch.isfinite(image).all()
    assert 20 < refused < 400


# --- configuration and content key -----------------------------------------------------------------


@pytest.mark.parametrize(
    "values",
    [
        {"spacing": 0.0},
        {"spacing": -1.5},
        {"spacing": float("nan")},
        {"min_size": 0},
        {"multiple": 0},
        {"max_size": (64, 512, 768)},
        {"max_size": (512, 513, 768)},
    ],
)
def test_a_senseless_grid_is_refused(values: dict[str, object]) -> None:
    with pytest.raises(UserError, match=next(iter(values))):
        TransformConfig(**values)  # type: ignore[arg-type]


def test_the_content_key_changes_with_all_that_decides_the_latents_and_nothing_else(tmp_path: Path) -> None:
    entry = write(tmp_path / "a.nii", noise(24, 24, 24))
    key = content_key(entry, SMALL, "tokenizer")
    assert len(key) == 64

    moved = tmp_path / "b.nii"
    moved.write_bytes(entry.path.read_bytes())
    assert content_key(replace(entry, path=moved, domain="there", name="b"), SMALL, "tokenizer") == key

    keys = {
        key,
        content_key(entry, SMALL, "other tokenizer"),
        content_key(replace(entry, intensity=IntensityRule("ct_window", 0, 2)), SMALL, "tokenizer"),
        content_key(replace(entry, intensity=IntensityRule("mr_percentile", 0, 1)), SMALL, "tokenizer"),
        content_key(entry, replace(SMALL, spacing=1.0), "tokenizer"),
        content_key(entry, replace(SMALL, max_size=(64, 64, 60)), "tokenizer"),
        content_key(entry, replace(SMALL, min_size=20), "tokenizer"),
        content_key(entry, replace(SMALL, multiple=2), "tokenizer"),
    }
    patch(moved, 400, "f", 0.25)
    keys.add(content_key(replace(entry, path=moved), SMALL, "tokenizer"))
    assert len(keys) == 9


def test_what_was_prepared_of_sound_headers_is_up_to_date_and_of_others_is_not(tmp_path: Path) -> None:
    def key_without_headers(entry: VolumeEntry) -> str:
        settings = {
            "version": 1, "intensity": asdict(UNIT), "transform": asdict(SMALL), "tokenizer": "tokenizer",
        }  # fmt: skip
        return hashlib.sha256(
            json.dumps(settings, sort_keys=True).encode() + entry.path.read_bytes()
        ).hexdigest()

    entry = write(tmp_path / "a.nii", noise(24, 24, 24), grid_affine("LAS", (0.7, 0.7, 2.5), 10))
    assert content_key(entry, SMALL, "tokenizer") != key_without_headers(entry)  # its grid began elsewhere
    entry = write(tmp_path / "a.nii", noise(24, 24, 24), grid_affine("LAS", (0.7, 0.7, 2.5)))
    assert content_key(entry, SMALL, "tokenizer") == key_without_headers(entry)
    patch(entry.path, 254, "h", 0)  # no form: the axes are taken as before, which is only said
    assert load_volume(entry, SMALL).scan.notes
    assert content_key(entry, SMALL, "tokenizer") == key_without_headers(entry)
    patch(entry.path, 123, "B", 3)  # micrometres
    assert content_key(entry, SMALL, "tokenizer") != key_without_headers(entry)
    write(entry.path, noise(24, 24, 24))
    patch(entry.path, 80, "f", 2.0)  # pixdim beside another sform: refused
    assert content_key(entry, SMALL, "tokenizer") != key_without_headers(entry)
    write(entry.path, noise(24, 24, 24))
    patch(entry.path, 108, "f", 0)  # vox_offset: voxels were taken from byte 0 on
    assert content_key(entry, SMALL, "tokenizer") != key_without_headers(entry)


def test_the_content_key_is_that_of_all_files_and_of_the_channel(tmp_path: Path) -> None:
    nib.Nifti1Pair(noise(24, 24, 24), np.eye(4)).to_filename(tmp_path / "a.img")
    entry = entry_of(tmp_path / "a.hdr")
    keys = [
        content_key(entry, SMALL, "tokenizer"),
        content_key(replace(entry, channel=0), SMALL, "tokenizer"),
    ]
    assert content_key(entry_of(tmp_path / "a.img"), SMALL, "tokenizer") == keys[0]
    patch(tmp_path / "a.img", 100, "f", 0.25)
    keys.append(content_key(entry, SMALL, "tokenizer"))
    patch(tmp_path / "a.hdr", 148, "B", 65)  # a letter of the description
    keys.append(content_key(entry, SMALL, "tokenizer"))
    assert len(set(keys)) == 4


def test_a_channel_of_a_file_of_several_volumes_is_prepared(tmp_path: Path) -> None:
    voxels = noise(30, 30, 30, 2)
    entry = write(tmp_path / "a.nii.gz", voxels, np.diag([1.5, 1.5, 1.5, 1]))
    alone = write(tmp_path / "b.nii.gz", voxels[..., 1], np.diag([1.5, 1.5, 1.5, 1]))
    image = load_volume(replace(entry, channel=1), SMALL).image
    assert torch.equal(image, load_volume(alone, SMALL).image)


def test_a_body_of_the_wrong_scale_is_refused_with_its_spacing(tmp_path: Path) -> None:
    with pytest.raises(
        VolumeError, match=r"too small: .* the scan has \(40, 40, 40\) voxels of 0.001 x 0.001"
    ):
        load_volume(write(tmp_path / "a.nii", noise(40, 40, 40), np.diag([1e-3, 1e-3, 1e-3, 1])), SMALL)
