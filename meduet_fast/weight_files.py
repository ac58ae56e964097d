"""Read weights that any program wrote, in whatever they are wrapped. No code that a file brings is run.

A file is known by its content, not by its name: safetensors, or what ``torch.save`` wrote. Anything else is
named in one line: pointers, web pages and errors saved in place of a download, archives, other formats.
"""

from __future__ import annotations

import json
import re
import stat
import warnings
import zipfile
from argparse import Namespace
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor

from .errors import UserError

MODEL_FILE = "model.safetensors"  # in a folder that `meduet-fast export` wrote, and many others
METADATA = "__metadata__"  # what a safetensors file says of itself, beside its tensors
# Parts of names that come from what was around a module when it was saved.
_AROUND = ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module")
_SUFFIXES = (".safetensors", ".pt", ".pth", ".ckpt", ".bin")
_DEEPEST = 50  # mappings within mappings; some contain themselves

# First bytes of what is taken for a file of weights now and then.
_FORMATS = {
    b"\x89HDF\r\n\x1a\n": "an HDF5 file (Keras, TensorFlow)",
    b"\x1f\x8b": "a gzip archive; unpack it",
    b"BZh": "a bzip2 archive; unpack it",
    b"\xfd7zXZ\x00": "an xz archive; unpack it",
    b"\x28\xb5\x2f\xfd": "a zstd archive; unpack it",
    b"7z\xbc\xaf\x27\x1c": "a 7z archive; unpack it",
    b"Rar!": "a RAR archive; unpack it",
    b"\x93NUMPY": "a numpy array",
    b"GGUF": "a GGUF file",
    b"%PDF": "a PDF document",
    b"\x89PNG": "a picture",
}
# What stands in pickles for what people know under another name.
_KNOWN_AS = {
    "multiarray.scalar": "numpy numbers (numpy.float64 and the like)",
    "multiarray._reconstruct": "numpy arrays",
}


@dataclass(frozen=True)
class Weights:
    """The weights of one network, and what stood beside them.

    Attributes:
        tensors: under the network's own names.
        beside: plain values, under dotted names: ``config.num_heads``.
        part: what the names began with, such as ``teacher.``; empty if with nothing.
        others: tensors that belong to no part of that network: an optimizer's, another network's.
        around: what else was taken off the names, such as ``_orig_mod.``.
    """

    tensors: dict[str, Tensor]
    beside: dict[str, Any]
    part: str
    others: dict[str, Tensor]
    around: tuple[str, ...]

    def described(self) -> str:
        """Say what was taken off the names, to stand in brackets in a message; empty if nothing."""
        off = [f"{name!r}" for name in (*self.around, self.part) if name]
        return f" (names read without {', '.join(off)})" if off else ""


def find_weights(content: Mapping[str, Any], known: Collection[str]) -> Weights:
    """Find a network's weights in a state dict, or in what a training program wrapped it in.

    Mappings within mappings are one with dotted names, which are made plain (:func:`plain_name`); what stands
    before the names that are known is taken off too. Of a teacher and a student in one file the teacher is
    taken, which is what to use.

    Args:
        content: tensors and plain values, in any depth of mappings.
        known: names that the network has, not necessarily all.

    Raises:
        ValueError: if there are no tensors, two of one name, or several networks and none is a teacher.
    """
    tensors: dict[str, Tensor] = {}
    beside: dict[str, Any] = {}
    around: set[str] = set()
    for full, value in leaves(content):
        if not isinstance(value, Tensor):
            beside[full] = value
            continue
        around.update(f"{part}." for part in full.split(".") if part in _AROUND)
        name = plain_name(full)
        if name in tensors:
            raise ValueError(f"two tensors are named {listed([name])}, one of them {listed([full])}")
        tensors[name] = value
    if not tensors:
        raise ValueError(f"no tensors in it; it holds {listed(list(content)) or 'nothing'}")
    matches: Counter[str] = Counter()
    for name in tensors:
        starts = [0, *(found.end() for found in re.finditer(r"\.", name))]
        matches.update(name[:start] for start in starts if name[start:] in known)
    most = max(matches.values(), default=0)
    candidates = [part for part, count in matches.items() if 2 * count > most] or [""]
    if len(candidates) > 1:
        teachers = [part for part in candidates if "teacher" in part]
        if len(teachers) != 1:
            raise ValueError(
                f"several networks in it, their names begin with {listed(candidates)}; save one alone"
            )
        candidates = teachers
    (part,) = candidates
    return Weights(
        {name.removeprefix(part): value for name, value in tensors.items() if name.startswith(part)},
        beside,
        part,
        {name: value for name, value in tensors.items() if not name.startswith(part)},
        tuple(sorted(around)),
    )


