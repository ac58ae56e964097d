"""Something happens to one of several processes: all end, say why, and leave a run that goes on."""

from __future__ import annotations

import os
import re
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest

from meduet_fast.engine.checkpoint import checkpoint_steps
from meduet_fast.engine.metrics import read_metrics
from meduet_fast.pretraining import PretrainConfig
from meduet_fast.pretraining.losses import LOSSES

from .team import Team, train

SIZE = 3


@pytest.fixture
def config(tiny_settings: PretrainConfig) -> PretrainConfig:
    """Eight steps of three processes, a checkpoint every two."""
    return replace(tiny_settings, steps=8, parallel="fsdp", timeout_s=60, keep_checkpoints=9)


@pytest.fixture(scope="module")
def whole(tiny_store: Path, tiny_settings: PretrainConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run to which nothing happened."""
    run = tmp_path_factory.mktemp("whole") / "run"
    train(tiny_store, run, replace(tiny_settings, steps=8, parallel="fsdp", keep_checkpoints=9), SIZE)
    return run


def losses(run: Path) -> list[list[float]]:
    return [[record[name] for name in LOSSES] for record in read_metrics(run)]


def assert_as_in(run: Path, whole: Path, step: int) -> None:
    """The last checkpoint is bit for bit the other run's of that step, from which the run would go on."""
    assert checkpoint_steps(run / "checkpoints")[-1] == step
    found, wanted = (
        {
            path.relative_to(folder): path.read_bytes()
            for path in folder.rglob("*")
            if path.is_file() and path.name != "run.json"  # the settings differ
        }
        for folder in (run / "checkpoints" / str(step), whole / "checkpoints" / str(step))
    )
    assert found == wanted
    assert losses(run)[:step] == losses(whole)[:step]


def assert_goes_on(store: Path, run: Path, config: PretrainConfig, last: int, whole: Path) -> None:
    """From the checkpoint that was there, to the very losses of a run that was never stopped."""
    possible = [last]
    if config.async_checkpoints:
        possible.append(last - config.checkpoint_every)  # what was being written is lost
    assert (checkpoint_steps(run / "checkpoints") or [0])[-1] in possible
    train(store, run, config, SIZE)
    assert losses(run) == losses(whole)


LOST = r"rank 1 ended or hangs without a word"
# fault, at which call, step of the last checkpoint, what the process itself says, what the others say
FAULTS = [
    ("killed in a step", 5, 4, "", LOST),
    ("killed in a checkpoint", 1, 2, "", LOST),
    ("a mistake", 5, 4, r"ZeroDivisionError: a mistake", r"rank 1: ZeroDivisionError: a mistake"),
    ("a bad batch", 4, 4, r"at step 5: reconstruction is nan.*checkpoint is .*/[24]", r"rank [02] of 3: "),
    ("a full disk", 1, 2, r"File too large; the last good checkpoint is .*/2", r"rank 1: .*File too large"),
]  # fmt: skip
AT_A_CHECKPOINT = ("killed in a checkpoint", "a full disk")


@pytest.mark.parametrize(
    ("fault", "at", "last", "own", "others", "background"),
    [(*fault, False) for fault in FAULTS]
    + [pytest.param(*fault, True, marks=pytest.mark.slow) for fault in FAULTS if fault[0] in AT_A_CHECKPOINT],
)
def test_one_fails_all_end_and_say_why(
    tiny_store: Path, config: PretrainConfig, whole: Path, tmp_path: Path,
    fault: str, at: int, last: int, own: str, others: str, background: bool,
) -> None:  # fmt: skip
    config = replace(config, async_checkpoints=background)
    run = tmp_path / "run"
    began = time.monotonic()
    with Team(tiny_store, run, config, SIZE, fault, at) as team:
        codes = team.wait()
        said = [team.said(rank) for rank in range(SIZE)]
    assert all(codes), (codes, said)
    assert time.monotonic() - began < config.timeout_s, "found out by the time-out only"
    assert (codes[1] == -signal.SIGKILL) == fault.startswith("killed"), said
    for rank in range(SIZE):
        assert re.search(own if rank == 1 else others, said[rank]), said[rank]
    if fault == "a mistake":
        assert_as_in(run, whole, last)
    else:
        assert_goes_on(tiny_store, run, config, last, whole)


MISSING = r": \S+\.safetensors: listed in the index but missing"
READER = r": \S+: a reader of latents (was killed by signal|ended)"  # who was reading from it can't say
# fault, at which call, reading processes, what one says that has it
LATENT_FAULTS = [
    ("latents lost", 3, 0, MISSING),
    ("latents lost", 3, 1, MISSING),
    ("latents cut", 3, 1, r": \S+\.safetensors: .*truncated"),
    ("a reader killed", 4, 1, READER + r".* \(out of memory\?\)"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("fault", "at", "workers", "own"), LATENT_FAULTS, ids=["lost", "lost, reader", "cut", "killed"]
)
def test_latents_that_disappear_and_their_readers(
    tiny_store: Path, config: PretrainConfig, whole: Path, tmp_path: Path,
    fault: str, at: int, workers: int, own: str,
) -> None:  # fmt: skip
    store, run = tmp_path / "store", tmp_path / "run"
    shutil.copytree(tiny_store, store)
    with Team(store, run, replace(config, workers=workers), SIZE, fault, at) as team:
        assert team.wait() == [2] * SIZE, team.said()
        said = [team.said(rank) for rank in range(SIZE)]
    assert re.search(r"rank 1 of 3" + own, said[1]), said[1]
    for text in said:  # the others read the same files, and may find out by themselves
        assert re.search(rf"rank \d( of 3)?{own}", text), text
        assert "Traceback" not in text, text
        assert "shared memory" not in text, text
    last = checkpoint_steps(run / "checkpoints")[-1]
    assert last in (2, 4)  # readers are up to two steps ahead
    if fault == "latents lost":
        assert_as_in(run, whole, last)
    else:
        shutil.copytree(tiny_store, store, dirs_exist_ok=True)
        assert_goes_on(store, run, config, last, whole)


@pytest.mark.parametrize("parallel", ["ddp", "hsdp"])
def test_only_the_killed_process_is_named(
    tiny_store: Path, tiny_settings: PretrainConfig, tmp_path: Path, parallel: str
) -> None:
    """Not those that wait for a neighbour who knows already; readers do not keep a dead one's lines open."""
    config = replace(tiny_settings, steps=100, parallel=parallel, shard_size=2, timeout_s=60, workers=1)
    with Team(tiny_store, tmp_path / "run", config, 4, "killed in a step", 3) as team:
        assert team.wait() == [2, -signal.SIGKILL, 2, 2], team.said()
        for rank in (0, 2, 3):
            assert re.search(LOST, team.said(rank)), team.said(rank)


def test_a_process_that_hangs_is_named_after_the_time_out(
    tiny_store: Path, config: PretrainConfig, whole: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    with Team(tiny_store, run, replace(config, timeout_s=5), SIZE, "stopped", 5) as team:
        assert team.wait(0, 2) == [2, 2], team.said()
        for rank in (0, 2):
            assert "rank 1 ended or hangs without a word" in team.said(rank)
    assert_as_in(run, whole, 4)


def test_sigterm_to_one_stops_all_with_a_checkpoint(
    tiny_store: Path, config: PretrainConfig, whole: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    longer = replace(config, steps=100_000, checkpoint_every=100_000)
    with Team(tiny_store, run, longer, SIZE) as team:
        team.wait_for_step(3)
        pid = team.processes[2].pid
        assert pid is not None
        os.kill(pid, signal.SIGTERM)
        assert team.wait() == [0] * SIZE, team.said()
        assert all("SIGTERM" in team.said(rank) for rank in range(SIZE))
    (last,) = checkpoint_steps(run / "checkpoints")
    assert len(read_metrics(run)) == last >= 4


def test_without_a_launcher_the_run_ends(
    tiny_store: Path, config: PretrainConfig, whole: Path, tmp_path: Path
) -> None:
    """The launcher keeps the store; when it is gone, nobody could stop the processes any more."""
    run = tmp_path / "run"
    with Team(tiny_store, run, replace(config, steps=100_000), SIZE) as team:
        team.wait_for_step(3)
        team.store = None
        assert team.wait() == [2] * SIZE, team.said()
        for rank in range(SIZE):
            assert re.search(r"the store of the processes, .* is gone", team.said(rank))
    assert checkpoint_steps(run / "checkpoints")


def test_processes_that_never_come_are_not_waited_for_forever(
    tiny_store: Path, config: PretrainConfig, tmp_path: Path
) -> None:
    with Team(tiny_store, tmp_path / "run", replace(config, timeout_s=2), SIZE) as team:
        team.processes[1].kill()
        assert team.wait(0, 2) == [2, 2], team.said()
        assert re.search(
            r"rank 0 of 3: could not join the others at 127\.0\.0\.1:\d+ within 2 s", team.said(0)
        )
