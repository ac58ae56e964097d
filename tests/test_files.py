"""Files are whole or absent."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from safetensors.torch import save_file

from meduet_fast.errors import UserError
from meduet_fast.files import atomic_path, in_real_folder, refuse_unwritable, remove_leftovers


def test_a_file_appears_whole(tmp_path: Path) -> None:
    target = tmp_path / "new" / "file.txt"
    with atomic_path(target) as temporary:
        temporary.write_text("one")
        assert not target.exists()
    assert target.read_text() == "one"
    with atomic_path(target) as temporary:
        temporary.write_text("two")
        assert target.read_text() == "one"
    assert target.read_text() == "two"
    assert list(target.parent.iterdir()) == [target]


def test_a_failure_leaves_nothing(tmp_path: Path) -> None:
    target = tmp_path / "file.txt"
    target.write_text("old")

    def write_half() -> None:
        with atomic_path(target) as temporary:
            temporary.write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        write_half()
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_a_folder_appears_whole_and_leftovers_go(tmp_path: Path) -> None:
    with atomic_path(tmp_path / "folder") as temporary:
        temporary.mkdir()
        (temporary / "inside").write_text("x")
    assert (tmp_path / "folder" / "inside").read_text() == "x"
    (tmp_path / ".dead.tmp123").mkdir()
    (tmp_path / ".dead.tmp123" / "part").write_text("x")
    (tmp_path / ".dead2.tmp9").write_text("x")
    remove_leftovers(tmp_path)
    assert [item.name for item in tmp_path.iterdir()] == ["folder"]


@pytest.fixture(params=[0o022, 0o027, 0o077], ids=oct)
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def test_modes_follow_the_umask(tmp_path: Path, umask: int) -> None:
    """Safetensors' own are 0600."""
    with atomic_path(tmp_path / "model.safetensors") as temporary:
        save_file({"weight": torch.zeros(2)}, temporary)
    with atomic_path(tmp_path / "folder") as temporary:
        temporary.mkdir()
        save_file({"weight": torch.zeros(2)}, temporary / "model.safetensors")
        (temporary / "text").touch()
    modes = {path.stat().st_mode & 0o777 for path in tmp_path.rglob("*") if path.is_file()}
    assert modes == {0o666 & ~umask}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "model.safetensors"]


@pytest.mark.parametrize("way", ["real/a", "link/a", "real/../link/a", "./real/a"])
def test_a_file_has_one_place_whatever_way_it_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    (tmp_path / "real" / "a").symlink_to("b")  # keeps its name
    monkeypatch.chdir(tmp_path)
    assert in_real_folder(Path(way)) == in_real_folder(tmp_path / way) == tmp_path / "real" / "a"
    monkeypatch.chdir(tmp_path / "link")
    assert in_real_folder(Path()) == tmp_path / "real"
    assert in_real_folder(Path("..")) == tmp_path


def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    refuse_unwritable(tmp_path / "new" / "run")
    refuse_unwritable(tmp_path)
    with pytest.raises(UserError, match=r"file/run: cannot be written: .*/file is no folder"):
        refuse_unwritable(tmp_path / "file" / "run")
    with pytest.raises(UserError, match=r"cannot be written: .*: File name too long"):
        refuse_unwritable(tmp_path / ("n" * 300) / "run")


@pytest.mark.parametrize("mode", [0o500, 0o000], ids=oct)
def test_a_closed_folder_is_refused(mode: int, as_nobody: AbstractContextManager[None]) -> None:
    with TemporaryDirectory() as open_to_all:
        Path(open_to_all).chmod(0o755)
        closed = Path(open_to_all) / "closed"
        closed.mkdir(mode=mode)
        with as_nobody, pytest.raises(UserError, match=r"closed/run: cannot be written: .*closed"):
            refuse_unwritable(closed / "run")
        closed.chmod(0o700)
