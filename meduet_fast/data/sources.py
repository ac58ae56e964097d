"""List the volumes that a user points at: folders, Decathlon lists, nnU-Net folders, manifests."""

from __future__ import annotations

import hashlib
import os
import re
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from meduet_fast.errors import UserError, VolumeError, printable
from meduet_fast.files import in_real_folder

from .dataset_json import Channel, read_description
from .dicom import SPREAD, Series, find_series
from .folders import ONE_DICOM, VOLUME_ENDINGS, LeftOut, ending_of, format_left_out, is_dicom, refusal, search
from .intensity import CT as CT
from .intensity import MR as MR
from .intensity import IntensityRule as IntensityRule
from .intensity import rule_of_modality

MAX_NAME = 100


@dataclass(frozen=True)
class VolumeEntry:
    """Name one volume of the input, not opened yet.

    Attributes:
        path: the file, or the folder of DICOM slices (it may turn out to be absent or bad when it is
            loaded).
        domain: the data set, i.e. the style class, it belongs to.
        body_part: as the user calls it.
        intensity: how its voxel values become [0, 1]; None: its values tell, when it is loaded.
        name: unique within the input; it can name a file. :func:`find_volumes` gives names of ASCII letters,
            digits, ``.``, ``_`` and ``-`` only.
        channel: position on the fourth axis of a file that holds several volumes; None: it holds one.
        series: the DICOM series in the folder.
    """

    path: Path
    domain: str
    body_part: str
    intensity: IntensityRule | None
    name: str
    channel: int | None = None
    series: Series | None = None

    def tell(self, reason: str) -> str:
        """Put before a reason what of the file or folder it is about, if that is not all of it."""
        if self.series is not None:
            return f"series {self.series.label}: {reason}"
        return reason if self.channel is None else f"channel {self.channel}: {reason}"


@dataclass(frozen=True)
class Listing:
    """Hold the volumes of an input, sorted by name, and what looks like one and is left out."""

    volumes: list[VolumeEntry]
    left_out: list[LeftOut]


class _Found(NamedTuple):
    """Volumes whose names are not unique yet, each with what tells it apart from the others of its name."""

    volumes: list[tuple[VolumeEntry, str]]
    left_out: list[LeftOut]


