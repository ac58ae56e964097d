"""Checkpoints that are written while training goes on: of the right moment, by a thread that only writes."""

from __future__ import annotations

import gc
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.planner import SavePlanner
from torch.distributed.tensor import DTensor

from meduet_fast.data.store import LatentStore
from meduet_fast.engine.checkpoint import CheckpointWriter, _Snapshot, checkpoint_steps
from meduet_fast.engine.checkpoint_index import IndexedWriter
from meduet_fast.engine.distributed import World
from meduet_fast.engine.stop import Agreement, StopRequest
from meduet_fast.engine.task import Task
from meduet_fast.errors import UserError
from meduet_fast.lock import FolderLock
from meduet_fast.pretraining import PretrainConfig, pretrain

from .team import steps_done, train_alone

MESSAGES = ["all_reduce", "all_gather_object", "gather_object", "broadcast", "broadcast_object_list"]


@pytest.fixture
def config(tiny_settings: PretrainConfig) -> PretrainConfig:
    return replace(tiny_settings, keep_checkpoints=9, async_checkpoints=True)


def test_a_late_write_has_the_values_of_its_step(
    tiny_store: Path, config: PretrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, again = tmp_path / "run", tmp_path / "again"
    config = replace(config, steps=5, checkpoint_every=2)
    original, seen = IndexedWriter.write_data, list[int]()

    def late(*arguments: Any) -> Any:
        done = steps_done(run)
        while steps_done(run) == done < 4:
            pass
        seen.append(steps_done(run) - done)
        return original(*arguments)

    monkeypatch.setattr(IndexedWriter, "write_data", late)
    train_alone(tiny_store, run, config)
    assert seen[0] >= 1  # a step was done between the copy and the write
    monkeypatch.undo()
    train_alone(tiny_store, again, replace(config, async_checkpoints=False))
    for step in (2, 4, 5):
        first, second = (path / "checkpoints" / str(step) / "state" / "__0_0.distcp" for path in (run, again))
        assert first.read_bytes() == second.read_bytes()
    assert checkpoint_steps(run / "checkpoints") == [2, 4, 5]


def test_a_checkpoint_gets_its_name_when_it_is_written_and_not_with_the_next(
    tiny_store: Path, config: PretrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, named_at = tmp_path / "run", list[int]()
    original = CheckpointWriter._complete

    def complete(writer: CheckpointWriter, step: int) -> None:
        original(writer, step)
        named_at.append(steps_done(run))

    monkeypatch.setattr(CheckpointWriter, "_complete", complete)
    config = replace(config, steps=40, checkpoint_every=10)
    train_alone(tiny_store, run, config)
    assert 10 <= named_at[0] < 20


def test_the_thread_that_writes_sends_nothing_and_sees_no_shards(
    tiny_store: Path, config: PretrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launched = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    for name, value in launched.items():
        monkeypatch.setenv(name, str(value))
    used: dict[str, set[str]] = {}

    def note(owner: Any, name: str) -> None:
        original: Callable[..., Any] = getattr(owner, name)

        def noted(*arguments: Any, **options: Any) -> Any:
            used.setdefault(name, set()).add(threading.current_thread().name)
            return original(*arguments, **options)

        monkeypatch.setattr(owner, name, noted)

    for name in MESSAGES:
        note(dist, name)
    note(DTensor, "to_local")
    note(IndexedWriter, "write_data")
    pretrain(tiny_store, tmp_path / "run", replace(config, parallel="fsdp"))
    assert used.pop("write_data") == {"checkpoint_0"}
    assert used.keys() == {*MESSAGES, "to_local"} - {"broadcast", "broadcast_object_list"}
    assert all(threads == {"MainThread"} for threads in used.values()), used


def test_a_failed_write_ends_the_run_at_once(
    tiny_store: Path, config: PretrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(IndexedWriter, "write_data", full)
    run = tmp_path / "run"
    with pytest.raises(
        UserError, match=r"checkpoints/2: checkpoint not written: No space left on device; there"
    ):
        pretrain(tiny_store, run, replace(config, steps=500, checkpoint_every=2))
    assert steps_done(run) < 20
    assert not any((run / "checkpoints").iterdir())


def writes_late(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    original = IndexedWriter.write_data

    def late(*arguments: Any) -> Any:
        time.sleep(seconds)
        return original(*arguments)

    monkeypatch.setattr(IndexedWriter, "write_data", late)


def writing_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("checkpoint")]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda crops: crops * float("nan"), r"reconstruction is nan.*last good checkpoint is .*points/2$"),
        (lambda crops: crops.no_such_method(), "no_such_method"),
    ],
    ids=["a loss", "a mistake"],
)
def test_what_is_written_when_a_later_step_fails_is_kept(
    tiny_store: Path, config: PretrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    spoil: Callable[[torch.Tensor], torch.Tensor], message: str,
) -> None:  # fmt: skip
    original, reads = LatentStore.read_crops, 0

    def read_crops(*arguments: Any) -> torch.Tensor:
        nonlocal reads
        reads += 1
        crops = original(*arguments)
        return spoil(crops) if reads == 3 else crops

    monkeypatch.setattr(LatentStore, "read_crops", read_crops)
    writes_late(monkeypatch, 0.5)
    with pytest.raises((UserError, AttributeError), match=message):
        pretrain(tiny_store, tmp_path / "run", replace(config, steps=9, checkpoint_every=2))
    assert [item.name for item in (tmp_path / "run" / "checkpoints").iterdir()] == ["2"]
    assert not writing_threads()


@pytest.mark.parametrize(("size", "error"), [(2, UserError("a bad step")), (1, KeyboardInterrupt())])
def test_a_write_that_cannot_be_finished_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int, error: BaseException
) -> None:
    """Others would have to take part, or somebody insists."""
    task = OneWeight()
    writes_late(monkeypatch, 0.2)

    def save_and_fail() -> None:
        with CheckpointWriter(tmp_path, {}, 2, World(torch.device("cpu"), 0, size), None, True) as writer:
            writer.save(2, task, torch.optim.AdamW(task.parameters()))
            raise error

    with pytest.raises(type(error)):
        save_and_fail()
    assert not writing_threads()
    assert [item.name for item in tmp_path.iterdir()] == [".2.tmp"]
    assert not any(file.stat().st_size for file in tmp_path.rglob("*") if file.is_file())


