from __future__ import annotations

import os
import re
import resource
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from meduet_fast.connections import descriptors
from meduet_fast.data import loader as loader_module
from meduet_fast.data.crops import CropBatches
from meduet_fast.data.loader import AHEAD, SPARE_DESCRIPTORS, crop_loader
from meduet_fast.data.store import LatentStore
from meduet_fast.errors import UserError

from .conftest import THREE_DOMAINS, MakeStore, small


@pytest.fixture
def batches(make_store: MakeStore) -> CropBatches:
    return small(make_store(THREE_DOMAINS)[0])


def assert_right(found: list[dict[str, torch.Tensor]], batches: CropBatches, numbers: range) -> None:
    assert len(found) == len(numbers)
    for number, batch in zip(numbers, found, strict=True):
        wanted = batches[number]
        assert batch.keys() == wanted.keys() == batches.layout().keys()
        assert all(torch.equal(batch[key], wanted[key]) for key in wanted)


def children() -> set[str]:
    """Living processes that this one started."""
    found = set()
    for path in Path("/proc/self/task").glob("*/children"):
        for pid in path.read_text().split():
            if "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[:1]:
                found.add(pid)
    return found


@pytest.mark.parametrize("workers", [0, 1, 2, 5])
def test_the_loader_gives_the_same_batches_whatever_start_and_workers(
    batches: CropBatches, workers: int
) -> None:
    for rank in (0, 1):
        loader = crop_loader(batches, rank=rank, world_size=2, start_step=4, total_steps=24, workers=workers)
        assert len(loader) == 10
        assert_right(list(loader), batches, range(4 + rank, 24, 2))
        assert_right(list(loader), batches, range(4 + rank, 24, 2))


def test_one_core_reads_five_thousand_published_crops_a_second(make_store: MakeStore) -> None:
    store, _ = make_store({f"v{i}": (f"d{i % 3}", (60, 60, 56)) for i in range(6)})
    loader = crop_loader(CropBatches(store, crop_size=24, batch_size=64), total_steps=40)
    seconds = []
    for _ in range(3):
        begin = time.process_time()  # of all threads: other processes on this machine do not count
        crops = sum(len(batch["latents"]) for batch in loader)
        seconds.append(time.process_time() - begin)
    assert crops == 40 * 64
    assert crops / min(seconds) > 5000


def test_readers_need_no_shared_files_and_no_temporary_folder(
    batches: CropBatches, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing in /dev/shm, which Docker makes 64 MB small: tensors' files, nor semaphores."""

    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    for name in ("_share_fd_cpu_", "_share_filename_cpu_"):
        monkeypatch.setattr(torch.UntypedStorage, name, refuse)
    monkeypatch.setattr("multiprocessing.synchronize.SemLock.__init__", refuse)
    monkeypatch.setattr("tempfile.gettempdir", refuse)
    assert_right(list(crop_loader(batches, total_steps=9, workers=2)), batches, range(9))


@pytest.mark.parametrize(("room", "said"), [(2, "2 of 6 readers"), (0, "no readers, the run itself reads")])
def test_few_descriptors_mean_fewer_readers(
    batches: CropBatches, capfd: pytest.CaptureFixture[str], room: int, said: str
) -> None:
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    few = len(descriptors()) + SPARE_DESCRIPTORS + room - 1
    resource.setrlimit(resource.RLIMIT_NOFILE, (few, limits[1]))
    try:
        found = list(crop_loader(batches, total_steps=15, workers=6))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert_right(found, batches, range(15))
    line = capfd.readouterr().err
    assert line == (
        f"{batches.store.path}: {said}: too few file descriptors: `ulimit -n` is {few}; raise it\n"
    )


@pytest.mark.parametrize(("owner", "name"), [("os", "fork"), ("mmap", "mmap")])
@pytest.mark.parametrize("allowed", [0, 2])
def test_few_processes_or_little_memory_mean_fewer_readers(
    batches: CropBatches, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str],
    owner: str, name: str, allowed: int,
) -> None:  # fmt: skip
    module = getattr(loader_module, owner)
    original, left = getattr(module, name), allowed * (AHEAD if name == "mmap" else 1)

    def few(*arguments: Any) -> Any:
        nonlocal left
        left -= 1
        if left < 0:
            raise OSError(11, "Resource temporarily unavailable")
        return original(*arguments)

    monkeypatch.setattr(module, name, few)
    open_before = len(descriptors())
    assert_right(list(crop_loader(batches, total_steps=9, workers=3)), batches, range(9))
    said = capfd.readouterr().err
    assert re.search(rf"{'2 of 3 readers' if allowed else 'no readers'}.*unavailable; raise the lim", said), (
        said
    )
    assert said.count("\n") == 1
    assert len(descriptors()) == open_before


@pytest.mark.parametrize(
    ("read", "state", "printed"),
    [
        (lambda *_: os.kill(os.getpid(), signal.SIGSTOP), r"is stopped \(SIGSTOP", ""),
        (lambda *_: time.sleep(60), "waits", "in __getitem__"),
    ],
    ids=["stopped", "a disk that does not answer"],
)
def test_a_reader_that_hangs_is_named_after_the_time_out(
    batches: CropBatches, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str],
    read: Callable[..., None], state: str, printed: str,
) -> None:  # fmt: skip
    """Where it hangs is printed, too, unless it is stopped."""
    before = children()
    monkeypatch.setattr(LatentStore, "read_crops", read)
    stream = iter(crop_loader(batches, total_steps=9, workers=2, timeout_s=0.5))
    with pytest.raises(UserError) as raised:
        next(stream)
    path = re.escape(str(batches.store.path))
    said = rf"^{path}: no batch for 0\.5 s \(timeout_s\): .* process \d+, {state}.*; batch 0 is of [abc]\d, "
    assert re.search(said, str(raised.value)), raised.value
    assert printed in capfd.readouterr().err
    assert children() == before
    assert list(stream) == []


