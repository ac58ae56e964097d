"""List the volumes that a user points at: folders, Decathlon lists, nnU-Net folders, manifests."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import yaml

from meduet_fast.errors import UserError

NIFTI_ENDINGS = (".nii.gz", ".nii")
MAX_NAME = 100


@dataclass(frozen=True)
class IntensityRule:
    """Map voxel values to [0, 1]: linear between ``low`` and ``high``, clipped outside.

    Attributes:
        kind: "ct_window": the limits are Hounsfield units; "mr_percentile": they are percentiles (0 to 100)
            of the non-zero voxels of each volume.
        low: value that becomes 0.
        high: value that becomes 1.

    Raises:
        UserError: for an unknown kind, or limits that are out of order or (percentiles) out of range.
    """

    kind: Literal["ct_window", "mr_percentile"] = "ct_window"
    low: float = -175.0
    high: float = 250.0

    def __post_init__(self) -> None:
        if self.kind not in ("ct_window", "mr_percentile"):
            raise UserError(f"intensity rule: found {self.kind!r}, expected ct_window or mr_percentile")
        if not -float("inf") < self.low < self.high < float("inf"):
            raise UserError(
                f"{self.kind}: found [{self.low}, {self.high}], expected finite [low, high], low < high"
            )
        if self.kind == "mr_percentile" and not 0 <= self.low < self.high <= 100:
            raise UserError(
                f"mr_percentile: found [{self.low}, {self.high}], expected percentiles from 0 to 100"
            )


CT = IntensityRule("ct_window", -175.0, 250.0)
MR = IntensityRule("mr_percentile", 0.5, 99.5)


@dataclass(frozen=True)
class VolumeEntry:
    """Name one volume of the input, not opened yet.

    Attributes:
        path: the NIfTI file (it may turn out to be absent or bad when it is loaded).
        domain: the data set, i.e. the style class, it belongs to.
        body_part: as the user calls it.
        intensity: how its voxel values become [0, 1].
        name: unique within the input; it can name a file. :func:`find_volumes` gives names of ASCII letters,
            digits, ``.``, ``_`` and ``-`` only.
        channel: position on the fourth axis of a file that holds several volumes; None: it holds one.
    """

    path: Path
    domain: str
    body_part: str
    intensity: IntensityRule
    name: str
    channel: int | None = None


def find_volumes(
    input_path: Path,
    domain: str | None = None,
    intensity: IntensityRule | None = None,
    body_part: str = "unknown",
) -> list[VolumeEntry]:
    """List the volumes of an input, sorted by name; no volume is opened.

    The input is one of

    - a NIfTI file (``.nii``, ``.nii.gz``), or a folder that is searched for them, hidden ones left out;
    - a Decathlon/MONAI list (``.json``): "training", "validation" and "test", each a list of paths or of
      ``{"image": path}``; where "image" is a list of channel files, each file is a volume of its own;
    - an nnU-Net folder: ``dataset.json`` with "channel_names" and "file_ending", images in ``imagesTr`` and
      ``imagesTs``; each channel file is a volume of its own;
    - a YAML manifest (``.yaml``, ``.yml``), or a folder with a ``manifest.yaml``::

        datasets:
        - name: liver            # the domain
          path: liver/images     # any of the above, relative to this file
          body_part: abdomen     # optional, "unknown" if absent
          intensity: {ct_window: [-175, 250]}     # or {mr_percentile: [0.5, 99.5]}; optional

    A folder with a ``dataset.json`` is read by that file. Where no intensity rule is given, the modality that
    a ``dataset.json`` states decides ("CT": CT window, anything else: MR percentiles); without one it is the
    CT window.

    Args:
        input_path: the file or folder.
        domain: name of the data set; by default the "name" in a ``dataset.json``, else the folder's name. A
            manifest names its own.
        intensity: rule for all volumes. A manifest has its own.
        body_part: for volumes whose body part no manifest states.

    Raises:
        UserError: naming the file and the key, if the input is absent or unreadable, has nothing in it, or is
            not of the form above.
    """
    try:
        if not input_path.exists():
            raise UserError(f"{input_path}: no such file or folder")
        manifest = input_path / "manifest.yaml" if input_path.is_dir() else input_path
        if manifest.is_file() and manifest.suffix in (".yaml", ".yml"):
            if domain is not None or intensity is not None:
                raise UserError(
                    f"{manifest}: a manifest states domains and intensity rules itself; give neither"
                )
            found = _read_manifest(manifest, body_part)
        else:
            found = _read_dataset(input_path, domain, intensity, body_part)
    except OSError as error:
        raise UserError(f"{error.filename or input_path}: cannot read: {error.strerror or error}") from error
    # Names that collide (also on a case-blind disk) get a part of their path's hash.
    counts = Counter(entry.name.casefold() for entry in found)
    named = [
        replace(entry, name=f"{entry.name}-{hashlib.sha256(str(entry.path).encode()).hexdigest()[:10]}")
        if counts[entry.name.casefold()] > 1
        else entry
        for entry in found
    ]
    return sorted(named, key=lambda entry: entry.name)


def _read_dataset(
    path: Path, domain: str | None, intensity: IntensityRule | None, body_part: str
) -> list[VolumeEntry]:
    """List the volumes of one data set; names are not unique yet."""
    description = path / "dataset.json" if path.is_dir() else path
    stated: str | None = None
    base = path if path.is_dir() else path.parent
    if path.is_file() and path.name.endswith(NIFTI_ENDINGS):
        files = {path: CT}
        domain = domain or _stem(path.name)
    elif description.is_file() and description.suffix == ".json":
        files, stated = _read_description(description)
        base = description.parent
    elif path.is_dir():
        files = dict.fromkeys(_walk(path), CT)
    else:
        raise UserError(
            f"{path}: expected a folder, a NIfTI file (.nii, .nii.gz), a list (.json) or a manifest (.yaml)"
        )
    if not files:
        raise UserError(f"{path}: no volumes found in it (expected files ending in .nii or .nii.gz)")
    domain = domain or stated or base.resolve().name
    found = []
    for file, rule in files.items():
        stem = _stem(os.path.relpath(file, base).replace(os.sep, "-"))
        text = domain if stem == domain else f"{domain}-{stem}"
        name = re.sub(r"[^A-Za-z0-9._-]+", "_", text).lstrip("._-")[:MAX_NAME] or "volume"
        found.append(VolumeEntry(file, domain, body_part, intensity or rule, name))
    return found


def _walk(folder: Path) -> list[Path]:
    """List all NIfTI files below a folder; links to folders are followed, real folders visited once."""

    def fail(error: OSError) -> None:
        raise error

    found: list[Path] = []
    visited: set[str] = set()
    for root, folders, files in os.walk(folder, onerror=fail, followlinks=True):
        real = os.path.realpath(root)
        if real in visited:
            folders.clear()
            continue
        visited.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        found += [
            Path(root, name)
            for name in sorted(files)
            if name.endswith(NIFTI_ENDINGS) and not name.startswith(".")
        ]
    return found


def _read_description(path: Path) -> tuple[dict[Path, IntensityRule], str | None]:
    """Read files with their rules, and the data set's name, from a Decathlon or nnU-Net ``dataset.json``."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: found a {type(content).__name__}, expected an object with a key 'training'")
    stated = content.get("name")
    if "channel_names" in content:
        files = _nnunet_files(path, content)
    elif any(key in content for key in _DECATHLON_LISTS):
        files = _decathlon_files(path, content)
    else:
        raise UserError(
            f"{path}: found the keys {sorted(content)}, "
            "expected 'training' (Decathlon) or 'channel_names' (nnU-Net)"
        )
    return files, stated if isinstance(stated, str) and stated else None


