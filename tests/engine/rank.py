"""One process of a run, with a fault: run by path in a forked child, its settings put into its globals."""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import resource
import shutil
import signal
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import FileSystemWriter

from meduet_fast.data.store import LatentStore
from meduet_fast.data.store_index import LATENTS
from meduet_fast.engine import EngineConfig, FitResult
from meduet_fast.engine.checkpoint import CheckpointWriter
from meduet_fast.errors import UserError

HANGS = "hangs from here on"  # test_stop.py waits for it


def before(owner: Any, name: str, count: int, act: Callable[[], None]) -> None:
    """Do something before the call of that number, counted from 0, of a method."""
    original, calls = getattr(owner, name), 0

    def called(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        if calls == count:
            act()
        calls += 1
        return original(*args, **kwargs)

    setattr(owner, name, called)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def hang() -> None:
    print(HANGS, file=sys.stderr, flush=True)
    time.sleep(1000)


def crash() -> None:
    raise ZeroDivisionError("a mistake in the program")


def poison() -> None:
    original = LatentStore.read_crops
    LatentStore.read_crops = lambda *args: original(*args) * float("nan")  # type: ignore[method-assign]


def before_reads(spoil: Callable[[LatentStore], None]) -> None:
    """From the next call on."""
    original = LatentStore.read_crops

    def read_crops(self: LatentStore, *args: Any) -> torch.Tensor:
        spoil(self)
        return original(self, *args)

    LatentStore.read_crops = read_crops  # type: ignore[method-assign]


def lose_latents(store: LatentStore) -> None:
    shutil.rmtree(store.path / LATENTS, ignore_errors=True)


def cut_latents(store: LatentStore) -> None:
    for path in (store.path / LATENTS).iterdir():
        os.truncate(path, 100)


def fill_disk() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))


# name -> where it strikes, what it does
FAULTS: dict[str, tuple[Any, str, Callable[[], None]]] = {
    "killed in a step": (torch.optim.AdamW, "step", die),
    "killed in a checkpoint": (FileSystemWriter, "write_data", die),
    "a mistake": (LatentStore, "read_crops", crash),
    "a bad batch": (LatentStore, "read_crops", poison),
    "latents lost": (LatentStore, "read_crops", partial(before_reads, lose_latents)),
    "latents cut": (LatentStore, "read_crops", partial(before_reads, cut_latents)),
    "a reader killed": (LatentStore, "read_crops", die),
    "a full disk": (CheckpointWriter, "save", fill_disk),
    "hangs in a step": (torch.optim.AdamW, "step", hang),
    "hangs in a checkpoint": (FileSystemWriter, "write_data", hang),
    "hangs in a reader": (LatentStore, "read_crops", hang),
    "asked to stop": (torch.optim.AdamW, "step", lambda: os.kill(os.getpid(), signal.SIGTERM)),
    "stopped": (torch.optim.AdamW, "step", lambda: os.kill(os.getpid(), signal.SIGSTOP)),
}


def main(
    train: Callable[..., FitResult], run: Path, config: EngineConfig, log: Path, env: dict[str, str],
    fault: str, count: int,
) -> None:  # fmt: skip
    """Train as the command line would, with everything printed to ``log``."""
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(output, stream)
    faulthandler.enable()
    faulthandler.register(signal.SIGQUIT, file=2)  # from the first moment on, and to the last
    multiprocessing.set_start_method("fork", force=True)  # readers start as they do under torchrun
    os.environ.update(env)
    torch.set_num_threads(1)
    if fault:
        owner, name, act = FAULTS[fault]
        before(owner, name, count, act)
    try:
        result = train(run, config, resume=True)
    except UserError as error:
        print(error, file=sys.stderr, flush=True)
        sys.exit(2)
    print(result, flush=True)


main(**globals()["settings"])
