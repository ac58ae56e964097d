"""The script for SLURM, run on one machine that stands in for two nodes of two devices."""

from __future__ import annotations

import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import yaml

from meduet_fast.engine.checkpoint import checkpoint_steps, latest_checkpoint
from meduet_fast.engine.checkpoint_index import INDEX_FILE
from meduet_fast.pretraining import PretrainConfig

from .team import PATIENCE_S, assert_same_losses, steps_done, train_alone

SCRIPT = Path(__file__).parents[2] / "docs" / "slurm.sh"
STEPS, SIZE = 40, 4


@pytest.fixture
def config(tiny_settings: PretrainConfig) -> PretrainConfig:
    """As many batches a step as there will be processes; crops are read beside."""
    return replace(
        tiny_settings, steps=STEPS, accumulate=SIZE, siqc_start_step=3, mftd_start_step=10,
        checkpoint_every=1000, workers=1,
    )  # fmt: skip


class Cluster:
    """Two nodes of two devices.

    Args:
        folder: for the commands that stand in for SLURM's.
    """

    def __init__(self, folder: Path) -> None:
        self.nodes, self._log = folder / "nodes", folder / "slurm-7.out"
        commands = folder / "bin"
        commands.mkdir()
        srun = shlex.join([sys.executable, str(Path(__file__).with_name("srun.py"))])
        for name, line in {
            "srun": f'exec {srun} "$@"',
            "scontrol": '[ "$*" = "show hostnames node[1-2]" ] && printf "127.0.0.1\\nnode2\\n"',
        }.items():
            (commands / name).write_text(f"#!/bin/sh\n{line}\n")
            (commands / name).chmod(0o755)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.env = {
            **os.environ,
            "PATH": f"{commands}:{Path(sys.executable).parent}:{os.environ['PATH']}",
            "NODES": str(self.nodes), "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1",
            "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_NNODES": "2",
            "SLURM_GPUS_ON_NODE": "2", "SLURM_CPUS_PER_TASK": "1",
        }  # fmt: skip

    @contextmanager
    def submit(self, *arguments: str) -> Iterator[subprocess.Popen[bytes]]:
        """``sbatch docs/slurm.sh ARGUMENTS``, running in the ``with``; nothing of it is left after."""
        self.nodes.unlink(missing_ok=True)
        with self._log.open("wb") as log:
            job = subprocess.Popen(
                ["bash", str(SCRIPT), *arguments], env=self.env, stdout=log, stderr=subprocess.STDOUT
            )
        try:
            yield job
        finally:
            if job.poll() is None:
                for pid in _descendants(job.pid):
                    with suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
                job.wait()

    def said(self) -> str:
        """What the job printed."""
        return self._log.read_text()

    def time_is_up(self) -> None:
        """SIGTERM to the launcher of the first node, and to all processes of the second."""
        first, second = (int(pid) for pid in self.nodes.read_text().split())
        for pid in [first, *_descendants(second)]:
            os.kill(pid, signal.SIGTERM)


def _descendants(pid: int) -> list[int]:
    """A process, those that it started, and so on."""
    found = [pid]
    for parent in found:
        for children in Path(f"/proc/{parent}/task").glob("*/children"):
            found.extend(int(child) for child in children.read_text().split())
    return found


@pytest.mark.slow
def test_slurm_script_goes_on_where_the_time_was_up(
    tiny_store: Path, config: PretrainConfig, tmp_path: Path
) -> None:
    """The same line twice: the first time the job gets SIGTERM after a few steps."""
    run, settings, alone = tmp_path / "run", tmp_path / "config.yaml", tmp_path / "alone"
    settings.write_text(yaml.safe_dump(asdict(replace(config, accumulate=1))))
    arguments = [
        "--config", str(settings), "--data", str(tiny_store), "--output", str(run), "--parallel", "hsdp",
    ]  # fmt: skip
    cluster = Cluster(tmp_path)
    with cluster.submit(*arguments) as job:
        deadline = time.monotonic() + PATIENCE_S
        while steps_done(run) < 5:
            assert job.poll() is None, cluster.said()
            assert time.monotonic() < deadline, cluster.said()
            time.sleep(0.02)
        cluster.time_is_up()
        job.wait(30)
    assert job.returncode, cluster.said()
    assert cluster.said().count(f"{run}: stopped by SIGTERM after step") == 1, cluster.said()
    (last,) = checkpoint_steps(run / "checkpoints")
    assert steps_done(run) == last < STEPS, cluster.said()
    with cluster.submit(*arguments) as job:
        job.wait(PATIENCE_S)
    assert job.returncode == 0, cluster.said()
    assert cluster.said().count(f"{STEPS} steps done") == 1, cluster.said()
    train_alone(tiny_store, alone, replace(config, workers=0))
    for rank in range(SIZE):
        assert_same_losses(run, alone, rank)
    # Without --shard_size a copy is shared by the two processes of a node: so LOCAL_WORLD_SIZE was theirs.
    index = json.loads((latest_checkpoint(run) / "state" / INDEX_FILE).read_text())
    assert len(index["student.blocks.0.mlp.fc1.weight"]["parts"]) == SIZE // 2
