"""Read the ``dataset.json`` of Decathlon, MONAI and nnU-Net: which files, which channels, which modality."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from meduet_fast.errors import UserError
from meduet_fast.files import in_real_folder

from .dicom import Series
from .folders import (
    IS_LABEL,
    VOLUME_ENDINGS,
    LeftOut,
    ending_of,
    is_label,
    is_there,
    looks_like_volume,
    refusal,
    search,
)
from .intensity import IntensityRule, rule_of_modality

_USUAL_LISTS = ("training", "validation", "test", "train", "val", "testing")
_NO_LISTS = ("labels", "channel_names", "modality", "dataset")  # keys that say other things
_LABELS = re.compile(r"(?<!un)label(?!l?ed)|mask(?!ed)|seg(?!mented)|annotat|truth|\b(gt|roi)\b")
_CHANNEL = re.compile(r"(.+)_(\d{4})")


@dataclass(frozen=True)
class Channel:
    """Name one volume of a data set: a file, a DICOM folder, or a channel of a 4D file.

    Attributes:
        path: the file or folder.
        rule: that the stated modality asks for; None where none is stated or known.
        index: on the fourth axis of the file; None for a file with one volume.
        series: of a DICOM folder.
    """

    path: Path
    rule: IntensityRule | None = None
    index: int | None = None
    series: Series | None = None


@dataclass
class Description:
    """Hold what a ``dataset.json`` says.

    Attributes:
        name: of the data set, as the file states it.
        volumes: what is to be read, each once; files may be absent.
        left_out: what is not.
    """

    name: str | None
    volumes: list[Channel] = field(default_factory=list)
    left_out: list[LeftOut] = field(default_factory=list)
    _taken: set[tuple[Path, int | None]] = field(default_factory=set)
    _files: set[Path] = field(default_factory=set)

    def take(self, volume: Channel, asked: bool = True) -> None:
        """Add a volume, or what speaks against it; one that is listed twice counts once."""
        path = _header_of(volume.path)
        file = in_real_folder(path)
        if (file, volume.index) in self._taken:
            return
        self._taken.add((file, volume.index))
        self._files.add(file)
        try:
            reason = refusal(path)
        except OSError as error:  # of this name alone: too long, in a closed folder, on a disk that fails
            reason = f"cannot be read: {error.strerror or error}"
        if reason:
            self.left_out.append(LeftOut(path, reason, asked))
        else:
            self.volumes.append(Channel(path, volume.rule, volume.index))

    def has(self, path: Path) -> bool:
        """Tell whether a file has been added."""
        return in_real_folder(path) in self._files


def read_description(path: Path) -> Description:
    """Read a ``dataset.json``; volumes are not opened.

    Raises:
        UserError: it is no JSON, or has no list of images.
        OSError: it, or a folder that it describes, cannot be read.
    """
    try:
        content = json.loads(path.read_bytes())  # any of the UTFs, with a byte-order mark or without
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: found a {type(content).__name__}, expected an object with a key 'training'")
    name = content.get("name")
    description = Description(name if isinstance(name, str) and name else None)
    if "channel_names" in content:
        _read_nnunet(path, content, description)
    else:
        _read_lists(path, content, description)
    return description


def _channels(content: dict[str, Any]) -> dict[int, IntensityRule | None]:
    """Return the rule of each channel by its number; empty where the modality is not stated."""
    key = "channel_names" if "channel_names" in content else "modality"
    stated = content.get(key)
    if isinstance(stated, str):
        return {0: rule_of_modality(stated)}
    if isinstance(stated, list):
        return {number: rule_of_modality(text) for number, text in enumerate(stated)}
    if isinstance(stated, dict):
        numbered = all(str(number).isdecimal() for number in stated)
        keys = [int(number) for number in stated] if numbered else range(len(stated))
        return {number: rule_of_modality(text) for number, text in zip(keys, stated.values(), strict=True)}
    return {}


def _shared(channels: dict[int, IntensityRule | None]) -> IntensityRule | None:
    """Return the rule of a file that may be of any of the channels."""
    rules = set(channels.values())
    return rules.pop() if len(rules) == 1 else None


def _read_lists(path: Path, content: dict[str, Any], description: Description) -> None:
    """Add the images of every list in a Decathlon or MONAI file, or an nnU-Net version 1 folder."""
    lists = dict(_lists(content, ""))
    for key in _USUAL_LISTS:
        if key in content and not any(found.split(".")[0] == key for found in lists):
            raise UserError(f"{path}: '{key}': found a {type(content[key]).__name__}, expected a list")
    if not lists:
        raise UserError(
            f"{path}: found the keys {sorted(content)}, "
            "expected 'training' (Decathlon) or 'channel_names' (nnU-Net)"
        )
    channels = _channels(content)
    cases = [files for key in lists for files in _images(path, key, lists, description)]
    version_1 = any(len(files) == 1 and _numbered_files(files[0], channels) for files in cases)
    for files in cases:
        if len(files) > 1:
            in_order = len(files) == len(channels)
            for index, file in enumerate(files):
                description.take(Channel(file, channels.get(index) if in_order else _shared(channels)))
        elif version_1 and not is_there(files[0]):
            numbered = _numbered_files(files[0], channels) or _numbers(files[0], channels)
            for index, file in numbered.items():
                description.take(Channel(file, channels.get(index)))
        elif len(channels) > 1 and content.get("tensorImageSize") != "3D":
            for index, rule in channels.items():
                description.take(Channel(files[0], rule, index))
        else:
            description.take(Channel(files[0], _shared(channels)))
    _name_the_rest(path, description, "in none of the lists")
    if "training" in lists:
        _count_cases(path, content, len(lists["training"]), description)


def _count_cases(path: Path, content: dict[str, Any], there: int, description: Description) -> None:
    stated = content.get("numTraining")
    if isinstance(stated, int) and there < stated:
        reason = f"'numTraining' states {stated} cases, found {there}"
        description.left_out.append(LeftOut(path, reason, asked=True))


def _images(
    path: Path, key: str, lists: dict[str, list[Any]], description: Description
) -> Iterator[list[Path]]:
    """Yield the image files of each item of one of the lists; what is none is left out."""
    items = lists[key]
    with_images = any(isinstance(item, dict) and "image" in item for item in items)
    if _LABELS.search(key.casefold()) and not with_images:
        reason = f"'{key}' is a list of labels by its name"
        images = [others for name, others in lists.items() if not _LABELS.search(name.casefold())]
        sure = _are_labels(items, images)
        reason += "" if sure else "; if it is one of scans, give it another name"
        description.left_out.append(LeftOut(path, reason, asked=not sure))
        return
    for number, item in enumerate(items):
        where = f"{key}[{number}]"
        image = item.get("image") if isinstance(item, dict) else item
        texts = _texts(image if isinstance(image, list) else [image])
        if not texts:
            reason = f"'{where}': found {item!r:.200}, expected a path or {{'image': path}}"
            description.left_out.append(LeftOut(path, reason, asked=True))
        elif files := _all_located(path, where, texts, description):
            yield files
        for other, value in item.items() if texts and isinstance(item, dict) else ():
            if (
                other != "image"
                and not _LABELS.search(other.casefold())
                and any(map(_is_image, value if isinstance(value, list) else [value]))
            ):
                reason = f"'{where}.{other}': found {value!r:.200}; only 'image' is read"
                description.left_out.append(LeftOut(path, reason, asked="image" in other.casefold()))


def _are_labels(items: list[Any], images: list[list[Any]]) -> bool:
    """Tell whether a list has a label for each image of another, or of all, or names of labels alone."""
    counts = [len(others) for others in images]
    if len(items) in (*counts, sum(counts)):
        return True
    paths = [Path(item.replace("\\", "/")) for item in items if isinstance(item, str)]
    return len(paths) == len(items) and all(is_label(Path(*path.parts[-2:])) for path in paths)


def _lists(content: dict[str, Any], prefix: str) -> Iterator[tuple[str, list[Any]]]:
    """Yield every list of images by its key, ``folds.0`` for one inside another object."""
    for key, value in content.items():
        if isinstance(value, dict) and key not in _NO_LISTS:
            yield from _lists(value, f"{prefix}{key}.")
        elif isinstance(value, list) and (key in _USUAL_LISTS or any(map(_is_image, value))):
            yield f"{prefix}{key}", value


def _is_image(item: Any) -> bool:
    if isinstance(item, dict):
        return any(_is_image(value) for value in item.values() if isinstance(value, str)) or "image" in item
    return isinstance(item, str) and looks_like_volume(item)


def _texts(value: Any) -> list[str]:
    """Return a list of texts that are not empty; nothing if it is anything else."""
    usable = isinstance(value, list) and all(isinstance(text, str) and text for text in value)
    return value if usable else []


def _all_located(path: Path, where: str, texts: list[str], description: Description) -> list[Path]:
    """Return the files that a list means; none, and one left out, if a text can name no file."""
    for text in texts:
        file = path.parent / text
        try:
            if not file.name:
                raise ValueError("no file name")
            file.stat()
        except (FileNotFoundError, NotADirectoryError):
            pass  # reading will say so
        except (OSError, ValueError) as error:
            reason = f"'{where}': found {text!r:.200}: {getattr(error, 'strerror', None) or error}"
            description.left_out.append(LeftOut(path, reason, asked=True))
            return []
    return [_located(path.parent, text) for text in texts]


def _located(folder: Path, file: str) -> Path:
    """Return the path that a list means, relative to its folder; Windows wrote some lists."""
    path = folder / file
    return path if "\\" not in file or is_there(path) else folder / file.replace("\\", "/")


def _header_of(path: Path) -> Path:
    """Return the header of an .hdr/.img pair that is named by its image."""
    match = re.fullmatch(r"(.+)\.img(\.gz)?", path.name, re.IGNORECASE)
    endings = (".hdr", ".HDR", ".hdr.gz", ".HDR.GZ")
    headers = [path.with_name(f"{match[1]}{ending}") for ending in endings] if match else []
    return next((header for header in headers if is_there(header)), path)


def _numbered_files(path: Path, channels: dict[int, IntensityRule | None]) -> dict[int, Path]:
    """Return the channel files that nnU-Net version 1 means by a case that it lists, by number.

    It lists ``case.nii.gz``, which is not there, and keeps ``case_0000.nii.gz``, ``case_0001.nii.gz``, ...
    If some of the stated channels are there, all count.
    """
    files = _numbers(path, channels or dict.fromkeys(range(10)))
    there = {number: file for number, file in files.items() if is_there(file)}
    return {} if is_there(path) or not there else files if channels else there


def _numbers(path: Path, channels: dict[int, IntensityRule | None]) -> dict[int, Path]:
    ending = ending_of(path.name)
    stem = path.name.removesuffix(ending)
    return {n: path.with_name(f"{stem}_{n:04d}{ending or '.nii.gz'}") for n in channels or (0,)}


def _read_nnunet(path: Path, content: dict[str, Any], description: Description) -> None:
    """Add every channel file of an nnU-Net version 2 folder, or those of its ``dataset`` key."""
    if not isinstance(content["channel_names"], dict) or not content["channel_names"]:
        raise UserError(
            f"{path}: 'channel_names': found {content['channel_names']!r}, "
            "expected an object such as {'0': 'CT'}"
        )
    channels = _channels(content)
    ending = content.get("file_ending", ".nii.gz")
    if not isinstance(ending, str) or ending.casefold() not in VOLUME_ENDINGS:
        raise UserError(
            f"{path}: 'file_ending': found {ending!r}, expected one of {', '.join(VOLUME_ENDINGS)}"
        )
    listed = content.get("dataset", {})
    if not isinstance(listed, dict):
        raise UserError(f"{path}: 'dataset': found a {type(listed).__name__}, expected an object of cases")
    for case, item in listed.items():
        files = _texts(item.get("images") if isinstance(item, dict) else None)
        if not files:
            reason = f"'dataset.{case}': found {item!r:.200}, expected {{'images': [paths]}}"
            description.left_out.append(LeftOut(path, reason, asked=True))
            continue
        for number, file in enumerate(_all_located(path, f"dataset.{case}", files, description)):
            description.take(Channel(file, channels.get(number)))
        if len(files) < len(channels):
            reason = f"'dataset.{case}': 'channel_names' has {len(channels)} channels, found {len(files)}"
            description.left_out.append(LeftOut(path, reason, asked=True))
    cases: dict[tuple[Path, str], dict[int, Path]] = {}
    for folder in _image_folders(path):
        if listed and folder.name == "imagesTr":
            continue
        found, left_out = search(folder)
        # What has a channel's name is an image, whatever else its name says.
        named = [item for item in left_out if item.reason == IS_LABEL and item.path.parent == folder]
        named = [item for item in named if _channel_of(item.path, ending, channels)]
        description.left_out += [item for item in left_out if item not in named]
        for file in sorted([*found, *(item.path for item in named)]):
            channel = _channel_of(file, ending, channels)
            if not file.name.casefold().endswith(ending.casefold()):
                reason = f"{path.name} states the ending {ending}"
                description.left_out.append(LeftOut(file, reason))
            elif channel is None:
                expected = ", ".join(f"_{number:04d}" for number in sorted(channels))
                reason = f"the name states no channel of {path.name} (expected case{expected}{ending})"
                description.left_out.append(LeftOut(file, reason))
            else:
                cases.setdefault((file.parent, channel[0]), {})[channel[1]] = file
    for (folder, case), numbered in cases.items():
        for number, rule in channels.items():
            if number in numbered:
                description.take(Channel(numbered[number], rule))
            else:
                reason = f"not there, although {path.name} describes channel {number}"
                absent = folder / f"{case}_{number:04d}{ending}"
                description.left_out.append(LeftOut(absent, reason, asked=True))
    if listed:
        _name_the_rest(path, description, "not in the key 'dataset'")
    there = sum(folder.name == "imagesTr" for folder, _ in cases) if not listed else len(listed)
    _count_cases(path, content, there, description)
    lists = dict(_lists(content, ""))  # of version 1, whose cases have the names of their files
    for key in lists:
        for case_files in _images(path, key, lists, description):
            for file in case_files:
                if not any(map(description.has, (file, *_numbers(file, channels).values()))):
                    reason = f"'{key}' lists it, and it is none of the images that {path.name} describes"
                    description.left_out.append(LeftOut(file, reason, asked=True))


def _channel_of(file: Path, ending: str, channels: Collection[int]) -> tuple[str, int] | None:
    """Return the case and the channel that a file's name states, if it has the ending."""
    match = _CHANNEL.fullmatch(file.name.removesuffix(ending_of(file.name)))
    if not match or int(match[2]) not in channels or not file.name.casefold().endswith(ending.casefold()):
        return None
    return match[1], int(match[2])


def _image_folders(path: Path) -> list[Path]:
    return sorted(folder for folder in path.parent.glob("images*") if folder.is_dir())


def _name_the_rest(path: Path, description: Description, reason: str) -> None:
    """Leave out what lies in the image folders beside a ``dataset.json`` and is not listed there."""
    for folder in _image_folders(path):
        found, left_out = search(folder)
        description.left_out += [item for item in left_out if not description.has(item.path)]
        named = {item.path for item in description.left_out}
        description.left_out += [
            LeftOut(file, reason) for file in found if not description.has(file) and file not in named
        ]
