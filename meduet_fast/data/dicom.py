"""Read DICOM with SimpleITK: the series of slices in a folder, what is no volume there, the voxels of one."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from types import ModuleType

import numpy as np

from meduet_fast.errors import VolumeError, printable

from .folders import LeftOut, format_left_out, is_dicom, is_torn_dicom
from .itk_formats import LPS_TO_RAS, check_name, last_words, locale_kept, simple_itk, to_xyz

# Tags, as ITK writes them.
MODALITY, IMAGE_TYPE, IMAGE_UID = "0008|0060", "0008|0008", "0008|0018"
SERIES, NUMBER, DESCRIPTION, ACQUISITION = "0020|000e", "0020|0011", "0008|103e", "0020|0012"
ROWS, COLUMNS, FRAMES, SAMPLES = "0028|0010", "0028|0011", "0028|0008", "0028|0002"
POSITION, ORIENTATION, PIXEL_SPACING = "0020|0032", "0020|0037", "0028|0030"
NUMBERS = {POSITION: 3, ORIENTATION: 6, PIXEL_SPACING: 2}

SLICE_STEP = 0.02  # relative: steps between slices that differ by more are a gap
TILT = np.cos(np.deg2rad(1.0))  # cosine between the slices' normal and the way from slice to slice
SAME_TURN = 0.01  # between the cosines of an orientation: less is a rounding
MIN_SLICES = 4  # fewer are no volume
FEW_SLICES = 16  # of one orientation in a localizer that does not say that it is one
_LOCALIZER = re.compile(r"\b(locali[sz]ers?|scouts?|topograms?|scanograms?|surveys?|surviews?)\b")
CLASS = b"\2\0\2\0UI"  # the tag, among the first bytes of a file
# Of images: CR to MG, CT, MR, US, captures, XA, NM, PET.
_IMAGES = re.compile(
    r"1\.2\.840\.10008\.5\.1\.4\.1\.1\.(1(\.\d+)*|2(\.\d)?|4(\.[134])?|[67](\.\d)?|12\.\d(\.\d)?|20|128|130)"
)

NO_IMAGE = "DICOM, but no image (a report, contours, a presentation state, ...)"
DAMAGED = "a DICOM image that cannot be read; is the file whole?"
MULTI_FRAME = "several slices in one DICOM file (multi-frame), which is not read; convert it to NIfTI"
NOT_IN_SPACE = "DICOM images without a position (captures of a screen, dose reports, X-rays, ultrasound)"
COLOURS = "DICOM images in colours"
LOCALIZER = "a localizer (scout)"
SINGLE = "a single DICOM image"
ONE_PLACE = "DICOM images of one place, one after another"
SPREAD = "the slices of one DICOM series lie in several folders: put them into one"
TOO_FEW = f"a DICOM series of fewer than {MIN_SLICES} slices is no volume"


@dataclass(frozen=True)
class Series:
    """Name the slices of a DICOM series, in a folder that may hold others.

    Attributes:
        uid: its SeriesInstanceUID.
        label: its number and description; if it states neither, the UID. What is no UTF-8 is escaped.
        files: names of the slices in their folder, sorted.
        modality: as the slices state it: CT, MR, PT, ...
        images: SOPInstanceUIDs of the slices.
        fault: why these slices are no volume by themselves; empty if they may be one.
    """

    uid: str
    label: str
    files: tuple[str, ...] = field(repr=False)
    modality: str = ""
    images: frozenset[str] = field(repr=False, default=frozenset())
    fault: str = ""

    def left_out(self, folder: Path) -> LeftOut:
        """Say that these slices, which have a fault, are no volume."""
        return _left_out(folder, self.label, self.files, self.fault)


def _left_out(folder: Path, label: str, files: Sequence[str], reason: str) -> LeftOut:
    """Name one image of a series by its file, several by their number."""
    if len(files) == 1:
        return LeftOut(folder / files[0], reason, part=f"series {label}")
    return LeftOut(folder, reason, part=f"series {label}, {len(files)} images")


@dataclass(frozen=True)
class _Image:
    path: Path
    tags: dict[str, str]

    def numbers(self, tag: str) -> np.ndarray:
        """Return the finite numbers of a tag of NUMBERS.

        Raises:
            VolumeError: there are none, or not as many.
        """
        try:
            numbers = np.array([float(part) for part in self.tags.get(tag, "").split("\\")])
        except ValueError:
            numbers = np.empty(0)
        if len(numbers) != NUMBERS[tag] or not np.isfinite(numbers).all():
            found = f"found {self.tags.get(tag)!r} in the tag ({tag}), expected {NUMBERS[tag]} numbers"
            raise VolumeError(self.path.parent, f"{self.path.name}: {found}")
        return numbers

    def count(self, tag: str) -> int:
        """Return the number in a tag, 1 where it states none."""
        text = self.tags.get(tag, "")
        return int(text) if text.isdecimal() else 1

    def normal(self) -> np.ndarray:
        """Compute the direction (3,) across the slice, in LPS."""
        return np.cross(*self.numbers(ORIENTATION).reshape(2, 3))


@locale_kept()
def find_series(folder: Path) -> tuple[list[Series], list[LeftOut]]:
    """Find the series of slices in a folder, by the headers of its files; none is opened further.

    Returns:
        The series, by number and UID, and what else is DICOM in the folder: what is no image, or no slice in
        space. Whether the slices of a series without a fault make a grid :func:`read_dicom` says.

    Raises:
        VolumeError: the folder cannot be read, or holds a name that is not UTF-8; SimpleITK is missing.
    """
    sitk = simple_itk(folder)
    check_name(folder, folder)
    groups: dict[str, list[_Image]] = {}
    left_out: list[LeftOut] = []
    try:
        for path in sorted(folder.iterdir()):
            check_name(folder, path)
            if path.name.startswith(".") or path.name.casefold() == "dicomdir":
                continue
            if not is_dicom(path):
                if is_torn_dicom(path):
                    left_out.append(LeftOut(path, DAMAGED, asked=True))
            elif tags := _read_tags(sitk, path):
                groups.setdefault(tags.get(SERIES, ""), []).append(_Image(path, tags))
            else:
                damaged = _is_of_image(path)
                left_out.append(LeftOut(path, DAMAGED if damaged else NO_IMAGE, asked=damaged))
    except OSError as error:
        raise VolumeError(folder, f"cannot be read: {error.strerror}") from error
    found: list[tuple[int, Series]] = []
    for uid, images in groups.items():
        first = images[0].tags
        label = " ".join(filter(None, (first.get(NUMBER), first.get(DESCRIPTION)))) or uid or "without UID"
        label = printable(label)  # Latin-1 as a rule in Europe, which no file of the store takes
        kinds: dict[str, list[_Image]] = {}
        for image in images:
            kinds.setdefault(_fault(image), []).append(image)
        slices = kinds.pop("", [])
        if slices:
            files = tuple(image.path.name for image in slices)
            modality = slices[0].tags.get(MODALITY, "")
            own = frozenset(image.tags.get(IMAGE_UID, "") for image in slices)
            found.append(
                (slices[0].count(NUMBER), Series(uid, label, files, modality, own, _no_volume(slices)))
            )
        for fault, others in kinds.items():
            left_out.append(_left_out(folder, label, [image.path.name for image in others], fault))
    found.sort(key=lambda item: (item[0], item[1].uid))
    return [series for _, series in found], left_out


def _read_tags(sitk: ModuleType, path: Path) -> dict[str, str]:
    """Read the tags of one image; none if it is no image, or not whole."""
    reader = sitk.ImageFileReader()
    reader.SetImageIO("GDCMImageIO")
    reader.SetFileName(str(path))
    reader.LoadPrivateTagsOff()
    try:
        reader.ReadImageInformation()
    except RuntimeError:
        return {}
    return {key: reader.GetMetaData(key).strip() for key in reader.GetMetaDataKeys()}


def _is_of_image(path: Path) -> bool:
    """Tell whether a DICOM file says that it is an image of a patient, or does not say what it is."""
    with path.open("rb") as stream:
        _, tag, rest = stream.read(4096).partition(CLASS)  # then a length of 2 bytes
    kind = rest[2 : 2 + int.from_bytes(rest[:2], "little")].decode("latin1").strip("\0 ")
    return not tag or _IMAGES.fullmatch(kind) is not None


def _fault(image: _Image) -> str:
    """Say why an image is no slice of a volume; empty if it may be one."""
    if image.count(FRAMES) > 1:
        return MULTI_FRAME
    if image.count(SAMPLES) > 1:
        return COLOURS
    if not image.tags.get(POSITION):
        return NOT_IN_SPACE
    return LOCALIZER if "LOCALIZER" in image.tags.get(IMAGE_TYPE, "").upper().split("\\") else ""


def _no_volume(slices: Sequence[_Image]) -> str:
    """Say why slices are no volume by themselves; empty if they may be one."""
    if len(slices) == 1:
        return SINGLE
    try:
        positions = np.array([image.numbers(POSITION) for image in slices])  # (N, 3)
        turns = _count_alike([image.numbers(ORIENTATION) for image in slices])
        height = float(np.ptp(positions @ slices[0].normal()))  # mm
    except VolumeError:  # reading says so
        return ""
    words = re.sub(r"[\W_]+", " ", slices[0].tags.get(DESCRIPTION, "").casefold())
    if max(turns) <= FEW_SLICES and (len(turns) > 1 or _LOCALIZER.search(words)):
        return LOCALIZER
    if len(turns) == 1 and height < 1e-3:
        return ONE_PLACE
    return TOO_FEW if len(slices) < MIN_SLICES else ""


def _count_alike(orientations: Sequence[np.ndarray]) -> list[int]:
    """Count the slices (each (6,)) of each orientation; what a rounding tells apart is one."""
    kinds: list[np.ndarray] = []
    counts: list[int] = []
    for orientation in orientations:
        alike = (number for number, kind in enumerate(kinds) if np.abs(kind - orientation).max() < SAME_TURN)
        number = next(alike, len(kinds))
        if number == len(kinds):
            kinds.append(orientation)
            counts.append(0)
        counts[number] += 1
    return counts


@locale_kept()
def read_dicom(folder: Path, series: Series | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Read the slices of a series.

    Args:
        folder: where they are.
        series: which; None: the one that there is.

    Returns:
        Voxels (X, Y, Z) float32 with the slices' scaling applied (CT: HU), and the affine (4, 4) float64 from
        voxel index to RAS position in mm.

    Raises:
        VolumeError: a slice cannot be read; slices that are missing, doubled, unevenly spaced, of several
            sizes, orientations or acquisitions in turn, or shifted against each other (a tilted gantry);
            without ``series``, what :func:`find_series` raises, and no series or several.
    """
    sitk = simple_itk(folder)
    if series is None:
        found, left_out = find_series(folder)
        left_out += [one.left_out(folder) for one in found if one.fault]
        found = [one for one in found if not one.fault]
        if len(found) != 1:
            what = f"{len(found)} DICOM series" if found else "a folder without a DICOM series of slices"
            names = [f"series {one.label}, {len(one.files)} slices" for one in found]
            raise VolumeError(folder, "; ".join([what, *names, *format_left_out(left_out, 3)]))
        (series,) = found
    slices = [_Image(folder / name, _read_tags(sitk, folder / name)) for name in series.files]
    for image in slices:
        if not image.tags:
            raise VolumeError(folder, f"{image.path.name}: {DAMAGED}")
    files, affine = _order(folder, slices)
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(files)
    reader.SetOutputPixelType(sitk.sitkFloat32)
    try:
        image = reader.Execute()
    except RuntimeError as error:
        raise VolumeError(folder, f"ITK cannot read it: {last_words(error)}") from error
    return to_xyz(folder, sitk.GetArrayViewFromImage(image)), affine


