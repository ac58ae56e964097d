"""Files of weights: what is read, through which wrappings, and what everything else is called."""

from __future__ import annotations

import argparse
import json
import pathlib
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from meduet_fast.errors import UserError
from meduet_fast.files import file_sha256
from meduet_fast.weight_files import find_weights, misfit, read_file, weight_file

STATE = {"embed.weight": torch.zeros(2, 3), "blocks.0.bias": torch.ones(4), "blocks.1.bias": torch.ones(4)}
KNOWN = {"embed.weight", "blocks.0.bias"}


def refused(path: Path) -> str:
    """The line with which a file is refused: it names the file, and is fit for a terminal."""
    with pytest.raises(UserError) as error:
        read_file(weight_file(path))
    message = str(error.value)
    assert message.startswith(f"{path}: ")
    assert message.isprintable()
    for advice in ("weights_only", "two options", "file an issue", "miniz"):
        assert advice not in message
    return message.removeprefix(f"{path}: ")


def before(part: str) -> dict[str, Tensor]:
    return {part + key: value for key, value in STATE.items()}


WRAPPINGS: dict[str, dict[str, Any]] = {
    "compiled": before("_orig_mod."),
    "DDP": before("module."),
    "compiled, DDP": before("module._orig_mod."),
    "DDP, compiled": before("_orig_mod.module."),
    "compiled block by block": {
        key.replace("blocks.0.", "blocks.0._orig_mod."): value for key, value in STATE.items()
    },
    "FSDP, recomputed": {
        "_fsdp_wrapped_module."
        + key.replace(".0.", ".0._fsdp_wrapped_module._checkpoint_wrapped_module."): value
        for key, value in STATE.items()
    },
    "Lightning": {"state_dict": before("model."), "epoch": 3, "hyper_parameters": {"rate": 0.1}},
    "DeepSpeed": {"module": STATE, "global_steps": 3},
    "any name": {"what_people_call_it": before("net.vit."), "epoch": 3},
    "optimizer beside": {"model": STATE, "optimizer": {"state": {0: {"exp_avg": torch.zeros(4)}}}},
    "another network beside": {"unet_state_dict": before("backbone."), "vae": {"quant.bias": torch.ones(3)}},
    "student beside": {**before("student."), **{f"teacher.{key}": value + 1 for key, value in STATE.items()}},
}


@pytest.mark.parametrize("name", WRAPPINGS)
def test_wrappings_are_taken_off(name: str) -> None:
    found = find_weights(WRAPPINGS[name], KNOWN)
    assert found.tensors.keys() == STATE.keys()
    added = 1 if name == "student beside" else 0
    assert all(torch.equal(found.tensors[key], value + added) for key, value in STATE.items())