def plain_name(name: str) -> str:
    """Take off a parameter's name what DDP, FSDP, ``torch.compile`` and recomputing put into it."""
    return ".".join(part for part in name.split(".") if part not in _AROUND)


def leaves(content: Mapping[Any, Any], depth: int = 0) -> Iterator[tuple[str, Any]]:
    """Yield what is in mappings within mappings, under dotted names.

    Raises:
        ValueError: if they are nested without end.
    """
    if depth > _DEEPEST:
        raise ValueError(f"mappings within mappings, more than {_DEEPEST} deep")
    # State dicts carry a mapping of their own, where PyTorch keeps its modules' versions.
    modules = getattr(content, "_metadata", None)
    own = modules.get("") if isinstance(modules, Mapping) else None
    for key, value in [*(own.items() if isinstance(own, Mapping) else ()), *content.items()]:
        value = vars(value) if isinstance(value, Namespace) else value
        if isinstance(value, Mapping):
            yield from ((f"{key}.{name}", leaf) for name, leaf in leaves(value, depth + 1))
        else:
            yield str(key), value


def misfit(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> str:
    """Say why tensors can't be loaded where others are expected; empty if they can.

    Float types differ at will. Every value must be finite.

    Args:
        found: what is to be loaded.
        expected: names and shapes; may be on the meta device.
    """
    both = [name for name in expected if name in found]
    shaped = [name for name in both if found[name].shape == expected[name].shape]
    usable = [name for name in shaped if not _unusable(found[name])]
    problems = {
        "missing": [name for name in expected if name not in found],
        "unexpected": [name for name in found if name not in expected],
        "of another shape": [
            f"{name} has shape {tuple(found[name].shape)}, expected {tuple(expected[name].shape)}"
            for name in both
            if name not in set(shaped)
        ],
        "of another type": [
            f"{name} is {_unusable(found[name])}, expected floats"
            for name in shaped
            if name not in set(usable)
        ],
        "with NaN or infinite values": [
            name for name in usable if not found[name].detach().float().isfinite().all()
        ],
    }
    return "; ".join(f"{len(names)} {kind}: {listed(names)}" for kind, names in problems.items() if names)


def _unusable(value: Tensor) -> str:
    """Say what a tensor is that holds no plain floats; empty if it does."""
    if value.is_meta or value.layout != torch.strided:
        return "without values" if value.is_meta else str(value.layout).removeprefix("torch.")
    return "" if value.is_floating_point() else str(value.dtype).removeprefix("torch.")


def weight_file(path: Path) -> Path:
    """Return the file that a path stands for: itself, or ``model.safetensors`` in a folder.

    Raises:
        UserError: if there is none, saying what is there.
    """
    try:
        kind = path.stat().st_mode
        if stat.S_ISREG(kind):
            return path
        if not stat.S_ISDIR(kind):
            raise UserError(f"{path}: neither a file nor a folder")
        names = sorted(item.name for item in path.iterdir())
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file") from error
    except OSError as error:
        raise UserError(f"{path}: can't be read: {error.strerror or error}") from error
    if MODEL_FILE in names:
        return path / MODEL_FILE
    if ".metadata" in names or any(name.endswith(".distcp") for name in names):
        raise UserError(f"{path}: a folder of torch.distributed.checkpoint, expected one file of weights")
    if "checkpoints" in names:
        raise UserError(
            f"{path}: a folder of a run; give {path / 'checkpoints'}/STEP/teacher.safetensors, or what "
            "`meduet-fast export` makes of it"
        )
    indices = [name for name in names if name.endswith(".index.json")]
    if indices:
        raise UserError(f"{path}: weights in several files ({indices[0]}), expected one: merge them")
    files = [str(path / name) for name in names if name.endswith(_SUFFIXES)]
    raise UserError(
        f"{path}: a folder without {MODEL_FILE}, expected a file of weights"
        + (f"; give one of its files: {listed(files)}" if files else "")
    )


def read_file(path: Path) -> Mapping[str, Any]:
    """Read a file of weights, on the CPU: tensors and plain values, as they were saved.

    A safetensors file's own description is the entry ``__metadata__``, JSON in it read.

    Raises:
        UserError: naming the file and what is in it, if it can't be read, is damaged, holds objects that only
            code could make, or is something else.
    """
    try:
        with path.open("rb") as file:
            head = file.read(1024)
    except OSError as error:
        raise UserError(f"{path}: can't be read: {error.strerror or error}") from error
    if head[4:9] == b"\0\0\0\0{":  # eight bytes of a length below 4 GiB, then JSON
        return _read_safetensors(path)
    if head.startswith(b"PK"):
        _look_into_archive(path)
        return _read_pytorch(path)
    if head.startswith(b"\x80"):  # a pickle: what torch.save wrote before PyTorch 1.6
        return _read_pytorch(path)
    raise UserError(f"{path}: {_describe(path, head)}, expected a safetensors or PyTorch file of weights")


def _read_safetensors(path: Path) -> dict[str, Any]:
    from safetensors import SafetensorError, safe_open  # here, so that a network needs torch alone

    try:
        with safe_open(path, "pt") as file:
            content: dict[str, Any] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            metadata: dict[str, str] = file.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: a damaged or cut-off safetensors file: {listed([error])}") from error
    content[METADATA] = {name: _parsed(value) for name, value in metadata.items()}
    return content


def _parsed(text: str) -> Any:
    """Return a string of JSON as what it stands for, and any other as it is."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def _read_pytorch(path: Path) -> Mapping[str, Any]:
    """Read what ``torch.save`` wrote: tensors, plain values, and the arguments of a command line."""
    try:
        with (
            path.open("rb") as file,  # of a path PyTorch would read the suffix
            torch.serialization.safe_globals([Namespace]),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")  # of pickles that PyTorch didn't write
            content = torch.load(file, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UserError(f"{path}: can't be read: {error.strerror or error}") from error
    except UnpicklingError as error:
        # PyTorch's own words begin with how to load it all the same.
        found = re.search(r"GLOBAL ([\w.]+)", str(error))
        name = found[1] if found else "objects"
        name = next((known for end, known in _KNOWN_AS.items() if name.endswith(end)), name)
        raise UserError(
            f"{path}: expected a file with nothing but weights; it holds {name} beside them, which only code "
            "that a file brings could make: save the state dict alone, or as safetensors"
        ) from error
    except Exception as error:  # the unpickler fails in many ways on a foreign file; all mean the same
        raise UserError(
            f"{path}: expected a file with nothing but weights, found a damaged PyTorch file or a pickle of "
            "another program"
        ) from error
    if not isinstance(content, Mapping):
        raise UserError(f"{path}: expected a dict with weights, found {type(content).__name__}")
    return content


def _look_into_archive(path: Path) -> None:
    """Refuse zip archives that ``torch.save`` did not write.

    Raises:
        UserError: saying what is in it.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (OSError, zipfile.BadZipFile) as error:
        raise UserError(
            f"{path}: begins as a PyTorch file (a zip archive) and is damaged or cut off"
        ) from error
    if any(name.endswith("/constants.pkl") or "/code/" in name for name in names):
        raise UserError(f"{path}: a TorchScript program, expected weights: save its state_dict() instead")
    if any(name.endswith("/data.pkl") for name in names):
        return
    inside = [name for name in names if name.endswith(_SUFFIXES)] or names
    raise UserError(
        f"{path}: a zip archive of {len(names)} files ({listed(inside)}), expected a file of weights: "
        "unpack it"
    )


def _describe(path: Path, head: bytes) -> str:
    """Say what a file is that holds no weights, from its first bytes."""
    if not head:
        return "an empty file"
    for magic, what in _FORMATS.items():
        if head.startswith(magic):
            return what
    if head[257:262] == b"ustar":
        return "a tar archive; unpack it"
    text = head.decode("utf-8", "ignore").lstrip("\ufeff \t\r\n")
    lower = text.lower()
    if lower.startswith("version https://git-lfs"):
        size = re.search(r"size (\d+)", text)
        return f"a Git LFS pointer to {size[1] + ' bytes' if size else 'a file'} (fetch it: `git lfs pull`)"
    shown = repr(" ".join(re.sub(r"<[^>]*>?", " ", text).split())[:60])
    if lower.startswith(("<!doctype html", "<html")):
        return f"a web page ({shown}) saved in place of a download"
    if lower.startswith("<"):
        return f"an XML document ({shown}), perhaps a server's error"
    if lower.startswith(("{", "[")):
        if '"weight_map"' in text:
            return "an index of weights in several files (merge them into one)"
        return f"JSON ({shown}), perhaps a server's error or a configuration"
    if head[:1] == b"\x08" and (path.suffix == ".onnx" or b"pytorch" in head[:64] or b"onnx" in head[:64]):
        return "an ONNX program"
    if "".join(text.split()).isprintable() and "\0" not in text and len(text.encode()) + 8 > len(head):
        return f"text ({shown})"
    return f"not a known kind of file (it begins with the bytes {head[:8].hex(' ')})"


def listed(names: Sequence[Any], most: int = 3) -> str:
    """List the first few names, in which a foreign file may have put anything."""
    shown = [str(name) if str(name).isprintable() else repr(str(name)) for name in names[:most]]
    return ", ".join(shown) + ", ..." * (len(names) > most)
