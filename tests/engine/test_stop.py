"""A request to stop ends a run that hangs, too, and says where it hung."""

from __future__ import annotations

import ctypes
import os
import re
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from threading import Thread

import pytest

from meduet_fast.engine import stop as stop_module
from meduet_fast.engine.checkpoint import checkpoint_steps
from meduet_fast.engine.distributed import refuse_lone_tasks
from meduet_fast.engine.stop import StopRequest
from meduet_fast.errors import UserError
from meduet_fast.pretraining import PretrainConfig, pretrain

from .team import PATIENCE_S, Team

HANGS = "hangs from here on"  # of rank.py, which is run and not imported


def in_child(
    output: Path, act: Callable[[StopRequest], object], capfd: pytest.CaptureFixture[str],
    *numbers: signal.Signals, grace_s: float = 0.3, timeout_s: float = 60.0,
) -> tuple[int, str]:  # fmt: skip
    """Do something with a request, in a forked process; its exit code, what it printed.

    It gets one of the signals for each "ready" that it prints, the first when it begins: to the system two
    that come at once may be one, or come in another order.
    """
    pid = os.fork()
    if pid == 0:
        try:
            # What a shell starts in the background, these tests perhaps, ignores SIGINT.
            signal.signal(signal.SIGINT, signal.default_int_handler)
            with StopRequest(output, grace_s, timeout_s) as stop:
                os.write(2, b"ready")
                act(stop)
            os._exit(0)
        finally:
            os._exit(1)
    said, deadline, sent = "", time.monotonic() + PATIENCE_S, 0
    while os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        said += capfd.readouterr().err
        if sent < min(said.count("ready"), len(numbers)):
            os.kill(pid, numbers[sent])
            sent += 1
        if time.monotonic() > deadline:
            os.kill(pid, signal.SIGKILL)
        time.sleep(0.1)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), said + capfd.readouterr().err


def hang_here(stop: StopRequest) -> None:
    """As in a call of C that no signal interrupts: Python's own handlers do not run."""
    stop.at("step 7")
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
    time.sleep(1000)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_process_that_hangs_is_ended_after_the_grace_time(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], number: signal.Signals
) -> None:
    (tmp_path / "checkpoints" / "4").mkdir(parents=True)
    code, said = in_child(tmp_path, hang_here, capfd, number)
    assert code == 128 + number
    assert "in hang_here" in said
    assert (
        f"{tmp_path}: ended, because step 7 was not over 0.3 s after {number.name} (grace_s); the last good "
        f"checkpoint is {tmp_path}/checkpoints/4\n"
    ) in said