def test_while_this_process_reads_another_thread_is_told_what(
    batches: CropBatches, monkeypatch: pytest.MonkeyPatch
) -> None:
    loader = crop_loader(batches, start_step=4, total_steps=9)
    told = []
    original = LatentStore.read_crops

    def read_crops(store: LatentStore, *args: Any) -> torch.Tensor:
        told.append(loader.reading())
        if len(told) == 3:
            raise UserError("unreadable")
        return original(store, *args)

    monkeypatch.setattr(LatentStore, "read_crops", read_crops)
    assert loader.reading() is None
    stream = iter(loader)
    for number in (4, 5):
        next(stream)
        assert told[-1] is not None
        since, what = told[-1]
        assert 0 <= time.monotonic() - since < 60
        names = {batches.store.entries[index].name for index in batches.plan(number)[1]}
        assert what.startswith(f"{batches.store.path}: batch {number} is of ")
        assert sum(name in what for name in names) == min(4, len(names))
        assert loader.reading() is None
    with pytest.raises(UserError):
        next(stream)
    assert loader.reading() is None


@pytest.mark.parametrize("workers", [1, 3])
def test_a_killed_reader_is_told(batches: CropBatches, workers: int) -> None:
    before = children()
    stream = iter(crop_loader(batches, total_steps=50, workers=workers, timeout_s=20))
    for _ in range(workers):  # all are at work
        next(stream)
    for reader in children() - before:
        os.kill(int(reader), signal.SIGKILL)
    killed = f"{batches.store.path}: a reader of latents was killed by signal Killed (out of memory?)"
    with pytest.raises(UserError, match=f"^{re.escape(killed)}$"):
        list(stream)


def test_what_goes_wrong_in_a_reader_is_raised_here(
    batches: CropBatches, monkeypatch: pytest.MonkeyPatch
) -> None:
    def crash(*_: Any) -> None:
        raise ZeroDivisionError("a mistake")

    (batches.store.path / batches.store.entries[0].file).unlink()
    with pytest.raises(UserError, match=r"safetensors: listed in the index but missing"):
        list(crop_loader(batches, total_steps=9, workers=2))
    monkeypatch.setattr(LatentStore, "read_crops", crash)
    with pytest.raises(
        RuntimeError, match=r"(?s)in a reader of latents.*crash.*ZeroDivisionError: a mistake"
    ):
        list(crop_loader(batches, total_steps=9, workers=2))


def test_readers_outlive_signals_to_all_and_end_with_the_run(batches: CropBatches) -> None:
    before = children()
    stream = iter(crop_loader(batches, total_steps=9, workers=2))
    found = [next(stream), next(stream)]  # one of each reader: both are there
    for reader in children() - before:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGQUIT):
            os.kill(int(reader), number)
    found.extend(stream)
    assert_right(found, batches, range(9))
    assert children() == before
    stream = iter(crop_loader(batches, total_steps=9, workers=2))
    assert len(children() - before) == 2
    del stream
    assert children() == before


def test_a_signal_to_a_reader_just_forked_is_not_taken_for_one_to_the_run(
    batches: CropBatches, monkeypatch: pytest.MonkeyPatch
) -> None:
    fork = os.fork

    def fork_then_interrupt() -> int:
        pid = fork()
        if pid == 0:
            os.kill(os.getpid(), signal.SIGINT)
        return pid

    monkeypatch.setattr(loader_module.os, "fork", fork_then_interrupt)
    received, wakeup = os.pipe()
    for end in (received, wakeup):
        os.set_blocking(end, False)
    before = signal.set_wakeup_fd(wakeup)
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    try:
        assert_right(list(crop_loader(batches, total_steps=4, workers=2)), batches, range(4))
    finally:
        signal.set_wakeup_fd(before)
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == mask
    with pytest.raises(BlockingIOError):
        os.read(received, 1)
    os.close(received)
    os.close(wakeup)


def test_no_reader_stays_a_zombie_and_none_is_killed_twice(
    batches: CropBatches, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever else waits for children: the run's program, or the message about a lost reader."""
    monkeypatch.setattr(LatentStore, "read_crops", lambda *_: time.sleep(60))  # else one may be ready before
    stream = iter(crop_loader(batches, total_steps=50, workers=3, timeout_s=20))
    first, second, third = (reader.pid for reader in stream._readers)  # type: ignore[attr-defined]
    for pid in (first, second):
        os.kill(pid, signal.SIGKILL)
    os.waitpid(second, 0)
    killed, kill = list[int](), os.kill
    monkeypatch.setattr(os, "kill", lambda pid, number: (killed.append(pid), kill(pid, number)))
    with pytest.raises(UserError, match=r"a reader of latents (was killed|ended)"):
        list(stream)
    # All but the one that is missed first: the second, if the first had handed over its batch before.
    assert killed in ([second, third], [first, third])
    for pid in (first, second, third):
        with pytest.raises(ChildProcessError):
            os.waitpid(pid, os.WNOHANG)
