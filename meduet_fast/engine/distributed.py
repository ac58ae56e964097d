"""The processes of a run: how they find each other, agree, and learn of each other's failures.

They are started by torchrun, or by anything that sets the same environment variables. Without these there is
one process, and nothing here talks to anybody.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from meduet_fast.connections import hang_up
from meduet_fast.devices import select_device
from meduet_fast.errors import UserError

HEARTBEAT_S = 2.0  # between two looks at the store
REPORT_S = 5.0  # how long processes that lost another wait for each other's word
SLURM_NO_STEP = 2**32 - 6  # from here on SLURM numbers what srun did not start: batch scripts, shells
MPI_SIZES = "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE"
VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@dataclass
class World:
    """This process among those of the run.

    Attributes:
        device: where this process computes.
        rank: number of this process; 0 is the one that prints and writes what there is one of.
        size: how many there are.
        local_size: how many of them are on this machine.
        store: key-value store of all processes; None if there is one process.
        control: group for short messages on the host, which no message on the device holds up.
        writing: group of the checkpoint's writers, which may run beside everything else.
    """

    device: torch.device
    rank: int = 0
    size: int = 1
    local_size: int = 1
    store: dist.Store | None = None
    control: dist.ProcessGroup | None = None
    writing: dist.ProcessGroup | None = None
    _seen: float = 0.0

    @property
    def grouped(self) -> bool:
        """Tell whether there are other processes, or may be."""
        return self.store is not None

    def barrier(self) -> None:
        """Wait for all processes."""
        self.mean([0.0])

    def require_same(self, what: str, value: str) -> None:
        """Refuse a value that differs between processes; all must call this at the same place.

        Raises:
            UserError: naming two of the values.
        """
        if self.grouped:
            values = [value] * self.size
            dist.all_gather_object(values, value, group=self.control)
            other = next((rank for rank in range(self.size) if values[rank] != values[0]), None)
            if other is not None:
                raise UserError(f"{what}: rank 0 has {values[0]}, rank {other} has {values[other]}")

    def mean(self, values: Sequence[float]) -> list[float]:
        """Average each value over all processes; all must call this at the same place."""
        if not self.grouped:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total, group=self.control)
        return (total / self.size).tolist()

    def on_first(self, task: Callable[[], None]) -> None:
        """Do something on rank 0 while the others of group ``writing`` wait; all of them raise its errors.

        Raises:
            OSError: as the task did.
        """
        error: OSError | None = None
        if self.rank == 0:
            try:
                task()
            except OSError as raised:
                error = raised
        if self.grouped:
            errors: list[OSError | None] = [None] * self.size
            dist.all_gather_object(errors, error, group=self.writing)
            error = errors[0]
        if error is not None:
            raise error

    def fail(self, why: str) -> None:
        """Tell the other processes why this one ends."""
        if self.store is not None:
            self.store.set(f"failed/{self.rank}", why)

    def look_at_store(self) -> None:
        """Ask the store now and then: a run whose launcher is gone must end, since nobody could stop it.

        Raises:
            torch.distributed.DistError: if the store does not answer.
        """
        if self.store is not None and time.monotonic() - self._seen > HEARTBEAT_S:
            self.store.set(f"alive/{self.rank}", str(int(time.time())))
            self._seen = time.monotonic()


def launched() -> bool:
    """Tell whether this process is one of those that a launcher such as torchrun started."""
    return not {"RANK", "WORLD_SIZE"}.isdisjoint(os.environ)


def refuse_lone_tasks() -> None:
    """Refuse to be one of several tasks that do not know of each other: all would write the same run.

    In a batch script of SLURM and in a shell of an allocation there is one process, whatever the number of
    tasks that were asked for.

    Raises:
        UserError: if srun or an MPI launcher started several, and nothing says how they find each other.
    """
    set_to = {name: int(value) for name, value in os.environ.items() if value.isdecimal()}
    task = set_to.get("SLURM_PROCID")
    by_srun = task or "SLURM_STEP_NUM_TASKS" in set_to
    by_srun = by_srun or set_to.get("SLURM_STEP_ID", SLURM_NO_STEP) < SLURM_NO_STEP
    names = [*MPI_SIZES]
    if task is not None and by_srun:
        names.insert(0, "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in set_to else "SLURM_NTASKS")
    for name in names:
        if set_to.get(name, 1) > 1:
            raise UserError(
                f"this is one of {set_to[name]} tasks ({name}) that do not know of each other: RANK and "
                "WORLD_SIZE are not set. Start one torchrun on each node (srun --ntasks-per-node=1 torchrun "
                f"--nnodes=... -m meduet_fast ..., as docs/slurm.sh does), or set {', '.join(VARIABLES)} in "
                f"each task; for a run of a single process start one task, or unset {name}"
            )


def lost_contact(error: BaseException | None) -> bool:
    """Tell whether an error says that another process, or the store, did not answer."""
    while error is not None:
        if isinstance(error, CheckpointException):
            return any(lost_contact(wrapped[0]) for wrapped in error.failures.values())
        if isinstance(error, dist.DistError):
            return True
        # gloo's errors have no type of their own; the last word is that of TORCH_DISTRIBUTED_DEBUG=DETAIL.
        words = "gloo", "NCCL", "monitoredBarrier"
        if type(error) is RuntimeError and any(word in str(error) for word in words):
            return True
        error = error.__cause__
    return False


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text if isinstance(error, UserError) else f"{type(error).__name__}: {text}"


def _explain(world: World, error: Exception) -> Exception:
    """Return what to raise for an error, after telling the other processes, or after hearing theirs."""
    store = world.store
    assert store is not None
    prefix = f"rank {world.rank} of {world.size}"
    if not lost_contact(error):
        with suppress(dist.DistError):  # gone as well: the others find out by themselves
            world.fail(_one_line(error))
        return UserError(f"{prefix}: {error}") if isinstance(error, UserError) else error
    # Tells the others sooner than any time-out. Leaving the groups would not: much else keeps them alive.
    hang_up(int(os.environ["MASTER_PORT"]))
    others = [rank for rank in range(world.size) if rank != world.rank]
    try:
        store.set(f"lost/{world.rank}", "1")
        deadline = time.monotonic() + REPORT_S
        while True:
            failed = [rank for rank in others if store.check([f"failed/{rank}"])]
            silent = [rank for rank in others if not store.check([f"lost/{rank}"])]
            if failed or not silent or time.monotonic() > deadline:
                break
            time.sleep(0.05)
        if failed:
            told = "; ".join(f"rank {rank}: {store.get(f'failed/{rank}').decode()}" for rank in failed)
            return UserError(f"{prefix}: stopped, because another process failed: {told}")
    except (dist.DistError, RuntimeError):
        return UserError(
            f"{prefix}: stopped, because the store of the processes, which their launcher or rank 0 keeps at "
            f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}, is gone"
        )
    if silent:
        named = ", ".join(map(str, silent))
        return UserError(
            f"{prefix}: stopped, because rank {named} ended or hangs without a word (killed? out of memory?)"
        )
    return UserError(f"{prefix}: stopped, because the processes lost each other: {_one_line(error)}")


def launch_number(name: str, default: int | None = None) -> int:
    """Read a number that torchrun sets in the environment.

    Raises:
        UserError: if it is no number, or absent without a default.
    """
    value = os.environ.get(name, "" if default is None else str(default))
    if not value.isdecimal():
        raise UserError(f"environment variable {name} is {value!r}, expected a number, as torchrun sets it")
    return int(value)


def _join(device_name: str, timeout_s: int) -> World:
    missing = [name for name in VARIABLES if name not in os.environ]
    if missing:
        raise UserError(
            f"environment variables {', '.join(missing)} are not set though others of torchrun's are; "
            "start with torchrun"
        )
    rank, size, local_rank = (launch_number(name) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    local_size = launch_number("LOCAL_WORLD_SIZE", size)
    device = select_device(device_name)
    if device.type == "cuda" and device.index is None:
        device = select_device(f"cuda:{local_rank}")
        torch.cuda.set_device(device)
    timeout = timedelta(seconds=timeout_s)
    # Connects two processes when they first talk, not all with all, three times. All our messages go round
    # a ring, or to process 0 and back: sockets do not grow with the number of processes.
    os.environ.setdefault("TORCH_GLOO_LAZY_INIT", "1")
    try:
        store, rank, size = next(dist.rendezvous("env://", rank, size, timeout=timeout))
        dist.init_process_group(
            "cuda:nccl,cpu:gloo" if device.type == "cuda" else "gloo",
            store=dist.PrefixStore("group", store),
            rank=rank,
            world_size=size,
            timeout=timeout,
        )
        control, writing = (dist.new_group(backend="gloo", timeout=timeout) for _ in range(2))
        world = World(device, rank, size, local_size, dist.PrefixStore("run", store), control, writing)
        world.barrier()  # who is absent is found out here
        return world
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"rank {rank} of {size}: could not join the others at {os.environ['MASTER_ADDR']}:"
            f"{os.environ['MASTER_PORT']} within {timeout_s} s: {_one_line(error)}"
        ) from error


@contextmanager
def join_world(device_name: str, timeout_s: int) -> Iterator[World]:
    """Join the other processes of the run for the time of the ``with``.

    An error in one process ends all of them: each raises, and says which one failed and why.

    Args:
        device_name: as in :func:`meduet_fast.devices.select_device`; "auto" and "cuda" take the GPU of this
            process's number on its machine.
        timeout_s: how long to wait for another process before giving up.

    Raises:
        UserError: if they can't be reached; if another one failed; as raised within.
    """
    if not launched():
        refuse_lone_tasks()
        yield World(select_device(device_name))
        return
    world = _join(device_name, timeout_s)
    try:
        yield world
        world.barrier()  # whoever is done first must not look as if it had been lost
    except Exception as error:
        explained: Any = _explain(world, error)
        if "TORCHELASTIC_ERROR_FILE" in os.environ:  # for torchrun's own summary of who failed first
            from torch.distributed.elastic.multiprocessing.errors import get_error_handler

            get_error_handler().record_exception(explained)
        if explained is error:
            raise
        raise explained from error
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