_DECATHLON_LISTS = ("training", "validation", "test")


def _decathlon_files(path: Path, content: dict[str, Any]) -> dict[Path, IntensityRule]:
    modality = content.get("modality")
    channels = list(modality.values()) if isinstance(modality, dict) else [modality or "CT"]
    rule = CT if all(_is_ct(channel) for channel in channels) else MR
    files: dict[Path, IntensityRule] = {}
    for key in _DECATHLON_LISTS:
        items = content.get(key, [])
        if not isinstance(items, list):
            raise UserError(f"{path}: '{key}': found a {type(items).__name__}, expected a list")
        for number, item in enumerate(items):
            image = item.get("image") if isinstance(item, dict) else item
            for file in image if isinstance(image, list) and image else [image]:
                if not isinstance(file, str) or not file:
                    raise UserError(
                        f"{path}: '{key}[{number}]': found {item!r}, expected a path or {{'image': path}}"
                    )
                files[path.parent / file] = rule
    return files


def _nnunet_files(path: Path, content: dict[str, Any]) -> dict[Path, IntensityRule]:
    channels = content["channel_names"]
    if not isinstance(channels, dict) or not channels:
        raise UserError(
            f"{path}: 'channel_names': found {channels!r}, expected an object such as {{'0': 'CT'}}"
        )
    ending = content.get("file_ending")
    if ending not in NIFTI_ENDINGS:
        raise UserError(
            f"{path}: 'file_ending': found {ending!r}, expected one of {', '.join(NIFTI_ENDINGS)}"
        )
    folders = [path.parent / name for name in ("imagesTr", "imagesTs") if (path.parent / name).is_dir()]
    files: dict[Path, IntensityRule] = {}
    for file in (file for folder in folders for file in _walk(folder) if file.name.endswith(ending)):
        match = re.search(r"_(\d{4})$", file.name[: -len(ending)])
        channel = str(int(match[1])) if match else None
        if channel not in channels:
            expected = ", ".join(f"_{int(key):04d}" for key in channels if str(key).isdecimal())
            raise UserError(f"{file}: the name states no channel of {path} (expected case{expected}{ending})")
        files[file] = CT if _is_ct(channels[channel]) else MR
    return files


