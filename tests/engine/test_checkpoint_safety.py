"""Nothing that somebody put into a checkpoint is run, and a damaged one is named."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from meduet_fast.engine.checkpoint import latest_checkpoint, read_run
from meduet_fast.engine.checkpoint_index import INDEX_FILE
from meduet_fast.errors import UserError
from meduet_fast.pretraining import PretrainConfig, pretrain

PARTS = "__0_0.distcp"


class Bomb:
    """Unpickled, it makes a folder."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (str(self.target),)


@pytest.fixture(scope="module")
def done(tiny_store: Path, tiny_settings: PretrainConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps."""
    run = tmp_path_factory.mktemp("done") / "run"
    pretrain(tiny_store, run, replace(tiny_settings, steps=2))
    return run


@pytest.fixture
def state(done: Path, tmp_path: Path) -> Path:
    """What a copy of it resumes from, which a test may damage."""
    shutil.copytree(done, tmp_path / "run")
    return latest_checkpoint(tmp_path / "run") / "state"


@pytest.fixture
def resume(tiny_store: Path, tiny_settings: PretrainConfig, tmp_path: Path) -> Callable[[], object]:
    """Goes on from that checkpoint to a third step."""
    settings = json.loads((latest_checkpoint(tmp_path / "run") / "run.json").read_text())  # as after 2 of 3
    settings["config"]["steps"] = 3
    (latest_checkpoint(tmp_path / "run") / "run.json").write_text(json.dumps(settings))
    config = replace(tiny_settings, steps=3)
    return lambda: pretrain(tiny_store, tmp_path / "run", config, resume=True)


def test_no_file_of_a_checkpoint_is_a_pickled_index(state: Path, resume: Callable[[], object]) -> None:
    assert sorted(file.name for file in state.iterdir()) == [PARTS, INDEX_FILE]
    names = {file.suffix for file in state.parent.iterdir() if file.is_file()}
    assert names == {".json", ".safetensors"}
    resume()


def test_pytorchs_own_index_is_never_read(state: Path, resume: Callable[[], object], tmp_path: Path) -> None:
    """It is a pickle; what somebody else put there does nothing, with our index or without."""
    bomb = tmp_path / "bang"
    for name in (".metadata", "__0.metadata"):
        (state / name).write_bytes(pickle.dumps(Bomb(bomb)))
    pickle.loads((state / ".metadata").read_bytes())
    bomb.rmdir()  # so it is one
    resume()
    (state / INDEX_FILE).unlink()
    shutil.rmtree(state.parent.with_name("3"))
    with pytest.raises(UserError, match=rf"state/{INDEX_FILE}: not a readable index.*No such file"):
        resume()
    assert not bomb.exists()


def test_parts_are_read_as_tensors_alone(state: Path, resume: Callable[[], object], tmp_path: Path) -> None:
    bomb = tmp_path / "bang"
    torch.save([torch.zeros(3), Bomb(bomb)], state / PARTS)
    torch.load(state / PARTS, weights_only=False)
    bomb.rmdir()  # so it is one
    length = (state / PARTS).stat().st_size
    index = json.loads((state / INDEX_FILE).read_text())
    for entry in index.values():
        for part in entry["parts"]:
            part.update(start=0, length=length)
    (state / INDEX_FILE).write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"checkpoints/2: not a readable .* a part is damaged"):
        resume()
    assert not bomb.exists()


def first_part(index: dict[str, Any]) -> dict[str, Any]:
    return next(iter(index.values()))["parts"][0]


DAMAGES: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "another folder's file": (lambda index: first_part(index).update(file="../a"), "'../a' is not the name"),
    "an absolute path": (lambda index: first_part(index).update(file="/a"), "'/a' is not the name"),
    "no place": (lambda index: first_part(index).pop("start"), "KeyError: 'start'"),
    "a negative place": (lambda index: first_part(index).update(start=-1), "negative"),
    "a fraction": (lambda index: first_part(index).update(size=[0.5]), "TypeError"),
    "another number of axes": (lambda index: first_part(index).update(size=[1]), "not a readable"),
    "no tensor": (lambda index: index.update(teacher="bytes"), "TypeError"),
    "a file that is not there": (lambda index: first_part(index).update(file="none"), "none: No such file"),
    "an absent tensor": (lambda index: index.pop("student.cls_token"), "Missing key.*student.cls_token"),
    "another size": (lambda index: index["student.cls_token"].update(size=[3]), "Size mismatch"),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGES.values(), ids=DAMAGES)
def test_a_wrong_index_is_refused(
    state: Path, resume: Callable[[], object], damage: Callable[[dict[str, Any]], object], message: str
) -> None:
    index = json.loads((state / INDEX_FILE).read_text())
    damage(index)
    (state / INDEX_FILE).write_text(json.dumps(index))
    with pytest.raises(UserError, match=message) as raised:
        resume()
    assert str(state.parent) in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("name", [INDEX_FILE, PARTS])
@pytest.mark.parametrize("kept", [0.5, 0])
def test_truncated_files_are_refused(
    state: Path, resume: Callable[[], object], name: str, kept: float
) -> None:
    os.truncate(state / name, int((state / name).stat().st_size * kept))
    message = "not a readable index" if name == INDEX_FILE else "a part is damaged"
    with pytest.raises(UserError, match=f"{state.parent}.*{message}"):
        resume()


def test_parts_of_noise_are_refused(state: Path, resume: Callable[[], object]) -> None:
    """Other noise ends PyTorch's reading in other ways; see that no message is of bytes or characters."""
    (state / PARTS).write_bytes(b"\xfb" * (state / PARTS).stat().st_size)
    with pytest.raises(UserError, match=r"this model: a part is damaged, or is no tensor$"):
        resume()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "damaged: no 'config'"),
        ("null", "damaged: no 'config'"),
        ("{}", "damaged: no 'config'"),
        ('{"step": 5}', "damaged: no 'config'"),
        ('{"step": 5, "config": 3, "data": "x"}', "damaged: no 'config'"),
        ('{"step": "5", "config": {}, "data": "x"}', "damaged: no 'step'"),
        ('{"step": 5, "config": {}}', "damaged: no 'data'"),
        ("{", "not readable: "),
        (100_000 * "[", "not readable: "),
    ],
)
def test_a_damaged_record_is_named(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(UserError, match=rf"run\.json: {message}"):
        read_run(tmp_path)