def find_volumes(
    input_path: Path | str,
    domain: str | None = None,
    intensity: IntensityRule | None = None,
    body_part: str = "unknown",
) -> Listing:
    """List the volumes of an input; no volume is opened, but the headers of DICOM slices are read.

    The input is one of

    - a file (an ending of VOLUME_ENDINGS, in capitals too), or a folder that is searched for them and for
      folders of DICOM slices, where each series is a volume; files that are hidden, or masks or label maps
      by their names, are left out;
    - a Decathlon/MONAI list (``.json``): all its lists, each of paths or of ``{"image": path}``; where
      "image" is a list of channel files, each file is a volume of its own, and where "modality" has several
      channels each channel of a 4D file;
    - an nnU-Net folder: ``dataset.json`` with "channel_names" and "file_ending", images in ``imagesTr`` and
      ``imagesTs`` or where its key "dataset" says; or with "modality" (version 1). Each channel file is a
      volume of its own;
    - a YAML manifest (``.yaml``, ``.yml``), or a folder with a ``manifest.yaml`` or
      ``manifest.yml``::

        datasets:
        - name: liver            # the domain
          path: liver/images     # any of the above, relative to this file
          body_part: abdomen     # optional, "unknown" if absent
          intensity: {ct_window: [-175, 250]}     # or {mr_percentile: [0.5, 99.5]}; optional

    A folder with a ``dataset.json`` is read by that file, and so is an ``images...`` folder beside one. Where
    no intensity rule is given, the modality that a ``dataset.json`` or a DICOM series states decides (CT: the
    CT window; MR, PET, ultrasound: MR percentiles); without one, the values of each volume.

    The result does not depend on how the path is written.

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
    input_path = Path(input_path)
    try:
        if not input_path.exists():
            raise UserError(f"{input_path}: no such file or folder")
        if manifest := _manifest_of(input_path):
            if domain is not None or intensity is not None:
                raise UserError(
                    f"{manifest}: a manifest states domains and intensity rules itself; give neither"
                )
            found = _read_manifest(manifest, body_part)
        else:
            found = _read_dataset(input_path, domain, intensity, body_part)
    except OSError as error:
        raise UserError(f"{error.filename or input_path}: cannot read: {error.strerror or error}") from error
    # Names that collide (also on a case-blind disk) get a part of a hash.
    counts = Counter(entry.name.casefold() for entry, _ in found.volumes)
    named = [
        replace(entry, name=f"{entry.name}-{hashlib.sha256(os.fsencode(key)).hexdigest()[:10]}")
        if counts[entry.name.casefold()] > 1
        else entry
        for entry, key in found.volumes
    ]
    return Listing(sorted(named, key=lambda entry: entry.name), found.left_out)


def _manifest_of(path: Path) -> Path | None:
    """Return the manifest that a path means, itself or a file in it."""
    files = [path / "manifest.yaml", path / "manifest.yml"] if path.is_dir() else [path]
    return next((file for file in files if file.is_file() and file.suffix in (".yaml", ".yml")), None)


def _read_dataset(path: Path, domain: str | None, intensity: IntensityRule | None, body_part: str) -> _Found:
    """List the volumes of one data set."""
    stated: str | None = None
    base = path if path.is_dir() else path.parent
    description = path / "dataset.json" if path.is_dir() else path
    real = Path(os.path.realpath(path))
    part = path.is_dir() and not description.is_file() and real.name.startswith("images")
    if part:
        description = real.parent / "dataset.json"
    listed = description.is_file() and description.suffix == ".json"
    if listed:
        read = read_description(description)
        volumes, left_out, stated = read.volumes, read.left_out, read.name
        base = description.parent
        if part:
            volumes = [volume for volume in volumes if _is_inside(volume.path, real)]
            left_out = [item for item in left_out if _is_inside(item.path, real)]
    elif path.is_dir():
        files, left_out = search(path)
        volumes = [Channel(file) for file in files]
    elif ending_of(path.name):
        reason = refusal(path)
        if reason:
            raise UserError(f"{path}: {reason}")
        volumes, left_out = [Channel(path)], []
        domain = domain or _stem(path.name)
    elif is_dicom(path):
        raise UserError(f"{path}: {ONE_DICOM}")
    else:
        raise UserError(
            f"{path}: expected a folder, a volume ({', '.join(VOLUME_ENDINGS)}), a list (.json) or a "
            "manifest (.yaml)"
        )
    volumes, others = _split_series(volumes, listed)
    left_out += others
    if not volumes:
        lines = "; ".join(format_left_out(left_out, 3))
        raise UserError(
            f"{path}: no volumes found in it (expected files ending in {', '.join(VOLUME_ENDINGS)}, or DICOM "
            f"folders){lines and '; '}{lines}"
        )
    domain = printable(domain or stated or base.resolve().name or "volumes")
    found = []
    alike = Counter(volume.path for volume in volumes)
    for volume in volumes:
        inside = _relative(volume.path, base)
        stem = _stem(inside.replace(os.sep, "-")) + ("" if volume.index is None else f"_{volume.index:04d}")
        text = domain if stem in (domain, ".") else f"{domain}-{stem}"
        series = volume.series if alike[volume.path] > 1 else None
        if series is not None:
            text += f"-{series.label}"
        name = re.sub(r"[^A-Za-z0-9._-]+", "_", text).lstrip("._-")[:MAX_NAME] or "volume"
        entry = VolumeEntry(
            volume.path, domain, printable(body_part), intensity or volume.rule, name, volume.index,
            volume.series,
        )  # fmt: skip
        found.append((entry, f"{domain}/{inside}:{volume.index if series is None else series.uid}"))
    return _Found(found, left_out)


def _split_series(volumes: list[Channel], listed: bool) -> tuple[list[Channel], list[LeftOut]]:
    """Put the series of each DICOM folder in its place, and leave out what else is in it.

    A folder without a series is left out as a whole; if the user's list names it, it is asked for. Where no
    list states a modality, the series' own decides.
    """
    split: list[Channel] = []
    left_out: list[LeftOut] = []
    found: list[tuple[Channel, list[Series], list[LeftOut]]] = []
    for volume in volumes:
        try:
            if volume.path.is_dir():
                found.append((volume, *find_series(volume.path)))
            else:
                split.append(volume)
        except VolumeError:  # reading says so
            split.append(volume)
    spread = _spread([(volume.path, one) for volume, series, _ in found for one in series])
    for volume, series, others in found:
        whole = [one for one in series if one.uid not in spread]
        others += [one.left_out(volume.path) for one in whole if one.fault]
        whole = [one for one in whole if not one.fault]
        split += [
            replace(volume, series=one, rule=volume.rule or rule_of_modality(one.modality)) for one in whole
        ]
        if not whole:
            others = [replace(item, asked=item.asked or listed) for item in others]
            if not others and not series:
                others = [LeftOut(volume.path, "a folder without a DICOM series of slices", listed)]
        left_out += others
    return split, [*left_out, *spread.values()]


def _spread(series: list[tuple[Path, Series]]) -> dict[str, LeftOut]:
    """Find the series, by UID, whose slices lie in several folders; copies of the same do not count."""
    places: dict[str, list[tuple[Path, Series]]] = {}
    for folder, one in series:
        if one.uid:
            places.setdefault(one.uid, []).append((folder, one))
    spread = {}
    for uid, parts in places.items():
        images = frozenset[str]().union(*(one.images for _, one in parts))
        if len(images) > max(len(one.images) for _, one in parts):
            where = Path(os.path.commonpath([folder for folder, _ in parts]))
            part = f"series {parts[0][1].label}, {len(images)} images in {len(parts)} folders"
            spread[uid] = LeftOut(where, SPREAD, asked=True, part=part)
    return spread


def _is_inside(path: Path, folder: Path) -> bool:
    return folder in path.parents or folder in in_real_folder(path).parents


def _relative(path: Path, base: Path) -> str:
    """Return a path as seen from the folder of its data set, whatever way either is written."""
    real = os.path.realpath(base)
    tries = ((path, base), (path, real), (in_real_folder(path), real))
    seen = [os.path.relpath(*pair) for pair in tries]
    return next((inside for inside in seen if not inside.startswith(os.pardir)), seen[-1])


def _read_manifest(path: Path, body_part: str) -> _Found:
    """List the data sets of a manifest; names are not unique yet."""
    text = path.read_bytes()
    try:
        content = yaml.safe_load(text)
    except Exception as error:  # dates and numbers that are none raise errors of many kinds
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
    datasets = content.get("datasets") if isinstance(content, dict) else None
    if not isinstance(datasets, list) or not datasets or set(content) != {"datasets"}:
        raise UserError(f"{path}: expected one key 'datasets' with a list of data sets")
    found = _Found([], [])
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
        if _manifest_of(source):
            raise UserError(f"{where}.path': {source} is a manifest; a manifest cannot list another")
        more = _read_dataset(source, item["name"], rule, item.get("body_part", body_part))
        found.volumes.extend(more.volumes)
        found.left_out.extend(more.left_out)
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
    return name.removesuffix(ending_of(name))
