"""One of several processes that exchange all kinds of messages: run by path, its settings in its globals."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

import torch

from meduet_fast.connections import descriptors
from meduet_fast.engine.checkpoint import CheckpointWriter
from meduet_fast.engine.distributed import join_world


def sockets() -> int:
    found = 0
    for number in descriptors():
        with suppress(OSError):  # of the list itself
            found += str(Path(f"/proc/self/fd/{number}").readlink()).startswith("socket:")
    return found


def main(env: dict[str, str], folder: Path) -> None:
    torch.set_num_threads(1)
    os.environ.update(env)
    before = sockets()
    with join_world("cpu", timeout_s=60) as world:
        world.require_same("the number", "1")
        assert world.mean([float(world.rank)]) == [(world.size - 1) / 2]
        world.on_first(lambda: None)
        checkpoint = CheckpointWriter(folder, {}, 1, world)._all
        plan = checkpoint.reduce_scatter(
            "plan", lambda: world.rank, lambda ranks: [2 * rank for rank in ranks]
        )
        assert plan == 2 * world.rank
        assert checkpoint.all_reduce("write", lambda: 1, sum) == world.size
        world.barrier()
        (folder / f"{world.rank}.txt").write_text(str(sockets() - before))


main(**globals()["settings"])
