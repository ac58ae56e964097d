"""Read NIfTI files that strangers wrote: every file is sound, or refused with a plain reason."""

from __future__ import annotations

import gzip
import math
import zlib
from pathlib import Path

import nibabel as nib
import numpy as np
from nibabel.fileholders import FileHolder
from nibabel.spatialimages import HeaderDataError, HeaderTypeError

from meduet_fast.errors import VolumeError

# Deflate packs at most this many bytes into one: a bound on what a damaged header may make us allocate.
MAX_PACKING = 1032


def read_nifti(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Read one 3D volume, single file, NIfTI-1 or -2, plain (``.nii``) or packed (``.nii.gz``).

    Returns:
        Voxels, (X, Y, Z) float32 with the header's scaling applied, all finite and not all equal; and the
        affine, (4, 4) float64, from voxel index to RAS position in mm.

    Raises:
        VolumeError: if the file cannot be read, is no NIfTI, is truncated or damaged, or is not 3D (a fourth
            axis of one is fine); if its voxels are no real numbers, not finite or all equal; if its spacing
            is not positive or its affine singular.
    """
    packed = path.name.endswith(".gz")
    try:
        capacity = path.stat().st_size * (MAX_PACKING if packed else 1)
        with gzip.open(path, "rb") if packed else path.open("rb") as stream:
            kind = _check_header(path, stream.read(nib.Nifti2Header.sizeof_hdr), capacity)
            stream.seek(0)
            image = kind.from_file_map({"image": FileHolder(fileobj=stream)}, mmap=False)
            with np.errstate(over="ignore", invalid="ignore"):  # what overflows is not finite, see below
                voxels = image.get_fdata(dtype=np.float32, caching="unchanged")
            while stream.read(1 << 20):  # gzip compares its checksum at the end only
                pass
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise VolumeError(path, f"damaged or truncated gzip: {error}") from error
    except (HeaderDataError, HeaderTypeError, ValueError) as error:
        raise VolumeError(path, f"damaged NIfTI header: {error}") from error
    except MemoryError as error:
        raise VolumeError(path, "does not fit into memory") from error
    except OSError as error:
        # Without an error code it is nibabel's count of missing bytes, not the system's refusal.
        reason = f"cannot be read: {error.strerror}" if error.errno else f"truncated: {error}"
        raise VolumeError(path, reason) from error
    voxels = voxels.reshape(voxels.shape[:3])  # (X, Y, Z)
    affine = np.asarray(image.affine, dtype=np.float64)  # (4, 4)

    if not np.isfinite(affine).all():
        raise VolumeError(path, "the affine is not finite")
    # The volume of a voxel over that of a box with the same edges: 1 for a proper grid, 0 for a singular one.
    axes = affine[:3, :3]  # (3, 3), a column per voxel axis
    edges = np.linalg.norm(axes, axis=0)  # (3,) mm
    if not edges.all() or abs(np.linalg.det(axes / edges)) < 1e-3:
        raise VolumeError(path, f"singular affine: {axes.tolist()} maps the voxels onto a plane or a line")
    low, high = float(voxels.min()), float(voxels.max())
    if not (math.isfinite(low) and math.isfinite(high)):
        raise VolumeError(path, f"{int((~np.isfinite(voxels)).sum())} voxels are not finite (NaN or Inf)")
    if low == high:
        raise VolumeError(path, f"constant image: every voxel is {low:g}")
    return voxels, affine


def _check_header(path: Path, block: bytes, capacity: int) -> type[nib.Nifti1Image]:
    """Return the image class of a NIfTI file that starts with ``block`` and holds at most ``capacity`` bytes.

    nibabel mends odd spacings silently when it loads a file; the raw header tells what is really in it.
    """
    for kind in (nib.Nifti1Image, nib.Nifti2Image):
        length = kind.header_class.sizeof_hdr
        if len(block) >= length and block[:4] in (length.to_bytes(4, "little"), length.to_bytes(4, "big")):
            header = kind.header_class(block[:length], check=False)
            break
    else:
        raise VolumeError(path, "not a NIfTI file")
    if bytes(header["magic"])[:3] != header.single_magic[:3]:
        raise VolumeError(path, "not a single-file NIfTI (a header of an .hdr/.img pair, or damaged)")
    axes = max(0, min(7, int(header["dim"][0])))
    shape = tuple(int(size) for size in header["dim"][1 : 1 + axes])
    if len(shape) < 3 or min(shape) < 1 or any(size > 1 for size in shape[3:]):
        raise VolumeError(path, f"found the shape {shape}, expected 3 axes (one volume, one channel)")
    spacing = tuple(float(value) for value in header["pixdim"][1:4])
    if not all(0 < value < math.inf for value in spacing):
        raise VolumeError(path, f"found the spacing {spacing} mm in the header, expected positive numbers")
    try:
        dtype = header.get_data_dtype()
    except KeyError as error:
        raise VolumeError(path, f"damaged NIfTI header: voxel type {error} is unknown") from error
    if dtype.kind not in "iuf":
        raise VolumeError(path, f"found voxels of type {dtype}, expected integers or floats")
    size, offset = math.prod(shape) * dtype.itemsize, float(header["vox_offset"])
    if not 0 <= offset + size <= capacity:  # this way round, so that an offset of NaN is refused too
        raise VolumeError(
            path, f"truncated: expected {size} bytes of voxels after {offset:.0f}, found {capacity} at most"
        )
    return kind
