"""Find the volumes below a folder, and name what looks like one and is left out."""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from meduet_fast.errors import install_hint, printable

from .itk_formats import ITK_ENDINGS

# Read, in capitals too; of a scan in two forms the first. An .hdr has its .img beside it.
VOLUME_ENDINGS = (".nii.gz", ".nii", ".hdr", ".hdr.gz", *ITK_ENDINGS)
DICOM_ENDINGS = (".dcm", ".dicom", ".ima")
ITK_MISSING = f"needs ITK to be read: {install_hint('itk')}"
NOT_READ = "of a format that is not read"
IS_LABEL = "by its name a mask or label map; if it is a scan, name it in a list or a manifest"
ONE_DICOM = "one DICOM file: name its folder"
BARE_DICOM = "DICOM without the 132 bytes that a file begins with; a DICOM tool can rewrite it"
HIDDEN = "hidden"

# Not read, but there may be a scan in it.
_OTHER_FORMAT = re.compile(
    r".*\.(img|nhdr|npy|npz|mgz|mgh|mnc|minc|mif|mih|nia|niigz|dcm|dicom|ima|par|rec|brik|gipl|vti|vtk|vol|isq|"
    r"tiff?|czi|lsm|svs|jp2|h5|hdf5|mat|zarr|raw|zip|tar|tgz|7z|rar|gz|bz2|xz|zst|(nii|mha|nrrd)[^a-z0-9].*)"
)
_SIDECAR = re.compile(
    r".*\.(json|txt|md5|sha\d+|csv|tsv|ya?ml|xml|png|jpe?g|log|html|bvals?|bvecs?)(\.(gz|bz2|xz|zst))?"
)
# Of a volume, its header beside it.
_PART = re.compile(r"(.+)\.(img|img\.gz|raw|raw\.gz|zraw|rec)", re.IGNORECASE)
_HEADERS, _IMAGES = (".hdr", ".hdr.gz", ".mhd", ".par"), (".img", ".img.gz")

_LABEL_WORD = re.compile(
    r"[a-z]*(seg|segmentation|mask|label|labelmap|lbl|parcellation|annotation|groundtruth)s?\d*|gtv\d*"
)
_LABEL_FOLDER = re.compile(
    r"(labels?|masks?|segs?|segmentations?|annotations?|rois?|ground_?truths?|gt|gt_?fine|gt_?coarse)"
    r"[_-]?(tr|ts|te|va|val|train|training|test|testing|validation|final)?\d*"
    r"|.+[_-](labels?|masks?|segs?|segmentations)"
)


@dataclass(frozen=True)
class LeftOut:
    """Name something that may be a volume, and say why it is left out.

    Attributes:
        path: the file or folder.
        reason: why; the same text for all of a kind.
        asked: it should have been read: the user's own list asks for it, or it is a damaged slice.
        part: what of the file or folder, if not all of it.
    """

    path: Path
    reason: str
    asked: bool = False
    part: str = ""


def format_left_out(left_out: Iterable[LeftOut], shown: int = 5) -> list[str]:
    """Return a line for each of the first ``shown`` that share a reason, and one that counts the others."""
    kinds: dict[str, list[str]] = {}
    for item in left_out:
        kinds.setdefault(item.reason, []).append(f"{item.path}{item.part and ': '}{item.part}")
    lines = []
    for reason, names in kinds.items():
        lines += [f"left out: {printable(name)}: {printable(reason)}" for name in names[:shown]]
        if len(names) > shown:
            lines.append(f"left out: and {len(names) - shown} more: {printable(reason)}")
    return lines


def ending_of(name: str) -> str:
    """Return which of VOLUME_ENDINGS a file's name has, as it is written there; "" for none."""
    folded = name.casefold()
    return next((name[-len(ending) :] for ending in VOLUME_ENDINGS if folded.endswith(ending)), "")


def looks_like_volume(name: str) -> bool:
    """Tell whether a file of this name may be a volume, of a format that is read or not."""
    folded = name.casefold()
    return bool(ending_of(name) or (_OTHER_FORMAT.fullmatch(folded) and not _SIDECAR.fullmatch(folded)))


def is_there(path: Path) -> bool:
    """Tell whether a file or folder exists; False where it cannot be looked at, as by too long a name."""
    try:
        return path.exists()
    except OSError:
        return False


def refusal(path: Path) -> str | None:
    """Say why a file or folder is not read as a volume; None if it is (it may still be absent or damaged).

    Raises:
        OSError: it is there and cannot be looked at.
    """
    if path.is_dir():
        if not _has_dicom(path):
            return "a folder without DICOM files"
        return None if _has_itk() else ITK_MISSING
    if path.exists() and not path.is_file():
        return "not a regular file"
    ending = ending_of(path.name).casefold()
    if ending in ITK_ENDINGS:
        return None if _has_itk() else ITK_MISSING
    stem = path.name.removesuffix(ending_of(path.name))
    if ending.startswith(".hdr") and path.exists() and not _beside(path, stem, _IMAGES):
        return "a header without its .img file"
    return None if ending else ONE_DICOM if is_dicom(path) else NOT_READ


