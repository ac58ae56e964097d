"""Read NIfTI files that strangers wrote: every file is sound, or refused with a plain reason."""

from __future__ import annotations

import gzip
import math
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import nibabel as nib
import numpy as np
from nibabel.arrayproxy import ArrayProxy
from nibabel.spatialimages import HeaderDataError, HeaderTypeError

from meduet_fast.errors import VolumeError

from .nifti_geometry import Geometry, decide_geometry

# Deflate packs at most this many bytes into one: a bound on what a damaged header may make us allocate.
MAX_PACKING = 1032
PAIR_ENDINGS = {".hdr": ".img", ".img": ".hdr", ".hdr.gz": ".img.gz", ".img.gz": ".hdr.gz"}  # and its partner
EXTENDER = 4  # bytes behind the header of a single file; the first is 1 if extensions follow


def nifti_files(path: Path) -> tuple[Path, ...]:
    """Return the files that make up an image: header and voxels of a pair, whichever is given, or ``path``.

    Raises:
        VolumeError: the other half of a pair is missing, or its folder can't be read.
    """
    name = path.name.lower()
    ending = next((ending for ending in PAIR_ENDINGS if name.endswith(ending)), None)
    if ending is None:
        return (path,)
    stem = path.name[: -len(ending)]
    expected = f"{stem}{PAIR_ENDINGS[ending]}"
    # Either half may be packed, and endings may be in capitals.
    wanted = {f"{stem}{PAIR_ENDINGS[ending].removesuffix('.gz')}{packed}".lower() for packed in ("", ".gz")}
    with _reading(path):
        found = sorted(
            (file for file in path.parent.iterdir() if file.name.lower() in wanted),
            key=lambda file: (file.name != expected, not file.name.startswith(stem), file.name),
        )
    if not found:
        raise VolumeError(path, f"the other half of the pair, {expected}, is missing")
    return (path, found[0]) if ending.startswith(".hdr") else (found[0], path)


