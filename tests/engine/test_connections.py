"""A process is connected to as many others whatever their number."""

from __future__ import annotations

import runpy
from pathlib import Path

import torch.distributed as dist

from .team import FORKSERVER


def sockets_of(folder: Path, size: int) -> list[int]:
    """Sockets of each process after all kinds of messages; process 0 has one for each of the others."""
    folder.mkdir()
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    script = str(Path(__file__).with_name("connections.py"))
    processes = []
    for rank in range(size):
        env = {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True",
        }  # fmt: skip
        settings = {"env": env, "folder": folder}
        processes.append(FORKSERVER.Process(target=runpy.run_path, args=(script, {"settings": settings})))
        processes[-1].start()
    for process in processes:
        process.join(90)
    assert [process.exitcode for process in processes] == [0] * size
    return [int((folder / f"{rank}.txt").read_text()) for rank in range(size)]


def test_sockets_do_not_grow_with_the_number_of_processes(tmp_path: Path) -> None:
    few, more = (sockets_of(tmp_path / str(size), size) for size in (4, 8))
    # Each talks to its neighbours, of which one may be process 0, and to process 0.
    assert max(more[1:]) <= max(few[1:]), (few, more)
