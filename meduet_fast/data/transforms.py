"""Prepare volume files: checked, RAS, [0, 1], 1.5 mm, cropped to the body and padded."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from nibabel.orientations import apply_orientation, inv_ornt_aff, io_orientation

from meduet_fast.errors import UserError, VolumeError

from .intensity import LOOK_VERSION, IntensityRule, map_to_unit
from .nifti_geometry import format_spacing
from .scans import ScanFacts, header_corrections, read_scan, scan_files
from .sources import VolumeEntry

if TYPE_CHECKING:  # imported where used: processes that only read volumes begin without torch and MONAI
    from torch import Tensor

# Raised when the code below gives other voxels than before, so that prepared volumes count as stale.
TRANSFORM_VERSION = 1
RIGHT_ANGLE = 1e-4  # cosine between axes that are perpendicular but for a header's rounding
PLACE_DECIMALS = 4  # of a voxel: 1.5 mm that a header rounded are no reason to mix neighbours


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
        voxels: (X, Y, Z) float32 in [0, 1], RAS axes.
        affine: (4, 4) float64, voxel index to RAS position in mm.
        spacing: mm along X, Y, Z.
        intensity: the rule that made it, stated or found.
        scan: what the volume was before.
    """

    voxels: np.ndarray
    affine: np.ndarray
    spacing: tuple[float, float, float]
    intensity: IntensityRule
    scan: ScanFacts

    @property
    def image(self) -> Tensor:
        """Return the voxels as a tensor (1, X, Y, Z) that shares their memory."""
        import torch

        return torch.from_numpy(self.voxels)[None]


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
    image, affine = _resample(voxels, affine, config.spacing)  # (R, A, S) and (4, 4) of the grid
    shown = image > 0
    inside = [np.flatnonzero(shown.any(axis=(axis - 1, axis - 2))) for axis in range(3)]
    first = np.array([index[0] if index.size else 0 for index in inside])  # (3,)
    found = np.array([index[-1] + 1 if index.size else 0 for index in inside]) - first  # (3,)
    if min(found) < config.min_size / 4:
        raise VolumeError(
            path,
            f"too small: {tuple(found.tolist())} voxels of {config.spacing} mm are not empty, expected at "
            f"least {math.ceil(config.min_size / 4)} along every axis (a quarter of a crop); the scan has "
            f"{tuple(voxels.shape)} voxels of {format_spacing(edges)} mm",
        )
    first += np.maximum(0, found // 2 - np.array(config.max_size) // 2)
    kept = np.minimum(found, config.max_size)  # (3,)
    least = np.maximum(kept, config.min_size)
    total = -(-least // config.multiple) * config.multiple
    before = (least - kept) // 2 + (total - least) // 2
    grid = np.zeros(total, np.float32)  # (X, Y, Z)
    source = tuple(slice(start, start + size) for start, size in zip(first, kept, strict=True))
    target = tuple(slice(start, start + size) for start, size in zip(before, kept, strict=True))
    np.clip(image[source], 0, 1, out=grid[target])  # interpolation may overshoot by a rounding
    affine[:3, 3] += affine[:3, :3] @ (first - before)
    x, y, z = np.linalg.norm(affine[:3, :3], axis=0).round(6).tolist()
    return PreparedVolume(grid, affine, (x, y, z), rule, facts)


def _resample(voxels: np.ndarray, affine: np.ndarray, spacing: float) -> tuple[np.ndarray, np.ndarray]:
    """Turn a scan to RAS and interpolate it trilinearly, on a grid that begins with its first voxel.

    A sheared scan gets the grid of MONAI's ``Spacing``.

    Args:
        voxels: (X, Y, Z) float32.
        affine: (4, 4) float64, voxel index to RAS position in mm.
        spacing: of the new grid in mm.

    Returns:
        The image (R, A, S), perhaps a view, and its affine (4, 4).
    """
    turns = io_orientation(affine)  # (3, 2): where each axis goes, and whether it is turned round
    affine = affine @ inv_ornt_aff(turns, voxels.shape)  # (4, 4) of the turned scan
    edges = np.linalg.norm(affine[:3, :3], axis=0)  # (3,) mm along R, A, S
    axes = affine[:3, :3] / edges
    if np.abs(axes.T @ axes - np.eye(3)).max() > RIGHT_ANGLE:
        return _unshear(apply_orientation(voxels, turns), affine, spacing)
    memory = np.argsort(np.abs(voxels.strides))[::-1]  # (3,) axes of the scan, from slow to fast
    towards, forward = turns[memory, 0].astype(int), turns[memory, 1] > 0  # (3,) each, in this order
    step = spacing / edges[towards]  # (3,) in voxels of the scan
    image = voxels.transpose(memory)
    for axis in np.argsort(-step, kind="stable"):  # what becomes less comes first
        last = image.shape[axis] - 1
        places = np.arange(round(last / step[axis] + 1)) * step[axis]  # (N,) from the first voxel in RAS
        places = places.round(PLACE_DECIMALS).clip(0, last)  # behind the last voxel its value goes on
        image = _interpolate(image, int(axis), places if forward[axis] else last - places)
    affine[:3, :3] *= spacing / edges
    return image.transpose(np.argsort(towards)), affine


def _interpolate(image: np.ndarray, axis: int, places: np.ndarray) -> np.ndarray:
    """Interpolate linearly along an axis of L voxels at ``places`` (N,), from 0 to L - 1."""
    lower = np.floor(places).astype(int)  # (N,)
    weight = (places - lower).astype(np.float32)  # (N,)
    found = np.take(image, lower, axis)
    if weight.any():
        upper = np.take(image, np.minimum(lower + 1, image.shape[axis] - 1), axis)
        upper -= found
        upper *= weight.reshape([-1 if other == axis else 1 for other in range(3)])
        found += upper
    return found


def _unshear(image: np.ndarray, affine: np.ndarray, spacing: float) -> tuple[np.ndarray, np.ndarray]:
    """Do the same for a scan (R, A, S) of a tilted gantry, whose axes the new grid makes perpendicular."""
    import torch
    from monai.data import MetaTensor
    from monai.transforms import Spacing

    tensor = MetaTensor(torch.from_numpy(image.copy())[None], affine=torch.from_numpy(affine))
    grid = Spacing(spacing, mode="bilinear", dtype=np.float32)(tensor)  # (1, X, Y, Z)
    assert isinstance(grid, MetaTensor)
    return grid.as_tensor()[0].numpy(), np.asarray(grid.affine, dtype=np.float64)


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