def _order(folder: Path, slices: Sequence[_Image]) -> tuple[list[str], np.ndarray]:
    """Order slices along their normal; returns their files and the affine (4, 4) of the volume, in RAS mm."""
    for tag, what in ((ORIENTATION, "orientations"), (PIXEL_SPACING, "pixel spacings")):
        values = np.array([image.numbers(tag) for image in slices])  # (N, 6) or (N, 2)
        if np.abs(values - values[0]).max() > 1e-3:
            raise VolumeError(folder, f"slices of several {what} in one DICOM series")
    sizes = {(image.tags.get(COLUMNS), image.tags.get(ROWS)) for image in slices}
    if len(sizes) > 1:
        raise VolumeError(folder, f"slices of several sizes in one DICOM series: {sorted(map(str, sizes))}")
    right, down = slices[0].numbers(ORIENTATION).reshape(2, 3)  # along a row, along a column
    between_rows, between_columns = slices[0].numbers(PIXEL_SPACING)
    normal = slices[0].normal()
    positions = np.array([image.numbers(POSITION) for image in slices])  # (N, 3)
    order = np.argsort(positions @ normal, kind="stable")
    positions, slices = positions[order], [slices[number] for number in order]
    steps = np.diff(positions, axis=0)  # (N - 1, 3)
    heights = steps @ normal  # (N - 1,)
    step = float(np.median(heights))
    if step <= 0 or heights.min() < SLICE_STEP * step:
        one, other = slices[heights.argmin()], slices[heights.argmin() + 1]
        same = one.tags.get(IMAGE_UID) == other.tags.get(IMAGE_UID)
        what = "the same image twice" if same else "several volumes in one series?"
        raise VolumeError(
            folder, f"several slices at one place, {one.path.name} and {other.path.name} ({what})"
        )
    # The slices of an MR are acquired in turns by nature.
    acquisitions = [image.tags.get(ACQUISITION, "") for image in slices if image.tags.get(MODALITY) != "MR"]
    turns = sum(one != other for one, other in pairwise(acquisitions))
    if turns >= len(set(acquisitions)) > 1:
        numbers = ", ".join(sorted(set(acquisitions))[:4])
        raise VolumeError(folder, f"the slices of several acquisitions ({numbers}) lie between each other")
    if np.abs(heights / step - 1).max() > SLICE_STEP:
        gaps = int((heights > 1.5 * step).sum())
        raise VolumeError(
            folder,
            f"slices are missing or unevenly spaced: {heights.min():.4g} to {heights.max():.4g} mm apart, "
            f"{step:.4g} mm as a rule" + (f", {gaps} gaps" if gaps else ""),
        )
    if (heights < TILT * np.linalg.norm(steps, axis=1)).any():
        raise VolumeError(
            folder, "the slices are shifted against each other (a tilted gantry); resample them first"
        )
    affine = np.eye(4)
    affine[:3, 0], affine[:3, 1] = right * between_columns, down * between_rows
    affine[:3, 2] = (positions[-1] - positions[0]) / (len(slices) - 1)
    affine[:3, 3] = positions[0]
    return [str(image.path) for image in slices], LPS_TO_RAS @ affine
