"""From a volume file to a checked, prepared image: RAS, [0, 1], 1.5 mm, cropped to the body and padded."""

from __future__ import annotations

import gzip
import hashlib
import json
import math
import zlib
from dataclasses import asdict, dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
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
from nibabel.filebasedimages import ImageFileError
from nibabel.fileholders import FileHolder
from nibabel.spatialimages import HeaderDataError, HeaderTypeError
from torch import Tensor

from meduet_fast.data.sources import IntensityRule, VolumeEntry
from meduet_fast.errors import UserError, VolumeError

# Raised when the code below gives other voxels than before, so that prepared volumes count as stale.
TRANSFORM_VERSION = 1


@dataclass(frozen=True)
class TransformConfig:
    """The prepared grid. The axes are always RAS: left to right, posterior to anterior, inferior to superior.

    Attributes:
        spacing: distance between voxels in mm, the same along every axis.
        max_size: longest axes in voxels of the prepared grid; what is longer is cropped about its centre.
        min_size: shortest axis in voxels of the prepared grid; what is shorter is padded with zeros on both
            sides. A volume with less than a quarter of it is refused.
        multiple: the axes are padded to a multiple of this many voxels (the tokenizer's compression).

    Raises:
        UserError: if a value is not positive, or ``max_size`` is below ``min_size`` or not divisible by
            ``multiple``.
    """

    spacing: float = 1.5
    max_size: tuple[int, int, int] = (512, 512, 768)
    min_size: int = 96
    multiple: int = 4

    def __post_init__(self) -> None:
        if not 0 < self.spacing < float("inf"):
            raise UserError(f"spacing: found {self.spacing}, expected a positive number of mm")
        if self.multiple < 1 or self.min_size < 1:
            raise UserError(
                f"min_size and multiple: found {self.min_size} and {self.multiple}, expected 1 or more"
            )
        if any(size < self.min_size or size % self.multiple for size in self.max_size):
            raise UserError(
                f"max_size: found {tuple(self.max_size)}, expected multiples of {self.multiple} "
                f"that are at least {self.min_size}"
            )


@dataclass
class PreparedVolume:
    """A volume on the prepared grid.

    Attributes:
        image: (1, X, Y, Z) float32 in [0, 1], RAS axes.
        affine: (4, 4) float64, voxel index to RAS position in mm.
        spacing: mm along X, Y, Z.
    """

    image: Tensor
    affine: np.ndarray
    spacing: tuple[float, float, float]


class _Refused(Exception):
    """Why a volume cannot be used."""


def load_volume(entry: VolumeEntry, config: TransformConfig) -> PreparedVolume:
    """Read, check and prepare one volume (spec section 1).

    Intensity to [0, 1], orientation to RAS, spacing by trilinear interpolation, crop to the bounding box of
    the voxels above 0, centre crop to ``max_size``, zero padding to ``min_size`` and ``multiple``.

    Raises:
        VolumeError: with a plain reason, if the file cannot be read, is no NIfTI, is damaged, is not 3D, has
            an unusable header or voxels, shows nothing, or is too small.
    """
    try:
        voxels, affine = _read(entry.path)
        _apply_intensity(voxels, entry.intensity)
        return _prepare(voxels, affine, config)
    except _Refused as error:
        raise VolumeError(entry.path, str(error)) from error.__cause__


