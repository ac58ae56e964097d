"""Stands in for SLURM's ``srun`` on one machine: starts a command once for every node."""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import time
from pathlib import Path


def main() -> int:
    """Returns the highest exit code; process numbers of the nodes' commands go to the file ``$NODES``."""
    parser = argparse.ArgumentParser("srun")
    parser.add_argument("--kill-on-bad-exit", choices=["1"], required=True)
    parser.add_argument("--cpus-per-task", choices=[os.environ["SLURM_CPUS_PER_TASK"]], required=True)
    parser.add_argument("command", nargs=argparse.REMAINDER)
    arguments = parser.parse_args()
    nodes = []
    for number in map(str, range(int(os.environ["SLURM_NNODES"]))):
        env = {**os.environ, "SLURM_NODEID": number, "SLURM_PROCID": number, "SLURM_LOCALID": "0"}
        # A signal to the batch script or to srun does not reach them.
        nodes.append(subprocess.Popen(arguments.command, env=env, start_new_session=True))
    Path(os.environ["NODES"]).write_text(" ".join(str(node.pid) for node in nodes))
    while any(node.poll() is None for node in nodes):
        time.sleep(0.05)
        if any(node.returncode for node in nodes):
            for node in nodes:
                node.send_signal(signal.SIGTERM)
                node.wait(30)
    return max(node.returncode if node.returncode >= 0 else 128 - node.returncode for node in nodes)


if __name__ == "__main__":
    raise SystemExit(main())
