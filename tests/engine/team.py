"""Several processes that train together on this machine, as torchrun would start them."""

from __future__ import annotations

import multiprocessing
import os
import runpy
import signal
import time
from collections.abc import Callable, Sequence
from functools import partial
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from types import TracebackType

import torch.distributed as dist

from meduet_fast.engine import EngineConfig, FitResult
from meduet_fast.engine.metrics import METRICS_FILE, read_metrics
from meduet_fast.pretraining import PretrainConfig, pretrain
from meduet_fast.pretraining.losses import LOSSES

# Children are forked from a server that has imported everything, what PyTorch imports when a step or a logger
# first needs it as well: starting one costs milliseconds.
FORKSERVER = multiprocessing.get_context("forkserver")
FORKSERVER.set_forkserver_preload(["meduet_fast.pretraining", "torch._dynamo", "torch.utils.tensorboard"])
PATIENCE_S = 90.0


class Team:
    """Processes of one run; killed at the end of the ``with`` if they are still there.

    Args:
        store: latents, for pretraining; or what trains, called with run, config and ``resume``.
        run: folder of the run; what a process prints goes to ``rankN.log`` beside it.
        config: of the run.
        size: number of processes.
        fault: of ``rank.py``; none if empty.
        at: which call of the faulty method, from 0.
        rank: whose fault it is.
    """

    def __init__(
        self,
        store: Path | Callable[..., FitResult],
        run: Path,
        config: EngineConfig,
        size: int,
        fault: str = "",
        at: int = 0,
        rank: int = 1,
    ) -> None:
        self.run = run
        task = partial(pretrain, store) if isinstance(store, Path) else store
        self.store: dist.TCPStore | None = dist.TCPStore(
            "127.0.0.1", 0, is_master=True, wait_for_workers=False
        )
        self.logs = [run.with_name(f"{run.name}.rank{number}.log") for number in range(size)]
        self.processes: list[ForkServerProcess] = []
        for number in range(size):
            env = {
                "RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": str(size),
                "LOCAL_WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(self.store.port), "TORCHELASTIC_USE_AGENT_STORE": "True",
                "TORCHELASTIC_RESTART_COUNT": "0",
            }  # fmt: skip
            settings = {
                "train": task, "run": run, "config": config, "log": self.logs[number], "env": env,
                "fault": fault if number == rank else "", "count": at,
            }  # fmt: skip
            script = str(Path(__file__).with_name("rank.py"))
            process = FORKSERVER.Process(target=runpy.run_path, args=(script, {"settings": settings}))
            process.start()
            self.processes.append(process)

    def __enter__(self) -> Team:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process in self.processes:
            if process.is_alive():
                process.kill()
            process.join()

    def wait(self, *ranks: int) -> list[int | None]:
        """Exit codes of all processes, or of some; None for one that hangs, which then prints where."""
        deadline = time.monotonic() + PATIENCE_S
        chosen = [self.processes[rank] for rank in ranks] if ranks else self.processes
        for process in chosen:
            process.join(max(0.0, deadline - time.monotonic()))
        self.print_stacks(chosen)
        return [process.exitcode for process in chosen]

    def wait_for_step(self, step: int) -> None:
        """Until that step was logged."""
        deadline = time.monotonic() + PATIENCE_S
        while steps_done(self.run) <= step:
            if time.monotonic() > deadline:
                self.print_stacks(self.processes)
                raise AssertionError(f"step {step} was not reached:\n{self.said()}")
            time.sleep(0.01)

    def print_stacks(self, processes: list[ForkServerProcess]) -> None:
        """Have those that are still there print where each of their threads is."""
        hanging = [process for process in processes if process.is_alive()]
        for process in hanging:
            assert process.pid is not None
            os.kill(process.pid, signal.SIGQUIT)
        if hanging:
            time.sleep(1.0)

    def said(self, rank: int | None = None) -> str:
        """What a process, or all of them, printed."""
        logs = self.logs if rank is None else [self.logs[rank]]
        return "\n".join(f"-- {log.name}\n{log.read_text()}" for log in logs if log.exists())


def train(store: Path | Callable[..., FitResult], run: Path, config: EngineConfig, size: int) -> str:
    """Train with that many processes; what they printed."""
    with Team(store, run, config, size) as team:
        assert team.wait() == [0] * size, team.said()
        return team.said()


def train_alone(store: Path, run: Path, config: PretrainConfig) -> Path:
    """Train in this process, to the end; the run."""
    assert pretrain(store, run, config).finished
    return run


def steps_done(run: Path) -> int:
    """Steps logged so far, with ``log_every`` 1."""
    path = run / METRICS_FILE
    return path.read_text().count("\n") if path.exists() else 0


def assert_same_losses(
    run: Path, expected: Path, rank: int = 0, steps: int | None = None, losses: Sequence[str] = LOSSES
) -> None:
    """Every loss of every step, or of the first, within 1e-5 of those of another run."""
    records, wanted = (records[:steps] for records in (read_metrics(run, rank), read_metrics(expected)))
    assert steps is None or len(records) == steps
    assert [record["step"] for record in records] == [record["step"] for record in wanted]
    for name in losses:
        worst = max(abs(a[name] - b[name]) for a, b in zip(records, wanted, strict=True))
        assert worst < 1e-5, (name, worst)