def search(folder: Path) -> tuple[list[Path], list[LeftOut]]:
    """Find the volumes below a folder, at any depth; of DICOM series, their folder.

    Links to folders are followed, real folders visited once. Only files that may be DICOM are opened.

    Returns:
        The volumes, and what looks like one but is hidden, a mask or label map by its name, the same scan in
        another form, or of a format that is not read.

    Raises:
        OSError: a folder cannot be listed, or a file not opened.
    """
    found: list[Path] = []
    left_out: list[LeftOut] = []
    for root, names in _walk(folder):
        below = root.relative_to(folder)
        hidden = any(part.startswith(".") for part in below.parts)
        labels = _is_of_labels(below)
        stems: set[str] = set()
        torn: list[Path] = []
        dicom = False
        for name in sorted(names, key=_preference):
            path, stem = root / name, name.removesuffix(ending_of(name))
            if not ending_of(name):
                may_be = _may_be_dicom(name)
                if may_be and is_dicom(path):
                    dicom = True
                elif hidden:
                    continue
                elif may_be and _is_bare_dicom(path):
                    left_out.append(LeftOut(path, BARE_DICOM))
                elif is_torn_dicom(path):
                    torn.append(path)
                elif looks_like_volume(name) and not _is_part(path):
                    left_out.append(LeftOut(path, NOT_READ))
            elif hidden or name.startswith("."):
                left_out.append(LeftOut(path, HIDDEN))
            elif is_label(below / name):
                left_out.append(LeftOut(path, IS_LABEL))
            elif reason := refusal(path):
                left_out.append(LeftOut(path, reason))
            elif stem in stems:
                left_out.append(LeftOut(path, "the file of the same name beside it is taken"))
            else:
                stems.add(stem)
                found.append(path)
        if dicom:
            reason = HIDDEN if hidden else IS_LABEL if labels else None if _has_itk() else ITK_MISSING
            if reason:
                left_out.append(LeftOut(root, reason))
            else:  # reading its headers names what is torn
                found.append(root)
                torn.clear()
        left_out += [LeftOut(path, NOT_READ) for path in torn if looks_like_volume(path.name)]
    return sorted(found), sorted(left_out, key=lambda item: item.path)


def _walk(folder: Path) -> Iterator[tuple[Path, list[str]]]:
    """Yield every folder with the names of its files; a folder that is a volume (.zarr) counts as a file."""

    def fail(error: OSError) -> None:
        raise error

    visited: set[str] = set()
    for root, folders, files in os.walk(folder, onerror=fail, followlinks=True):
        real = os.path.realpath(root)
        if real in visited:
            folders.clear()
            continue
        visited.add(real)
        packed = [name for name in folders if name.casefold().endswith(".zarr")]
        folders[:] = sorted(name for name in folders if name != ".git" and name not in packed)
        yield Path(root), files + packed


def _preference(name: str) -> tuple[int, str]:
    ending = ending_of(name).casefold()
    return (VOLUME_ENDINGS.index(ending) if ending else len(VOLUME_ENDINGS)), name


def is_label(path: Path) -> bool:
    """Tell whether a file is a mask or label map by its name, or by those of the folders in the path."""
    return _is_of_labels(path.parent) or _says_label(path.name.removesuffix(ending_of(path.name)))


def _is_of_labels(folder: Path) -> bool:
    return any(_LABEL_FOLDER.fullmatch(part.casefold()) for part in folder.parts)


def _says_label(stem: str) -> bool:
    apart = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", stem).casefold()  # brainMask is two words
    words = [word for word in re.split(r"[^a-z0-9]+", apart) if word and not word.isdigit()]
    return any(map(_LABEL_WORD.fullmatch, words)) or (bool(words) and words[-1] in ("gt", "roi", "rois"))


def _is_part(path: Path) -> bool:
    """Tell whether a file holds the voxels of a header beside it."""
    part = _PART.fullmatch(path.name)
    return part is not None and _beside(path, part[1], _HEADERS)


def _beside(path: Path, stem: str, endings: tuple[str, ...]) -> bool:
    """Tell whether a file of this stem is there with one of the endings, in small letters or capitals."""
    names = [stem + text for ending in endings for text in (ending, ending.upper())]
    return any(is_there(path.with_name(name)) for name in names)


def _may_be_dicom(name: str) -> bool:
    suffix = Path(name).suffix.casefold()
    known = suffix in ("", *DICOM_ENDINGS) or suffix[1:].isdigit()
    return known and name.casefold() != "dicomdir" and not name.startswith(".")


def is_dicom(path: Path) -> bool:
    """Tell whether a file begins as DICOM files do: 128 bytes of anything, then DICM."""
    if not path.is_file():
        return False
    with path.open("rb") as stream:
        return stream.read(132)[128:] == b"DICM"


def is_torn_dicom(path: Path) -> bool:
    """Tell whether a file is DICOM by its name, and does not begin so; without an ending, if it is blank."""
    if not (_may_be_dicom(path.name) and path.is_file()) or is_dicom(path) or _is_bare_dicom(path):
        return False
    if path.suffix.casefold() in DICOM_ENDINGS:
        return True
    with path.open("rb") as stream:
        blank = not stream.read(132).strip(b"\0")
    return blank and any(map(str.isdigit, path.name))


def _is_bare_dicom(path: Path) -> bool:
    """Tell whether a file begins with the first element of a DICOM data set."""
    if not path.is_file():
        return False
    with path.open("rb") as stream:
        begin = stream.read(8)  # group, element, then a type and a length of 2 bytes, or a length of 4
    if len(begin) < 8 or begin[:2] not in (b"\2\0", b"\b\0") or begin[3]:
        return False
    kind = begin[4:6]
    return (kind.isalpha() and kind.isupper()) or int.from_bytes(begin[4:], "little") < 256


def _has_dicom(folder: Path) -> bool:
    return any(_may_be_dicom(path.name) and is_dicom(path) for path in sorted(folder.iterdir()))


def _has_itk() -> bool:
    return importlib.util.find_spec("SimpleITK") is not None