def _is_ct(modality: Any) -> bool:
    return isinstance(modality, str) and modality.strip().upper() == "CT"


def _read_manifest(path: Path, body_part: str) -> list[VolumeEntry]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
    datasets = content.get("datasets") if isinstance(content, dict) else None
    if not isinstance(datasets, list) or not datasets or set(content) != {"datasets"}:
        raise UserError(f"{path}: expected one key 'datasets' with a list of data sets")
    found: list[VolumeEntry] = []
    names: set[str] = set()
    for number, item in enumerate(datasets):
        where = f"{path}: 'datasets[{number}]"
        if not isinstance(item, dict):
            raise UserError(f"{where}': found {item!r}, expected name, path, body_part and intensity")
        for key in item:
            if key not in ("name", "path", "body_part", "intensity"):
                raise UserError(f"{where}.{key}': unknown key, expected name, path, body_part or intensity")
        for key in ("name", "path", "body_part"):
            value = item.get(key)
            if (key in item or key != "body_part") and (not isinstance(value, str) or not value):
                raise UserError(f"{where}.{key}': found {value!r}, expected a text")
        if item["name"] in names:
            raise UserError(
                f"{where}.name': {item['name']!r} is used twice, every data set is a domain of its own"
            )
        names.add(item["name"])
        rule = _parse_rule(item["intensity"], f"{where}.intensity'") if "intensity" in item else None
        source = path.parent / item["path"]
        if not source.exists():
            raise UserError(f"{where}.path': no such file or folder: {source}")
        if source.suffix in (".yaml", ".yml") or (source / "manifest.yaml").is_file():
            raise UserError(f"{where}.path': {source} is a manifest; a manifest cannot list another")
        found += _read_dataset(source, item["name"], rule, item.get("body_part", body_part))
    return found


def _parse_rule(value: Any, where: str) -> IntensityRule:
    expected = "expected {ct_window: [low, high]} in HU or {mr_percentile: [low, high]}"
    if not isinstance(value, dict) or len(value) != 1:
        raise UserError(f"{where}: found {value!r}, {expected}")
    ((kind, limits),) = value.items()
    numbers = isinstance(limits, list) and all(type(limit) in (int, float) for limit in limits)
    if kind not in ("ct_window", "mr_percentile") or not numbers or len(limits) != 2:
        raise UserError(f"{where}: found {value!r}, {expected}")
    try:
        return IntensityRule(kind, float(limits[0]), float(limits[1]))
    except UserError as error:
        raise UserError(f"{where}: {error}") from error


def _stem(name: str) -> str:
    return next((name[: -len(ending)] for ending in NIFTI_ENDINGS if name.endswith(ending)), name)
