"""Files are whole or absent."""

from __future__ import annotations

from pathlib import Path

import pytest

from meduet_fast.files import atomic_path, remove_leftovers


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
