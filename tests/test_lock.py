"""One process at a time: with locks of the file system or none, after a kill, on other machines."""

from __future__ import annotations

import errno
import fcntl
import json
import multiprocessing
import os
import re
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, replace
from multiprocessing.process import BaseProcess
from multiprocessing.synchronize import Event
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Barrier, Thread, Timer

import pytest

from meduet_fast import lock
from meduet_fast.errors import UserError
from meduet_fast.lock import HOLDER, LOCK, FolderLock, refuse_held

NO_LOCKS = [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP]


@pytest.fixture(params=[0, *NO_LOCKS], ids=["flock", *(errno.errorcode[number] for number in NO_LOCKS)])
def code(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """What flock fails with; 0 where it works."""
    if request.param:

        def refuse(*_: object) -> None:
            raise OSError(request.param, os.strerror(request.param))

        monkeypatch.setattr(fcntl, "flock", refuse)
    return request.param


def hold(folder: Path, ready: Event) -> None:
    """Hold a folder and have a child that outlives this process."""
    with FolderLock(folder):
        if os.fork() == 0:
            ready.set()  # by the child, which has let go of the lock by now
            time.sleep(3)
            os._exit(0)
        time.sleep(60)


@contextmanager
def holding(folder: Path) -> Iterator[BaseProcess]:
    """Let another process hold a folder, who is killed at the end without a chance to give it back."""
    fork = multiprocessing.get_context("fork")
    ready = fork.Event()
    process = fork.Process(target=hold, args=(folder, ready))
    process.start()
    assert ready.wait(30)
    yield process
    process.kill()
    process.join()


def test_the_second_is_told_who_is_first_and_a_killed_one_is_no_hindrance(tmp_path: Path, code: int) -> None:
    folder = tmp_path / "run"
    with holding(folder) as process:
        since = json.loads((folder / HOLDER).read_text())["since"]
        who = rf"run: in use by process {process.pid} on {os.uname().nodename} since {since[:19]}"
        for enter in (FolderLock(folder).__enter__, lambda: refuse_held(folder)):
            with pytest.raises(UserError, match=who.replace("+", r"\+")):
                enter()
    refuse_held(folder)
    began = time.monotonic()
    with FolderLock(folder):
        (folder / "result").touch()
        assert json.loads((folder / HOLDER).read_text())["pid"] == os.getpid()
    assert time.monotonic() - began < (2 if code else 0.5)
    assert [item.name for item in folder.iterdir()] == ["result"]


def test_a_folder_that_nothing_came_into_is_removed(tmp_path: Path, code: int) -> None:
    with FolderLock(tmp_path / "new" / "run"):
        assert (tmp_path / "new" / "run" / LOCK).exists()
    assert list(tmp_path.iterdir()) == []
    refuse_held(tmp_path)


def test_not_twice_in_one_process(tmp_path: Path, code: int) -> None:
    with FolderLock(tmp_path), pytest.raises(UserError, match=f"in use by process {os.getpid()} on"):
        FolderLock(tmp_path).__enter__()
    with FolderLock(tmp_path):
        pass


def elsewhere(folder: Path) -> None:
    """Leave a record as a process on another machine would."""
    with FolderLock(folder):
        text = json.loads((folder / HOLDER).read_text())
    (folder / HOLDER).write_text(json.dumps(text | {"host": "node7", "machine": "another", "token": "x"}))


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("TOUCH_S", 0.02), ("SILENT_S", 0.3), ("SETTLE_S", 0.3), ("RETRY_S", 0.01)):
        monkeypatch.setattr(lock, name, value)


def test_another_machine_is_known_by_its_signs_of_life(tmp_path: Path, code: int, quick: None) -> None:
    elsewhere(tmp_path)
    done = False

    def touch() -> None:
        while not done:
            os.utime(tmp_path / HOLDER)
            time.sleep(0.02)

    thread = Thread(target=touch)
    thread.start()
    try:
        with pytest.raises(UserError, match=r"in use by process \d+ on node7 since"):
            FolderLock(tmp_path).__enter__()
    finally:
        done = True
        thread.join()
    with FolderLock(tmp_path):  # silent from now on
        assert "node7" not in (tmp_path / HOLDER).read_text()


