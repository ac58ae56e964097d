"""Read MetaImage and NRRD with SimpleITK, the extra ``itk``: imported where it is used."""

from __future__ import annotations

import locale
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import zip_longest
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from meduet_fast.errors import VolumeError, install_hint

READERS = {".mha": "MetaImageIO", ".mhd": "MetaImageIO", ".nrrd": "NrrdImageIO"}
ITK_ENDINGS = tuple(READERS)
LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
META_UNIT = "ITK_VoxelUnits"  # of a MetaImage, as ITK calls it
# Of an NRRD, where ITK turns the axes as they say; others (with time, of the scanner) it takes for the last.
SPACES = re.compile("(ra|la|lp)s|(rightanterior|leftanterior|leftposterior)superior")
SPATIAL_KINDS = ("", "domain", "space", "???")  # of an NRRD's axes
QUOTED = '"([^"]*)"'  # a unit of an NRRD
MILLIMETRES = ("mm", "", "???")


def simple_itk(path: Path) -> ModuleType:
    """Import SimpleITK.

    Raises:
        VolumeError: it is not there to read ``path``, or too old.
    """
    try:
        import SimpleITK
    except ImportError as error:
        raise VolumeError(path, f"needs SimpleITK to be read: {install_hint('itk')}") from error
    version = SimpleITK.Version.VersionString()
    if [int(part) for part in re.findall(r"\d+", version)[:3]] < [2, 5, 4]:
        reason = f"needs SimpleITK 2.5.4 or later, found {version}, which reads slices that are cut short"
        raise VolumeError(path, reason)
    SimpleITK.ProcessObject.SetGlobalWarningDisplay(False)  # what matters is checked here
    return SimpleITK


@contextmanager
def locale_kept() -> Iterator[None]:
    """Put the process's locale back: GDCM leaves it at C, in which Python opens text files as ASCII."""
    before = locale.setlocale(locale.LC_ALL)
    try:
        yield
    finally:
        locale.setlocale(locale.LC_ALL, before)