class OneWeight(Task):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(3))  # (3,)


def cached_plans() -> list[str]:
    gc.collect()
    return [*SavePlanner._cached_save_plan, *SavePlanner._cached_all_plans, *SavePlanner._cached_metadata]


def test_plans_are_kept_for_one_writer_and_dropped_where_planning_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, task = cached_plans(), OneWeight()
    optimizer, world = torch.optim.AdamW(task.parameters()), World(torch.device("cpu"))
    first, second = (CheckpointWriter(tmp_path / name, {}, 9, world) for name in "ab")
    for name in "ab":
        (tmp_path / name).mkdir()

    def fail(*_: Any) -> None:
        raise RuntimeError("out of memory")

    first.save(1, task, optimizer)
    second.save(1, task, optimizer)
    assert len(cached_plans()) == len(before) + 6
    with monkeypatch.context() as patch:
        patch.setattr(_Snapshot, "finish_plan", fail)
        with pytest.raises(UserError, match=r"a/2: checkpoint not written: out of memory"):
            first.save(2, task, optimizer)
    assert len(cached_plans()) == len(before) + 3
    first.save(3, task, optimizer)
    assert checkpoint_steps(tmp_path / "a") == [1, 3]
    del first, second
    assert cached_plans() == before


def test_what_was_said_of_the_checkpoint_before_does_not_hold_up_the_next(
    tiny_store: Path, config: PretrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With several processes it arrives a step late."""
    seen, finish = list[str](), CheckpointWriter.finish

    def note(writer: CheckpointWriter) -> None:
        seen.append("finish")
        finish(writer)

    monkeypatch.setattr(Agreement, "exchange", lambda *_: (None, True))
    monkeypatch.setattr(StopRequest, "at", lambda _, doing: seen.append(doing))
    monkeypatch.setattr(CheckpointWriter, "finish", note)
    train_alone(tiny_store, tmp_path / "run", replace(config, steps=4, checkpoint_every=2))
    at = seen.index("checkpoint 2")
    assert seen[at : at + 4] == ["checkpoint 2", "finish", "step 2", "finish"]


@pytest.mark.parametrize(
    ("at", "in_background", "kept"),
    [("checkpoint 2", False, []), ("step 2", True, []), ("the end after", False, [2])],
)
def test_nothing_is_begun_or_named_in_a_folder_that_another_process_took_over(
    tiny_store: Path, config: PretrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    at: str, in_background: bool, kept: list[int],
) -> None:  # fmt: skip
    taken = False

    def note(_: StopRequest, doing: str) -> None:
        nonlocal taken
        taken = taken or doing.startswith(at)

    def check(_: FolderLock) -> None:
        if taken:
            raise UserError("taken over by another")

    monkeypatch.setattr(StopRequest, "at", note)
    monkeypatch.setattr(FolderLock, "check", check)
    writes_late(monkeypatch, 0.3)  # in the background step 2 is reached meanwhile
    config = replace(config, steps=3, checkpoint_every=2, async_checkpoints=in_background)
    with pytest.raises(UserError, match="taken over"):
        pretrain(tiny_store, tmp_path / "run", config)
    assert checkpoint_steps(tmp_path / "run" / "checkpoints") == kept
