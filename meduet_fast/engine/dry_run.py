"""Describe a run before it starts: processes, batch, steps and compute of any task."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from torch import Tensor

from meduet_fast.devices import select_device
from meduet_fast.files import refuse_unwritable
from meduet_fast.layers import set_attention_backend
from meduet_fast.lock import refuse_held
from meduet_fast.weight_files import listed

from .checkpoint import find_start
from .config import EngineConfig
from .distributed import launch_number, launched, refuse_lone_tasks
from .loggers import require_loggers
from .loop import refuse_graph
from .parallel import shard_count
from .precision import use_float8
from .task import Task

Rows = list[tuple[str, str]]


def check_start(
    task: Task, config: EngineConfig, output: Path | None, data: str | None, resume: bool, processes: int
) -> None:
    """Refuse what :func:`~meduet_fast.engine.fit` would refuse before its first step; nothing is written.

    Args:
        task: may be on the meta device.
        config: of the run.
        output: the run's folder, if there is one yet.
        data: identity of its data, if there are some yet.
        resume: whether a run that is there would go on.
        processes: of the run.

    Raises:
        UserError: as :func:`~meduet_fast.engine.fit`.
    """
    if not launched():
        refuse_lone_tasks()
    device = select_device(config.device)
    set_attention_backend(config.attention, device)
    require_loggers(config.loggers)
    if config.precision == "float8":
        use_float8(list(task.blocks()), device)
    if config.cuda_graph:
        refuse_graph(device, processes, launched())
    if output is not None:
        refuse_unwritable(output)
        refuse_held(output)
        find_start(output, config, processes, data, resume)


def si(value: float, unit: str) -> str:
    """Return four digits with a decimal prefix: 8.375e11 FLOP -> 837.5 GFLOP."""
    prefixes = " kMGTPEZ"
    power = next((n for n in range(len(prefixes)) if value < 999.95 * 1000**n), len(prefixes) - 1)
    return f"{value / 1000**power:.4g} {prefixes[power].strip()}{unit}"


def count_tensors(what: str, tensors: Mapping[str, Tensor]) -> str:
    """Return a line of a table: what it is about, how many tensors and values, and of which parts."""
    parts = list(dict.fromkeys(name.split(".")[0] for name in tensors))
    count = si(sum(value.numel() for value in tensors.values()), "").strip()
    named = f": {listed(parts, most=20)}" if parts else ""
    return f"{what:10}  {len(tensors)} tensor{'s' * (len(tensors) != 1)}, {count} parameters{named}"


def describe_run(
    task: Task,
    config: EngineConfig,
    processes: int = 1,
    local: int | None = None,
    losses: Callable[[int], str] = lambda step: "",
) -> Rows:
    """Return what a run will be, in rows of a heading and a text.

    Args:
        task: may be on the meta device: nothing is computed.
        config: of the run.
        processes: as many as GPUs.
        local: those of one machine; all of them if None.
        losses: names what is on in a step.

    Raises:
        UserError: if the processes do not fit the configuration.
    """
    shards = shard_count(config, processes, local or processes)
    per_step = config.batch_size * config.accumulate * processes
    mesh = "1 GPU"
    if processes > 1:
        copies = {"ddp": "a copy of all weights on each", "fsdp": "one copy, sharded over all"}
        several = f"{processes // shards} copies, each sharded over {shards}"
        mesh = (
            f"{processes} processes, one GPU each: {copies.get(config.parallel, several)} ({config.parallel})"
        )
    rows: Rows = [
        ("mesh", mesh),
        ("batch", f"{config.batch_size} {task.sample}s at once x {config.accumulate} accumulated x "
                  f"{processes} = {per_step} {task.sample}s a step"),
        ("steps", f"{config.steps}, {config.steps * per_step} {task.sample}s"),
    ]  # fmt: skip
    starts = sorted({start for start in (0, *task.phase_starts()) if start < config.steps})
    total = 0
    for start, end in zip(starts, [*starts[1:], config.steps], strict=True):
        flops = task.flops(start)
        if flops is None:
            return rows
        total += flops * (end - start) * per_step
        what = f": {losses(start)}" if losses(start) else ""
        rows.append(("compute", f"{si(flops, 'FLOP')} a {task.sample} from step {start} on{what}"))
    return [*rows, ("compute", f"{si(total, 'FLOP')} in all")]


def print_plan(form: Callable[[int, int], str]) -> None:
    """Print the plan of a run for the processes that torchrun started, once.

    Args:
        form: formats it, for so many processes in all and on this machine.

    Raises:
        UserError: as ``form``; for variables of a launcher that make no sense.
    """
    processes = launch_number("WORLD_SIZE", 1)
    if launch_number("RANK", 0) == 0:
        print(form(processes, launch_number("LOCAL_WORLD_SIZE", processes)))


def format_rows(rows: Sequence[tuple[str, str]]) -> str:
    """Return rows as text, a heading once."""
    lines, last = [], ""
    for name, text in rows:
        lines.append(f"{'' if name == last else name:12}{text}")
        last = name
    return "\n".join(lines)


def format_table(rows: Sequence[Sequence[str]]) -> str:
    """Return rows, of which the first has the headings, as a Markdown table."""
    lines = [rows[0], ["---"] * len(rows[0]), *rows[1:]]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