def test_what_was_taken_off_and_left_is_told() -> None:
    found = find_weights({"state_dict": before("module._orig_mod."), "config": {"a": {"heads": 3}}}, KNOWN)
    assert found.around == ("_orig_mod.", "module.")
    assert found.described() == " (names read without '_orig_mod.', 'module.', 'state_dict.')"
    assert (found.part, found.beside) == ("state_dict.", {"config.a.heads": 3})
    assert find_weights(STATE, KNOWN).described() == ""
    beside = find_weights(WRAPPINGS["student beside"], KNOWN)
    assert beside.others.keys() == before("student.").keys()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "no tensors in it; it holds nothing"),
        ({"epoch": 3, "loss": 0.5}, "no tensors in it; it holds epoch, loss"),
        (
            {"model": STATE, "ema": STATE},
            r"several networks in it, their names begin with model\., ema\.; save one",
        ),
        (
            {"module.a": STATE["embed.weight"], "a": STATE["embed.weight"]},
            "two tensors are named a, one of them a",
        ),
    ],
)
def test_contents_without_one_network_are_refused(content: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        find_weights(content, KNOWN)


def test_weights_that_do_not_fit_are_listed() -> None:
    expected = {key: torch.empty(value.shape, device="meta") for key, value in STATE.items()}
    assert misfit(STATE, expected) == ""
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        assert misfit({key: value.to(dtype) for key, value in STATE.items()}, expected) == ""
    assert misfit({**STATE, "embed.weight": torch.zeros(3, 2)}, expected) == (
        "1 of another shape: embed.weight has shape (3, 2), expected (2, 3)"
    )
    assert misfit({**STATE, "embed.weight": torch.zeros(2, 3, dtype=torch.int8)}, expected) == (
        "1 of another type: embed.weight is int8, expected floats"
    )
    for other, what in ((torch.zeros(2, 3).to_sparse(), "sparse_coo"), (expected["embed.weight"], "without")):
        assert f"embed.weight is {what}" in misfit({**STATE, "embed.weight": other}, expected)
    for value in (float("nan"), float("-inf")):
        bad = {**STATE, "blocks.1.bias": torch.tensor([0.0, value, 0.0, 0.0])}
        assert misfit(bad, expected) == "1 with NaN or infinite values: blocks.1.bias"
    assert misfit({f"other.{n}": torch.ones(1) for n in range(5)}, expected) == (
        "3 missing: embed.weight, blocks.0.bias, blocks.1.bias; 5 unexpected: other.0, other.1, other.2, ..."
    )


def test_both_formats_are_read_under_any_name(tmp_path: Path) -> None:
    """What ``torch.save`` writes, wrote before PyTorch 1.6, and safetensors; a command's arguments too."""
    arguments = argparse.Namespace(heads=3, device=torch.device("cuda:0"), betas=(0.9, 0.95))
    whole = {"model": STATE, "args": arguments}
    torch.save(whole, tmp_path / "a.safetensors")
    torch.save(whole, tmp_path / "b", _use_new_zipfile_serialization=False)
    save_file(STATE, tmp_path / "c.pt", {"config": json.dumps({"heads": 3}), "note": "text"})
    for name in ("a.safetensors", "b", "c.pt"):
        found = find_weights(read_file(tmp_path / name), KNOWN)
        assert all(torch.equal(found.tensors[key], value) for key, value in STATE.items())
        assert 3 in found.beside.values()
    assert len(file_sha256(tmp_path / "b")) == 64


TEXTS = {
    "version https://git-lfs.github.com/spec/v1\noid sha256:aa\nsize 12\n": "a Git LFS pointer to 12 bytes",
    "<!DOCTYPE html><html><title>Sign in</title>": "a web page ('Sign in')",
    "\n  <HTML><body>403 Forbidden": "a web page ('403 Forbidden')",
    '\ufeff<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>': "an XML document ('AccessDenied')",
    '{"error": "Repository not found"}': 'JSON (\'{"error": "Repository not found"}\')',
    '{"metadata": {"total_size": 8}, "weight_map": {"a": "b"}}': "an index of weights in several files",
    "Entry not found": "text ('Entry not found')",
    "": "an empty file",
}


@pytest.mark.parametrize("text", TEXTS)
def test_texts_in_place_of_weights_are_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.pt").write_text(text, encoding="utf-8")
    assert refused(tmp_path / "a.pt").startswith(TEXTS[text])


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"\x89HDF\r\n\x1a\n" + bytes(64), "an HDF5 file (Keras, TensorFlow)"),
        (b"\x1f\x8b\x08" + bytes(64), "a gzip archive; unpack it"),
        (b"\x08\x07\x12\x07pytorch\x1a\x052.1.0", "an ONNX program"),
        (b"a.pt".ljust(257, b"\0") + b"ustar" + bytes(300), "a tar archive; unpack it"),
        (b"\x93NUMPY\x01" + bytes(64), "a numpy array"),
        (bytes(range(1, 200)), "not a known kind of file (it begins with the bytes 01 02 03"),
        (b"PK\x03\x04" + bytes(64), "begins as a PyTorch file (a zip archive) and is damaged or cut off"),
    ],
)
def test_other_formats_are_named(tmp_path: Path, content: bytes, what: str) -> None:
    (tmp_path / "a.bin").write_bytes(content)
    assert refused(tmp_path / "a.bin").startswith(what)


class _Runs:
    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self) -> tuple[Any, tuple[Path]]:
        return Path.touch, (self.proof,)


def _new(value: Any, path: Path) -> None:
    torch.save(value, path)


def _old(value: Any, path: Path) -> None:
    torch.save(value, path, _use_new_zipfile_serialization=False)


def _plain(value: Any, path: Path) -> None:
    path.write_bytes(pickle.dumps(value, protocol=2))