def test_one_that_comes_further_is_left_alone(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """However long its steps and its checkpoint are together."""

    def act(stop: StopRequest) -> None:
        while stop.signal is None:
            time.sleep(0.01)
        for step in range(12):
            stop.at(f"step {step}")
            time.sleep(0.1)

    assert in_child(tmp_path, act, capfd, signal.SIGTERM, grace_s=0.6) == (0, "ready")


def test_it_is_over_while_forked_processes_are_still_there(tmp_path: Path) -> None:
    """They have whatever was open when they were forked: readers."""
    began = time.monotonic()
    with StopRequest(tmp_path, 25.0, 60.0):
        pid = os.fork()
        if pid == 0:
            time.sleep(60)
            os._exit(0)
    assert time.monotonic() - began < 10
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def test_a_second_request_ends_one_that_hangs_at_once(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stop_module, "LAST_WORDS_S", 1.0)

    def act(stop: StopRequest) -> None:
        def ask_again() -> None:
            while not stop._armed:  # what the watching thread does about the first
                time.sleep(0.01)
            os.write(2, b"ready")

        Thread(target=ask_again).start()
        hang_here(stop)

    began = time.monotonic()
    code, said = in_child(tmp_path, act, capfd, signal.SIGTERM, signal.SIGINT, grace_s=100.0)
    assert code == 143, said
    assert time.monotonic() - began < 15
    assert "ended, because SIGINT came, the second request, and step 7 was not over; there is no " in said


def test_a_main_thread_that_acts_on_a_second_request_is_left_to_it(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    def act(stop: StopRequest) -> None:
        while stop.signal is None:
            time.sleep(0.01)
        try:
            os.write(2, b"ready")
            time.sleep(60)
        except KeyboardInterrupt:
            time.sleep(1)  # an orderly end
            os.write(2, b", interrupted")

    code, said = in_child(tmp_path, act, capfd, signal.SIGINT, signal.SIGINT, grace_s=100.0)
    assert (code, said) == (0, "readyready, interrupted")


def test_a_call_that_keeps_all_of_python_waiting_is_ended_too(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stop_module, "LAST_WORDS_S", 0.2)

    def hold_the_lock(stop: StopRequest) -> None:
        while stop.signal is None:
            time.sleep(0.01)
        time.sleep(0.1)
        stop.at("step 7")
        ctypes.PyDLL(None).sleep(1000)

    code, said = in_child(tmp_path, hold_the_lock, capfd, signal.SIGTERM)
    assert code == 1
    assert "in hold_the_lock" in said


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_call_that_kept_all_of_python_waiting_before_the_request_is_ended_too(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    monkeypatch.setattr(stop_module, "LAST_WORDS_S", 0.2)

    def hold_the_lock(stop: StopRequest) -> None:
        sys.setswitchinterval(1000)
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT, signal.SIGQUIT})
        ctypes.PyDLL(None).sleep(1000)  # nobody wakes it

    code, said = in_child(tmp_path, hold_the_lock, capfd, number)
    assert code == -signal.SIGKILL
    assert "in hold_the_lock" in said
    what = "killed, because no thread of it could run for 0.7 s after a request to stop (grace_s)"
    assert f"{tmp_path}: {what}; its checkpoints are in {tmp_path}/checkpoints\n" in said


def test_one_that_takes_note_of_requests_is_not_killed_and_its_watcher_ends(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stop_module, "LAST_WORDS_S", 0.1)

    def act(stop: StopRequest) -> None:
        assert stop._watcher is not None
        os.write(2, b" %d " % stop._watcher.pid)
        while stop.signal is None:
            time.sleep(0.01)
        ctypes.PyDLL(None).sleep(1)  # longer than it may, but noted before
        for step in range(20):
            stop.at(f"step {step}")
            time.sleep(0.1)

    code, said = in_child(tmp_path, act, capfd, signal.SIGTERM, grace_s=1.2)
    assert code == 0, said
    watcher = int(said.split()[1])
    assert not Path(f"/proc/{watcher}").exists()


def test_the_watcher_ends_with_a_process_that_is_killed(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    def act(stop: StopRequest) -> None:
        assert stop._watcher is not None
        os.write(2, b" %d " % stop._watcher.pid)
        time.sleep(60)

    code, said = in_child(tmp_path, act, capfd, signal.SIGKILL)
    assert code == -signal.SIGKILL
    watcher, deadline = Path(f"/proc/{int(said.split()[1])}"), time.monotonic() + PATIENCE_S
    while watcher.exists() and "Z" not in (watcher / "stat").read_text().rpartition(")")[2].split()[0]:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_where_no_process_can_be_started_the_run_goes_without_a_watcher(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", str(tmp_path / "absent"))
    with StopRequest(tmp_path, 1.0, 60.0) as stop:
        assert stop._watcher is None


def test_sigquit_prints_where_each_thread_is_and_the_run_goes_on(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    def wait_a_moment(stop: StopRequest) -> None:
        time.sleep(1)

    code, said = in_child(tmp_path, wait_a_moment, capfd, signal.SIGQUIT)
    assert code == 0
    assert re.search(r"in wait_a_moment", said)
    assert re.search(r"in _watch", said)


def test_before_a_time_out_each_process_prints_where_it_is(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stop_module, "LOOK_S", 0.05)

    def hang_a_while(stop: StopRequest) -> None:
        stop.at("step 3")
        while not stop._looked_at:
            time.sleep(0.01)
        time.sleep(0.5)  # it is not printed again

    code, said = in_child(tmp_path, hang_a_while, capfd, timeout_s=0.2)
    assert code == 0
    assert re.search(rf"{tmp_path}: step 3 is not over after \d s; where each thread is:\n", said)
    assert said.count("in hang_a_while") == 1


@pytest.mark.parametrize(("since", "ended"), [(0.0, True), (1000.0, False), (None, False)])
def test_one_that_reads_for_too_long_is_ended_with_what_it_reads(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
    since: float | None, ended: bool,
) -> None:  # fmt: skip
    monkeypatch.setattr(stop_module, "LOOK_S", 0.05)

    def read_from_a_disk_that_does_not_answer(stop: StopRequest) -> None:
        began = time.monotonic()
        stop.reading = lambda: None if since is None else (began + since, "store: batch 7 is of a, b")
        time.sleep(60 if ended else 1)

    code, said = in_child(tmp_path, read_from_a_disk_that_does_not_answer, capfd, timeout_s=0.3)
    assert code == (2 if ended else 0)
    line = "ended, because no batch was read for 0.3 s (timeout_s), store: batch 7 is of a, b; there is no "
    assert (f"{tmp_path}: {line}" in said) == ended
    assert "in read_from_a_disk_that_does_not_answer" in said


def test_a_run_that_reads_in_its_own_process_does_not_wait_for_ever(
    tiny_store: Path, tiny_settings: PretrainConfig, tmp_path: Path
) -> None:
    config = replace(tiny_settings, steps=8, timeout_s=4, workers=0)
    with Team(tiny_store, tmp_path / "run", config, 2, "hangs in a reader", 3) as team:
        assert team.wait() == [2, 2], team.said()
        said = team.said(1)
    what = rf"no batch was read for 4 s \(timeout_s\), {tiny_store}: batch \d is of \w+, .*;"
    assert re.search(rf"ended, because {what} the last good checkpoint is .*/checkpoints/2\n", said), said
    assert said.count("ended, because") == 1


@pytest.mark.parametrize(("fault", "workers"), [("step", 0), ("checkpoint", 0), ("reader", 1)])
def test_sigterm_ends_processes_that_hang_and_those_that_wait_for_them(
    tiny_store: Path, tiny_settings: PretrainConfig, tmp_path: Path, fault: str, workers: int
) -> None:
    config = replace(tiny_settings, steps=8, parallel="fsdp", grace_s=4, workers=workers)
    last = tmp_path / "run" / "checkpoints" / "2"
    at = {"step": 3, "checkpoint": 1, "reader": 2}[fault]
    with Team(tiny_store, tmp_path / "run", config, 2, f"hangs in a {fault}", at) as team:
        deadline = time.monotonic() + PATIENCE_S
        while HANGS not in team.said(1) or checkpoint_steps(last.parent) != [2]:
            assert time.monotonic() < deadline, team.said()
            time.sleep(0.1)
        began = time.monotonic()
        for process in team.processes:
            assert process.pid is not None
            os.kill(process.pid, signal.SIGTERM)
        codes = team.wait()
        assert time.monotonic() - began < 30
        said = [team.said(rank) for rank in range(2)]
    assert codes[1] == 143, said
    assert codes[0] in (143, 2), said  # that of its own grace time, or it heard of the other
    doing = {"step": "step 3", "checkpoint": "checkpoint 4", "reader": "step 2"}[fault]
    line = rf"ended, because {doing} was not over 4 s after SIGTERM \(grace_s\); .* is {last}\n"
    assert re.search(line, said[1]), said[1]
    assert re.search(line if codes[0] == 143 else rf"rank 1: {doing} was not over", said[0]), said[0]
    assert checkpoint_steps(last.parent) == [2]


LONE = [
    {"SLURM_NTASKS": "4", "SLURM_PROCID": "3"},
    {"SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_STEP_ID": "0"},
    {"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "0", "SLURM_NTASKS": "8"},
    {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "0"},
    {"PMI_SIZE": "16", "PMI_RANK": "1"},
]
ALONE = [
    {},
    {"SLURM_NTASKS": "4", "SLURM_JOB_ID": "1"},  # a shell of salloc
    {"SLURM_NTASKS": "4", "SLURM_PROCID": "0"},  # a batch script
    {"SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_STEP_ID": "4294967291"},
    {"SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_STEP_ID": "4294967290", "SLURM_STEP_NUM_TASKS": "1"},
    {
        "SLURM_NTASKS": "4",
        "SLURM_STEP_NUM_TASKS": "1",
        "SLURM_STEP_ID": "2",
        "SLURM_PROCID": "0",
    },  # srun -n 1
    {"OMPI_COMM_WORLD_SIZE": "1", "PMI_SIZE": "1"},
]


def set_launch(monkeypatch: pytest.MonkeyPatch, env: dict[str, str]) -> None:
    for name in [name for name in os.environ if name.startswith(("SLURM_", "OMPI_", "PMI_", "MV2_"))]:
        monkeypatch.delenv(name)
    for name, value in env.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize("env", LONE)
def test_tasks_that_do_not_know_of_each_other_are_refused(
    tiny_store: Path, tiny_config: PretrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    env: dict[str, str],
) -> None:  # fmt: skip
    set_launch(monkeypatch, env)
    with pytest.raises(
        UserError, match=r"one of \d+ tasks .*srun --ntasks-per-node=1 torchrun .*or set RANK"
    ):
        pretrain(tiny_store, tmp_path / "run", tiny_config)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("env", ALONE)
def test_a_single_process_of_a_job_is_not(monkeypatch: pytest.MonkeyPatch, env: dict[str, str]) -> None:
    set_launch(monkeypatch, env)
    refuse_lone_tasks()
