"""Prepare volume files: checked, RAS, [0, 1], 1.5 mm, cropped to the body and padded."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import asdict, dataclass
from typing import Any

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
from torch import Tensor

from meduet_fast.errors import UserError, VolumeError

from .intensity import LOOK_VERSION, IntensityRule, map_to_unit
from .nifti_geometry import format_spacing
from .scans import ScanFacts, header_corrections, read_scan, scan_files
from .sources import VolumeEntry

# Raised when the code below gives other voxels than before, so that prepared volumes count as stale.
TRANSFORM_VERSION = 1


@dataclass(frozen=True)
class TransformConfig:
    """Set the prepared grid.

    The axes are always RAS: left to right, posterior to anterior, inferior to superior.

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
    """Hold a volume on the prepared grid.

    Attributes:
        image: (1, X, Y, Z) float32 in [0, 1], RAS axes.
        affine: (4, 4) float64, voxel index to RAS position in mm.
        spacing: mm along X, Y, Z.
        intensity: the rule that made it, stated or found.
        scan: what the volume was before.
    """

    image: Tensor
    affine: np.ndarray
    spacing: tuple[float, float, float]
    intensity: IntensityRule
    scan: ScanFacts


def load_volume(entry: VolumeEntry, config: TransformConfig) -> PreparedVolume:
    """Read, check and prepare one volume (spec section 1).

    Intensity to [0, 1], orientation to RAS, spacing by trilinear interpolation, crop to the bounding box of
    the voxels above 0, centre crop to ``max_size``, zero padding to ``min_size`` and ``multiple``.

    Raises:
        VolumeError: with a plain reason, if the file cannot be read, is damaged, is not 3D, has an unusable
            header or voxels, is a mask or label map, does not suit its intensity rule, or is too small.
    """
    path = entry.path
    scan = read_scan(path, entry.channel, entry.series)
    voxels, affine = scan.voxels, scan.affine  # (X, Y, Z) and (4, 4) of the scan
    facts = ScanFacts.of(scan)
    rule = map_to_unit(path, voxels, entry.intensity)

    edges = np.linalg.norm(affine[:3, :3], axis=0)  # (3,) mm
    size = tuple(math.ceil(n * edge / config.spacing) for n, edge in zip(voxels.shape, edges, strict=True))
    if math.prod(size) > 4 * math.prod(config.max_size):
        raise VolumeError(
            path,
            f"spacing {tuple(edges.round(4).tolist())} mm makes a grid of {size} voxels, far beyond "
            f"{tuple(config.max_size)}: is the spacing in mm?",
        )
    to_grid = Compose(
        [
            Orientation("RAS", labels=(("L", "R"), ("P", "A"), ("I", "S"))),
            Spacing(config.spacing, mode="bilinear", dtype=np.float32),
            CropForeground(allow_smaller=True),
        ]
    )
    image = to_grid(MetaTensor(torch.from_numpy(voxels)[None], affine=torch.from_numpy(affine)))
    found = tuple(image.shape[1:])
    if min(found) < config.min_size / 4:
        raise VolumeError(
            path,
            f"too small: {found} voxels of {config.spacing} mm are not empty, expected at least "
            f"{math.ceil(config.min_size / 4)} along every axis (a quarter of a crop); the scan has "
            f"{tuple(voxels.shape)} voxels of {format_spacing(edges)} mm",
        )
    to_size = Compose(
        [
            CenterSpatialCrop(config.max_size),
            SpatialPad([config.min_size] * 3),
            DivisiblePad(config.multiple),
        ]
    )
    image = to_size(image)  # (1, X, Y, Z) of the prepared grid
    grid = np.asarray(image.affine, dtype=np.float64)  # (4, 4)
    x, y, z = np.linalg.norm(grid[:3, :3], axis=0).round(6).tolist()
    # Plain: a MetaTensor carries its history along. Clamped: interpolation may overshoot by a rounding.
    return PreparedVolume(image.as_tensor().contiguous().clamp_(0, 1), grid, (x, y, z), rule, facts)


def content_key(entry: VolumeEntry, config: TransformConfig, tokenizer_identity: str) -> str:
    """Hash all that decides a volume's latents: file, intensity rule, transforms, tokenizer (SHA-256, hex).

    Raises:
        VolumeError: if the file cannot be read.
    """
    settings: dict[str, Any] = {
        "version": TRANSFORM_VERSION,
        "intensity": asdict(entry.intensity) if entry.intensity else f"look {LOOK_VERSION}",
        "transform": asdict(config),
        "tokenizer": tokenizer_identity,
    }
    if entry.channel is not None:
        settings["channel"] = entry.channel
    settings.update(header_corrections(entry.path))  # before headers were checked, other voxels were taken
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    try:
        for file in scan_files(entry.path, entry.series):
            with file.open("rb") as stream:
                while chunk := stream.read(1 << 20):
                    digest.update(chunk)
    except OSError as error:
        raise VolumeError(entry.path, f"cannot be read: {error.strerror or error}") from error
    return digest.hexdigest()
