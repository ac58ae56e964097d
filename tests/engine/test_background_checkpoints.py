"""Checkpoints that are written while training goes on: of the right moment, by a thread that only writes."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from meduet_fast.engine.checkpoint import CheckpointWriter, checkpoint_steps
from meduet_fast.engine.checkpoint_index import IndexedWriter
from meduet_fast.errors import UserError
from meduet_fast.pretraining import PretrainConfig, pretrain

from .team import steps_done, train_alone

MESSAGES = ["all_reduce", "broadcast", "broadcast_object_list", "gather_object", "scatter_object_list"]


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
    assert used.keys() == {*MESSAGES, "to_local"} - {"broadcast"}
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