@pytest.mark.parametrize("save", [_new, _old, _plain])
@pytest.mark.parametrize(
    ("value", "named"),
    [
        (np.float64(0.3), "numpy numbers"),
        (np.zeros(3), "numpy arrays"),
        (pathlib.PurePosixPath("x"), "PurePosixPath"),
        (nn.Linear(2, 3), "torch.nn.modules.linear.Linear"),
        (_Runs, "getattr"),
    ],
    ids=str,
)
def test_objects_beside_weights_are_named_and_not_made(
    tmp_path: Path, save: Callable[[Any, Path], None], value: Any, named: str
) -> None:
    path, proof = tmp_path / "a.pt", tmp_path / "executed"
    save({"model": {"a": 1.0}, "beside": _Runs(proof) if value is _Runs else value}, path)
    message = refused(path)
    assert message.startswith("expected a file with nothing but weights")
    if save is not _plain:  # no words are lost on whose pickle that is
        assert named in message
    assert not proof.exists()


def test_programs_and_other_archives_are_named(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "script.pt", "w") as archive:
        for name in ("data.pkl", "constants.pkl", "code/__torch__/net.py", "version"):
            archive.writestr(f"script/{name}", "3")
    assert refused(tmp_path / "script.pt").startswith("a TorchScript program, expected weights")
    with zipfile.ZipFile(tmp_path / "bundle.zip", "w") as archive:
        archive.writestr("configs/a.json", "{}")
        archive.writestr("models/autoencoder.pt", "weights")
    assert "a zip archive of 2 files (models/autoencoder.pt)" in refused(tmp_path / "bundle.zip")


def test_cut_off_files_are_named(tmp_path: Path) -> None:
    torch.save(STATE, tmp_path / "a.pt")
    save_file(STATE, tmp_path / "a.safetensors")
    for name, what in (
        ("a.pt", "begins as a PyTorch file"),
        ("a.safetensors", "a damaged or cut-off safetensors"),
    ):
        path = tmp_path / name
        for part in (0.3, 0.9):
            content = path.read_bytes()
            (tmp_path / "cut").write_bytes(content[: int(part * len(content))])
            assert what in refused(tmp_path / "cut")


def test_folders(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    for present, what in (
        (["notes.txt"], "a folder without model.safetensors, expected a file of weights"),
        (["a.pth", "notes.txt"], f"give one of its files: {folder}/a.pth"),
        (["model.safetensors.index.json"], "weights in several files (model.safetensors.index.json)"),
        (["__0_0.distcp"], "a folder of torch.distributed.checkpoint"),
        (["checkpoints"], f"a folder of a run; give {folder}/checkpoints/STEP/teacher.safetensors"),
    ):
        folder.mkdir()
        for name in present:
            (folder / name).touch()
        assert what in refused(folder)
        for name in present:
            (folder / name).unlink()
        folder.rmdir()
    folder.mkdir()
    (folder / "model.safetensors").touch()
    assert weight_file(folder) == folder / "model.safetensors"


def test_absent_closed_and_endless_files(tmp_path: Path, as_nobody: AbstractContextManager[None]) -> None:
    assert refused(tmp_path / "absent.pt") == "no such file"
    assert refused(tmp_path / ("n" * 300)) == "can't be read: File name too long"
    assert refused(Path("/dev/null")) == "neither a file nor a folder"
    closed = tmp_path / "closed"
    closed.mkdir()
    (closed / "a.pt").write_text("x")
    closed.chmod(0)
    with as_nobody:
        for path in (closed / "a.pt", closed):
            assert refused(path) == "can't be read: Permission denied"
    closed.chmod(0o700)


@pytest.mark.parametrize("versions", [[3], {"": 3}, {"": None}, 3])
def test_versions_of_modules_that_are_none(versions: object) -> None:
    state = OrderedDict(STATE)
    state._metadata = versions  # type: ignore[attr-defined]
    assert find_weights(state, KNOWN).tensors.keys() == STATE.keys()


def test_what_is_nested_without_end(tmp_path: Path) -> None:
    endless: dict[str, Any] = dict(STATE)
    endless["self"] = endless
    with pytest.raises(ValueError, match="mappings within mappings, more than 50 deep"):
        find_weights(endless, KNOWN)
    save_file(STATE, tmp_path / "a.safetensors", {"deep": 100_000 * "["})
    assert read_file(tmp_path / "a.safetensors")["__metadata__"]["deep"] == 100_000 * "["
