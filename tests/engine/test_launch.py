"""Several processes by ``meduet-fast launch``: each tells its own error, and nobody adds to it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
from torch.distributed import DistNetworkError
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from meduet_fast.engine import launch as module
from meduet_fast.engine.launch import launch
from meduet_fast.errors import UserError


def failed(code: int) -> ChildFailedError:
    failure = ProcessFailure(local_rank=0, pid=1, exitcode=code, error_file="<N/A>")
    return ChildFailedError("python", {0: failure})


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (None, 0),
        (failed(2), 2),
        (failed(-signal.SIGKILL), 137),
        (SignalException("ended", signal.SIGTERM), 143),
    ],
)
def test_the_code_is_that_of_the_first_process(
    monkeypatch: pytest.MonkeyPatch, error: Exception | None, code: int
) -> None:
    started: list[Namespace] = []

    def run(options: Namespace) -> None:
        started.append(options)
        if error is not None:
            raise error

    monkeypatch.setattr(module, "run", run)
    assert launch(["--standalone", "--nproc-per-node", "4", "pretrain", "--config", "demo"]) == code
    [options] = started
    assert (options.nproc_per_node, options.standalone, options.module) == ("4", True, True)
    assert options.training_script == "meduet_fast"
    assert options.training_script_args == ["pretrain", "--config", "demo"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--nproc-per-node", "foo"], "could not be started: Unsupported nproc_per_node value: foo"),
        (["--nproc-per-node", "0"], "--nproc-per-node: expected 1 or more"),
        (["--nnodes", "x"], "could not be started: .*'x'"),
        (["--rdzv-backend", "nope"], "could not be started: .*'nope'"),
    ],
)
def test_options_that_start_nothing(options: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        launch([*options, "pretrain"])


def test_a_machine_out_of_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(options: Namespace) -> None:
        raise DistNetworkError("timed out after 2000ms")

    monkeypatch.setattr(module, "run", run)
    with pytest.raises(UserError, match="the processes could not be started: timed out after 2000ms"):
        launch(["pretrain"])


@pytest.mark.slow
def test_an_error_is_one_line_of_each_process(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "meduet_fast", "launch", "--standalone", "--nproc-per-node", "2"]
    command += ["pretrain", "--config", "demo", "--data", "nowhere", "--output", "run", "--device", "cpu"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert ended.returncode == 2
    said = "nowhere: not a latent store (index.jsonl not found); make one with `meduet-fast prepare`"
    wanted = {f"meduet-fast pretrain: rank {rank} of 2: {said}" for rank in range(2)}
    lines = ended.stderr.splitlines()
    assert 1 <= len(lines) <= 2  # the launcher may end the second before it has spoken
    assert set(lines) <= wanted
    assert ended.stdout == ""