def _read(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Voxels, (X, Y, Z) float32, and affine, (4, 4) float64, of a file that has passed every check."""
    try:
        packed = path.name.endswith(".gz")
        # Deflate packs at most 1032 bytes into one: bounds what a damaged header may make us allocate.
        capacity = path.stat().st_size * (1032 if packed else 1)
        with gzip.open(path, "rb") if packed else path.open("rb") as stream:
            kind = _check_header(stream.read(nib.Nifti2Header.sizeof_hdr), capacity)
            stream.seek(0)
            image = kind.from_file_map({"image": FileHolder(fileobj=stream)}, mmap=False)
            affine = _check_affine(image)
            with np.errstate(over="ignore"):  # what overflows is reported as not finite below
                voxels = image.get_fdata(dtype=np.float32, caching="unchanged")
            while stream.read(1 << 20):  # gzip compares its checksum at the end only
                pass
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise _Refused(f"damaged or truncated gzip: {error}") from error
    except (HeaderDataError, HeaderTypeError, ImageFileError) as error:
        raise _Refused(f"damaged NIfTI header: {error}") from error
    except MemoryError as error:
        raise _Refused("does not fit into memory") from error
    except OSError as error:
        # Without an error code it is nibabel's count of missing bytes, not the system's refusal.
        raise _Refused(
            f"cannot be read: {error.strerror}" if error.errno else f"truncated: {error}"
        ) from error
    voxels = voxels.reshape(voxels.shape[:3])
    low, high = float(voxels.min()), float(voxels.max())
    if not math.isfinite(high - low):
        raise _Refused(f"{int((~np.isfinite(voxels)).sum())} voxels are not finite (NaN or Inf)")
    if low == high:
        raise _Refused(f"constant image: every voxel is {low:g}")
    return voxels, affine


def _check_header(block: bytes, capacity: int) -> type[nib.Nifti1Image]:
    """The image class of a NIfTI file that starts with ``block`` and holds at most ``capacity`` bytes.

    nibabel mends odd spacings silently when it loads a file; the raw header tells what is really in it.
    """
    for kind in (nib.Nifti1Image, nib.Nifti2Image):
        size = kind.header_class.sizeof_hdr
        if len(block) >= size and block[:4] in (size.to_bytes(4, "little"), size.to_bytes(4, "big")):
            header = kind.header_class(block[:size], check=False)
            break
    else:
        raise _Refused("not a NIfTI file")
    if bytes(header["magic"])[:3] != header.single_magic[:3]:
        raise _Refused("not a single-file NIfTI (a header of an .hdr/.img pair, or damaged)")
    shape = tuple(int(size) for size in header["dim"][1 : 1 + max(0, min(7, int(header["dim"][0])))])
    if len(shape) < 3 or min(shape) < 1 or any(size > 1 for size in shape[3:]):
        raise _Refused(f"found the shape {shape}, expected 3 axes (one volume, one channel)")
    spacing = tuple(float(value) for value in header["pixdim"][1:4])
    if not all(0 < value < math.inf for value in spacing):
        raise _Refused(f"found the spacing {spacing} mm in the header, expected positive numbers")
    if header.get_data_dtype().kind not in "iuf":
        raise _Refused(f"found voxels of type {header.get_data_dtype()}, expected integers or floats")
    promised = math.prod(shape) * header.get_data_dtype().itemsize
    if promised > capacity:
        raise _Refused(
            f"truncated: the header promises {promised} bytes of voxels, there are at most {capacity}"
        )
    return kind


def _check_affine(image: nib.Nifti1Image) -> np.ndarray:
    try:
        affine = np.asarray(image.affine, dtype=np.float64)
    except ValueError as error:  # a quaternion that is no rotation
        raise _Refused(f"unusable orientation in the header: {error}") from error
    if not np.isfinite(affine).all():
        raise _Refused("the affine is not finite")
    # The volume of a voxel over that of a box with the same edges: 1 for a proper grid, 0 for a singular one.
    edges = np.linalg.norm(affine[:3, :3], axis=0)
    if not edges.all() or abs(np.linalg.det(affine[:3, :3] / edges)) < 1e-3:
        raise _Refused(
            f"singular affine: {affine[:3, :3].round(4).tolist()} maps voxels onto a plane or a line"
        )
    return affine


def _apply_intensity(voxels: np.ndarray, rule: IntensityRule) -> None:
    """Map ``voxels`` to [0, 1] in place."""
    low, high = rule.low, rule.high
    if rule.kind == "mr_percentile":
        low, high = (float(value) for value in np.percentile(voxels[voxels != 0], [rule.low, rule.high]))
    if low < high:
        voxels -= low
        voxels *= 1 / (high - low)
        np.clip(voxels, 0, 1, out=voxels)
    if low >= high or voxels.min() == voxels.max():
        raise _Refused(
            f"constant image after {rule.kind} [{rule.low:g}, {rule.high:g}]: "
            "does the intensity rule suit the modality?"
        )


def _prepare(voxels: np.ndarray, affine: np.ndarray, config: TransformConfig) -> PreparedVolume:
    edges = np.linalg.norm(affine[:3, :3], axis=0)
    size = tuple(math.ceil(n * edge / config.spacing) for n, edge in zip(voxels.shape, edges, strict=True))
    if math.prod(size) > 4 * math.prod(config.max_size):
        raise _Refused(
            f"spacing {tuple(edges.round(4).tolist())} mm makes a grid of {size} voxels, far beyond "
            f"{tuple(config.max_size)}: is the spacing in mm?"
        )
    to_grid = Compose(
        [
            Orientation("RAS", labels=(("L", "R"), ("P", "A"), ("I", "S"))),
            Spacing(config.spacing, mode="bilinear", dtype=np.float32),
            CropForeground(allow_smaller=True),
        ]
    )
    to_size = Compose(
        [
            CenterSpatialCrop(config.max_size),
            SpatialPad([config.min_size] * 3),
            DivisiblePad(config.multiple),
        ]
    )
    image = to_grid(MetaTensor(torch.from_numpy(voxels)[None], affine=torch.from_numpy(affine)))
    found = tuple(image.shape[1:])
    if min(found) < config.min_size / 4:
        raise _Refused(
            f"too small: {found} voxels of {config.spacing} mm are not empty, expected at least "
            f"{math.ceil(config.min_size / 4)} along every axis (a quarter of a crop)"
        )
    image = to_size(image)
    return PreparedVolume(
        # Plain: a MetaTensor carries its history of transforms along. Interpolation may overshoot by a rounding.
        image=image.as_tensor().contiguous().clamp_(0, 1),
        affine=np.asarray(image.affine, dtype=np.float64),
        spacing=(config.spacing,) * 3,
    )


def content_key(entry: VolumeEntry, config: TransformConfig, tokenizer_identity: str) -> str:
    """SHA-256 (hex) of all that decides a volume's latents: file, intensity rule, transforms, tokenizer.

    Raises:
        VolumeError: if the file cannot be read.
    """
    settings = {
        "version": TRANSFORM_VERSION,
        "intensity": asdict(entry.intensity),
        "transform": asdict(config),
        "tokenizer": tokenizer_identity,
    }
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    try:
        with entry.path.open("rb") as stream:
            while chunk := stream.read(1 << 20):
                digest.update(chunk)
    except OSError as error:
        raise VolumeError(entry.path, f"cannot be read: {error.strerror or error}") from error
    return digest.hexdigest()