def last_words(error: Exception) -> str:
    """Return the last words of ITK, which come behind its own file and line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return re.sub(r"^(sitk|itk)::ERROR:\s*", "", lines[-1]) if lines else type(error).__name__


def itk_files(path: Path) -> tuple[Path, ...]:
    """Return the files of an image: ``path``, and the file of voxels that the header of a ``.mhd`` names.

    Raises:
        VolumeError: the header can't be read, or names no single file.
    """
    if not path.name.lower().endswith(".mhd"):
        return (path,)
    try:
        named = _read_header(path).get("ElementDataFile")
    except OSError as error:
        raise VolumeError(path, f"cannot be read: {error.strerror or error}") from error
    if not named or named.split()[0] == "LIST" or "%" in named:
        found = repr(named) if named else "none"
        raise VolumeError(path, f"found {found} for ElementDataFile, expected the name of one file")
    return (path,) if named == "LOCAL" else (path, path.parent / named)


def check_name(path: Path, file: Path) -> None:
    """Refuse a name that ends the process when ITK is given it."""
    try:
        str(file).encode()
    except UnicodeEncodeError:
        inside = f"{file.name}: " if file != path else ""
        raise VolumeError(path, f"{inside}the name is not UTF-8, which ITK cannot open: rename it") from None


@locale_kept()
def read_itk(path: Path, channel: int | None = None) -> tuple[np.ndarray, np.ndarray, tuple[str, ...]]:
    """Read one 3D volume of a file.

    Returns:
        Voxels (X, Y, Z) float32, the affine (4, 4) float64 from voxel index to RAS position in mm, and notes.

    Raises:
        VolumeError: ITK can't read it, or it holds no single volume of real numbers, or its header states no
            spacing in mm, or axes that are not anatomical.
    """
    sitk = simple_itk(path)
    for file in itk_files(path):
        check_name(path, file)
        try:
            with file.open("rb"):
                pass
        except OSError as error:
            raise VolumeError(file, f"cannot be read: {error.strerror}") from error
    reader = sitk.ImageFileReader()
    reader.SetImageIO(READERS[path.suffix.lower()])  # by itself ITK knows MetaImages in small letters alone
    reader.SetFileName(str(path))
    try:
        image = reader.Execute()
    except RuntimeError as error:
        raise VolumeError(path, f"ITK cannot read it: {last_words(error)}") from error
    notes = itk_notes(path)
    if image.HasMetaDataKey(META_UNIT):
        _check_units(path, [image.GetMetaData(META_UNIT)])
    voxels = sitk.GetArrayViewFromImage(
        image
    )  # axes backwards: (T, Z, Y, X) or (Z, Y, X), and components behind
    if image.GetNumberOfComponentsPerPixel() > 1:
        voxels = np.moveaxis(voxels, -1, 0)  # (C, Z, Y, X)
    shape = voxels.shape[::-1]
    if len(shape) < 3 or any(size > 1 for size in shape[4:]):
        raise VolumeError(path, f"found the shape {shape}, expected 3 axes (one volume, one channel)")
    channels = shape[3] if len(shape) > 3 else 1
    if channel is None and channels > 1:
        raise VolumeError(path, f"found the shape {shape}, expected 3 axes (one volume, one channel)")
    if channel is not None and not 0 <= channel < channels:
        raise VolumeError(path, f"found the shape {shape}, expected a channel {channel} on the fourth axis")
    voxels = voxels.reshape(-1, *shape[2::-1])[channel or 0]  # (Z, Y, X)
    return to_xyz(path, voxels), _affine(image), notes


def itk_notes(path: Path) -> tuple[str, ...]:
    """Check what the header of a file states of its geometry, which ITK fills in; returns what it leaves out.

    Raises:
        VolumeError: it can't be read, or states no spacing in mm, or axes that are not anatomical.
    """
    try:
        header = _read_header(path)
    except OSError as error:
        raise VolumeError(path, f"cannot be read: {error.strerror or error}") from error
    if path.suffix.lower() == ".nrrd":
        header = {key.lower(): value for key, value in header.items()}
        _check_nrrd(path, header)
        orientation, origin = ["space"], ["space origin", "axis mins", "axismins"]
    else:
        orientation, origin = ["TransformMatrix", "Rotation", "Orientation"], ["Offset", "Position", "Origin"]
        _check_spacing(path, header.get("ElementSpacing", header.get("ElementSize")))
        named = header.get("AnatomicalOrientation", "RAI").upper()
        if not any(key in header for key in orientation) and named not in ("RAI", "", "???"):
            raise VolumeError(
                path,
                f"found AnatomicalOrientation {named} and no TransformMatrix, expected RAI or the matrix",
            )
    notes = []
    if not any(key in header for key in orientation):
        notes.append(
            f"no orientation in the header (no {orientation[0]}): x is taken to run from right to left, "
            "y to the back, z to the head"
        )
    if not any(key in header for key in origin):
        notes.append(f"no position in the header (no {origin[0]}): the first voxel is taken to lie at 0 mm")
    return tuple(notes)


def _read_header(path: Path) -> dict[str, str]:
    """Read the fields of a text header, of which ITK does not tell all.

    A MetaImage's ends with ElementDataFile, an NRRD's with an empty line.
    """
    fields: dict[str, str] = {}
    with path.open("rb") as stream:
        while (line := stream.readline(1 << 16)) and len(fields) < 1000 and "ElementDataFile" not in fields:
            key, *value = re.split("[:=]", line.decode("utf-8", "surrogateescape").strip(), maxsplit=1)
            if not key and path.suffix.lower() == ".nrrd":
                break
            fields[key.strip()] = "".join(value).strip()
    return fields


def _check_nrrd(path: Path, header: dict[str, str]) -> None:
    """Refuse an NRRD's header that ITK takes for more than it says."""
    if header.get("data file") or header.get("datafile"):
        raise VolumeError(path, "an NRRD header without voxels; join them in one file")
    space = header.get("space")
    if space is not None and not SPACES.fullmatch(re.sub("[-_ ]", "", space.lower())):
        raise VolumeError(
            path,
            f"found the space {space}, expected right-anterior-superior, left-anterior-superior or "
            "left-posterior-superior",
        )
    directions = header.get("space directions")
    if directions is None:
        _check_spacing(path, header.get("spacings"))
    elif directions.count("(") < 3:
        raise VolumeError(path, f"found the space directions {directions}, expected three vectors")
    _check_units(path, re.findall(QUOTED, header.get("space units", "")))
    axes = zip_longest(
        re.findall(QUOTED, header.get("units", "")), header.get("kinds", "").split(), fillvalue=""
    )
    _check_units(path, [unit for unit, kind in axes if kind.lower() in SPATIAL_KINDS])


def _check_spacing(path: Path, stated: str | None) -> None:
    """Refuse a spacing that is missing, which ITK takes for 1, or negative, which mirrors an axis."""
    try:
        numbers = np.array([float(word) for word in (stated or "").split()])
    except ValueError:
        numbers = np.empty(0)
    positive = np.isfinite(numbers) & (numbers > 0)  # an axis of channels has NaN
    if positive.sum() < 3 or (numbers <= 0).any():
        found = "no spacing" if stated is None else f"the spacing {stated}"
        raise VolumeError(path, f"found {found} in the header, expected positive numbers of mm")


def _check_units(path: Path, units: Sequence[str]) -> None:
    for unit in units:
        if unit not in MILLIMETRES:
            raise VolumeError(path, f"found the unit of length {unit}, expected mm")


def _affine(image: Any) -> np.ndarray:
    """Return the affine (4, 4) from voxel index to RAS mm of an ITK image, whose positions are LPS."""
    axes = image.GetDimension()
    affine = np.eye(4)
    affine[:3, :3] = np.reshape(image.GetDirection(), (axes, axes))[:3, :3] * image.GetSpacing()[:3]
    affine[:3, 3] = image.GetOrigin()[:3]
    return LPS_TO_RAS @ affine


def to_xyz(path: Path, voxels: np.ndarray) -> np.ndarray:
    """Copy voxels (Z, Y, X) to (X, Y, Z) float32."""
    if voxels.dtype.kind not in "iuf":
        raise VolumeError(path, f"found voxels of type {voxels.dtype}, expected integers or floats")
    with np.errstate(over="ignore"):  # what overflows is not finite
        return np.array(voxels.T, dtype=np.float32, order="F")