@pytest.mark.parametrize("record", ["", "{}", "[1]", '{"host": 3}'])
def test_a_record_cut_short_is_no_hindrance_for_long(tmp_path: Path, quick: None, record: str) -> None:
    (tmp_path / HOLDER).write_text(record)
    with FolderLock(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []


def test_of_many_that_take_over_one_gets_it(tmp_path: Path, code: int, quick: None) -> None:
    elsewhere(tmp_path)
    os.utime(tmp_path / HOLDER, (0, 0))
    start, got, refused = Barrier(6), list[FolderLock](), list[str]()

    def take() -> None:
        start.wait()
        try:
            got.append(FolderLock(tmp_path).__enter__())
        except UserError as error:
            refused.append(str(error))

    threads = [Thread(target=take) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(got), len(refused)) == (1, 5), refused
    got[0].__exit__()


def test_a_process_that_was_taken_for_dead_stops(tmp_path: Path, quick: None) -> None:
    with FolderLock(tmp_path) as held:
        held.check()
        [noticed] = [thread for thread in threading.enumerate() if thread.name == "lock"]
        text = json.loads((tmp_path / HOLDER).read_text())
        (tmp_path / HOLDER).write_text(json.dumps(text | {"host": "node7", "token": "x"}))
        noticed.join(10)
        with pytest.raises(UserError, match=r"taken over by process \d+ on node7"):
            held.check()
    assert "node7" in (tmp_path / HOLDER).read_text(), "the other's record stays"


def test_waiting_for_the_folder(tmp_path: Path, quick: None) -> None:
    first = FolderLock(tmp_path)
    first.__enter__()
    thread = Thread(target=lambda: (time.sleep(0.1), first.__exit__()))
    thread.start()
    began = time.monotonic()
    with FolderLock(tmp_path, wait=True):
        assert time.monotonic() - began >= 0.1
    thread.join()


def test_a_record_that_somebody_removed_is_written_again(tmp_path: Path, quick: None) -> None:
    record = tmp_path / "run" / HOLDER
    with FolderLock(record.parent) as held:
        text = record.read_text()
        record.unlink()
        until = time.monotonic() + 10
        while not (record.exists() and record.read_text() == text):
            assert time.monotonic() < until
            time.sleep(0.005)
        held.check()
    assert not record.parent.exists()


def test_nothing_stays_behind_where_the_record_is_gone(tmp_path: Path, code: int) -> None:
    with FolderLock(tmp_path / "run"):
        (tmp_path / "run" / HOLDER).unlink()
    assert list(tmp_path.iterdir()) == []
    with FolderLock(tmp_path / "run"):
        shutil.rmtree(tmp_path / "run")
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / LOCK).touch()  # another's
    assert [item.name for item in (tmp_path / "run").iterdir()] == [LOCK]


@pytest.mark.parametrize("record", [None, "{}", "dead"])
def test_who_looks_at_a_folder_is_no_hindrance(
    tmp_path: Path, quick: None, monkeypatch: pytest.MonkeyPatch, record: str | None
) -> None:
    """As a dry run does: it has the lock for a moment, without a record of its own."""
    monkeypatch.setattr(lock, "RETRY_S", 0.1)
    if record == "dead":
        record = json.dumps(asdict(replace(lock.Holder.myself(), born=1)))
    if record is not None:
        (tmp_path / HOLDER).write_text(record)
    with (tmp_path / LOCK).open("w") as file:
        fcntl.flock(file, fcntl.LOCK_SH)
        Timer(0.05, fcntl.flock, (file, fcntl.LOCK_UN)).start()
        with FolderLock(tmp_path):
            pass


def test_a_wait_is_told(
    tmp_path: Path, quick: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    elsewhere(tmp_path)
    with FolderLock(tmp_path):
        pass
    told = capsys.readouterr().err
    assert re.search(r"in use by process \d+ on node7 since .*\? Waiting 0 s for a sign of life\n", told)
    assert told.count("\n") == 1


def test_a_folder_that_cannot_be_written(as_nobody: AbstractContextManager[None]) -> None:
    with TemporaryDirectory() as folder:
        Path(folder).chmod(0o555)
        with as_nobody, pytest.raises(UserError, match="run: cannot be written: Permission denied"):
            FolderLock(Path(folder) / "run").__enter__()


def test_a_file_in_its_place(tmp_path: Path) -> None:
    (tmp_path / "run").touch()
    with pytest.raises(UserError, match="run: cannot be written: File exists"):
        FolderLock(tmp_path / "run").__enter__()