def read_nifti(path: Path, channel: int | None = None) -> tuple[np.ndarray, np.ndarray, tuple[str, ...]]:
    """Read one 3D volume: NIfTI-1 or -2, one file or a pair, plain or packed.

    Args:
        path: ends in ``.nii``, ``.hdr`` or ``.img``, in any case, with or without ``.gz``.
        channel: position on the fourth axis; may be left out where that is 1 long.

    Returns:
        Voxels (X, Y, Z) float32 with the header's scaling applied, the affine (4, 4) float64 from voxel index
        to RAS position in mm, and notes.

    Raises:
        VolumeError: if the file cannot be read, is no NIfTI, is truncated or damaged, or is not 3D (a fourth
            axis of one is fine); if its voxels are no real numbers; if its geometry is not certain; if a
            slice's worth of bytes or more follows the voxels.
    """
    file, header, shape, dtype = _read_header(path)
    geometry = decide_geometry(path, header)
    channels = shape[3] if len(shape) > 3 else 1
    if channel is None and channels > 1:
        raise VolumeError(path, f"found the shape {shape}, expected 3 axes (one volume, one channel)")
    if channel is not None and not 0 <= channel < channels:
        raise VolumeError(path, f"found the shape {shape}, expected a channel {channel} on the fourth axis")
    try:
        slope, intercept = (default if value is None else value for value, default in
                            zip(header.get_slope_inter(), (1.0, 0.0), strict=True))  # fmt: skip
    except HeaderDataError as error:
        raise VolumeError(path, f"damaged NIfTI header: {error}") from error
    size = math.prod(shape) * dtype.itemsize
    with _reading(path), _open(file) as stream:
        offset = _voxel_offset(path, header, stream, size)
        capacity = file.stat().st_size * (MAX_PACKING if _is_packed(file) else 1)
        if offset + size > capacity:
            raise VolumeError(
                path, f"truncated: expected {size} bytes of voxels after {offset}, found {capacity} at most"
            )
        first = offset + (channel or 0) * (size // channels)
        stored = ArrayProxy(stream, (shape[:3], dtype, first, slope, intercept), mmap=False)
        with np.errstate(over="ignore", invalid="ignore"):  # what overflows is not finite
            voxels = np.asanyarray(stored, dtype=np.float32)  # (X, Y, Z)
        stream.seek(offset + size)
        behind = 0
        while more := stream.read(1 << 20):  # to the end: gzip compares its checksum there only
            behind += len(more)
    if behind >= shape[0] * shape[1] * dtype.itemsize:
        raise VolumeError(
            path,
            f"found {behind} bytes behind the voxels, more than a slice: the shape {shape} or the voxel type "
            f"{dtype} in the header is wrong",
        )
    notes = (f"{behind} bytes behind the voxels, less than a slice, were ignored",) if behind else ()
    return voxels, geometry.affine, (*geometry.notes, *notes)


def read_corrections(path: Path) -> tuple[Geometry, int | None]:
    """Read where the voxels lie, and no voxel.

    Returns:
        The geometry; and the byte where the voxels begin, if the header states another one.

    Raises:
        VolumeError: as :func:`read_nifti` does for a header.
    """
    file, header, shape, dtype = _read_header(path)
    with _reading(path), _open(file) as stream:
        offset = _voxel_offset(path, header, stream, math.prod(shape) * dtype.itemsize)
    return decide_geometry(path, header), None if offset == float(header["vox_offset"]) else offset


def _is_packed(file: Path) -> bool:
    return file.name.lower().endswith(".gz")


def _open(file: Path) -> BinaryIO:
    return gzip.open(file, "rb") if _is_packed(file) else file.open("rb")  # type: ignore[return-value]


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Translate what goes wrong while a file is read."""
    try:
        yield
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


def _read_header(path: Path) -> tuple[Path, nib.Nifti1Header, tuple[int, ...], np.dtype]:
    """Return the file of the voxels, the header as it is in the file, and the voxels' shape and type.

    nibabel mends odd headers silently when it loads a file; the raw one tells what is really in it.
    """
    *headers, voxels = nifti_files(path)
    with _reading(path), _open(headers[0] if headers else path) as stream:
        block = stream.read(nib.Nifti2Header.sizeof_hdr)
    for kind in (nib.Nifti1Header, nib.Nifti2Header):
        length = kind.sizeof_hdr
        if len(block) >= length and block[:4] in (length.to_bytes(4, "little"), length.to_bytes(4, "big")):
            header = kind(block[:length], check=False)
            break
    else:
        raise VolumeError(path, "not a NIfTI file")
    magic = bytes(header["magic"])[:3]
    if headers and magic not in (nib.Nifti1Header.pair_magic[:3], nib.Nifti2Header.pair_magic[:3]):
        raise VolumeError(
            path,
            "an Analyze header, which states no orientation: left and right are unknown; convert it to NIfTI",
        )
    if not headers and magic != header.single_magic[:3]:
        raise VolumeError(path, "not a single-file NIfTI (a header of an .hdr/.img pair, or damaged)")
    axes = max(0, min(7, int(header["dim"][0])))
    shape = tuple(int(size) for size in header["dim"][1 : 1 + axes])
    if len(shape) < 3 or min(shape) < 1 or any(size > 1 for size in shape[4:]):
        raise VolumeError(path, f"found the shape {shape}, expected 3 axes (one volume, one channel)")
    try:
        dtype = header.get_data_dtype()
    except KeyError as error:
        raise VolumeError(path, f"damaged NIfTI header: voxel type {error} is unknown") from error
    if dtype.kind not in "iuf":
        raise VolumeError(path, f"found voxels of type {dtype}, expected integers or floats")
    bits = int(header["bitpix"])
    if bits not in (0, 8 * dtype.itemsize):  # 0: not filled in
        raise VolumeError(
            path, f"damaged NIfTI header: found {bits} bits per voxel, but voxels of type {dtype}"
        )
    return voxels, header, shape, dtype


def _voxel_offset(path: Path, header: nib.Nifti1Header, stream: BinaryIO, size: int) -> int:
    """Return the byte where ``size`` bytes of voxels begin.

    Where the header names a byte inside of itself or of its extensions, the length of the file decides: the
    voxels are its last bytes, and begin where the header or an extension ends.
    """
    stated = float(header["vox_offset"])
    if bytes(header["magic"])[:2] != b"n+":
        if not (stated.is_integer() and stated >= 0):
            raise VolumeError(path, f"damaged NIfTI header: vox_offset is {stated:g}")
        return int(stated)
    ends = [header.sizeof_hdr, header.sizeof_hdr + EXTENDER]
    stream.seek(header.sizeof_hdr)
    if stream.read(EXTENDER)[:1] not in (b"", b"\0"):
        # Each extension begins with its length; they end at the stated offset, or nobody knows where.
        while (len(ends) == 2 or ends[-1] != stated) and len(length := stream.read(4)) == 4:
            extension = int.from_bytes(length, "little" if header.endianness == "<" else "big")
            if extension < 16 or extension % 16 or ends[-1] + extension > max(stated, 1 << 20):
                break
            ends.append(ends[-1] + extension)
            stream.seek(ends[-1])
    if stated.is_integer() and stated >= ends[-1]:
        return int(stated)
    total = stream.seek(0, 2)
    if total - size not in ends and total - size != stated:
        raise VolumeError(
            path,
            f"found vox_offset {stated:g}, inside of the header, and a length of {total} bytes, which can't "
            f"tell where {size} bytes of voxels begin",
        )
    return total - size
