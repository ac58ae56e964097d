"""Where the time of the pretraining step goes: a trace for chrome://tracing or Perfetto, and a summary.

``python -m benchmarks.profile_step [--device cpu] [--batch B] [--steps N] [--without-mftd] [--compiled]
[--trace step.json]``

What runs is what training does on the device: a ViT-B on CUDA, a small network on the CPU.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from meduet_fast.engine.parallel import compile_blocks
from meduet_fast.pretraining import ObjectiveConfig, OptimizerConfig

from .command import device_argument
from .harness import synchronize
from .step_parts import SMALL, VIT_BASE, OurStep, Setting, make_batch, make_models
from .tables import Table, duration, plain, three

SHOWN = 20  # rows of the table
WARM_UP = 3  # steps before those that are recorded


class Usage(NamedTuple):
    """What a device did over a span of time, in microseconds.

    Attributes:
        span: from the first begin to the last end.
        busy: in which something ran.
        gaps: how often nothing did.
        longest_gap: the longest time in which nothing ran.
    """

    span: float
    busy: float
    gaps: int
    longest_gap: float


def usage(intervals: Iterable[tuple[float, float]]) -> Usage:
    """Of (begin, end) in microseconds, which may overlap and come in any order."""
    ordered = sorted(intervals)
    if not ordered:
        return Usage(0.0, 0.0, 0, 0.0)
    reached = ordered[0][0]
    busy, gaps = 0.0, []
    for begin, end in ordered:
        if begin > reached:
            gaps.append(begin - reached)
        busy += max(0.0, end - max(begin, reached))
        reached = max(reached, end)
    return Usage(reached - ordered[0][0], busy, len(gaps), max(gaps, default=0.0))


def step_to_profile(
    setting: Setting, batch: int, mftd: bool, compiled: bool, device: torch.device
) -> Callable[[], object]:
    """What training does on the device, on a batch that is at hand."""
    models = make_models(setting.model, device)
    if compiled:
        compile_blocks(block for model in models for block in model.transformer_blocks())
    step = OurStep(*models, OptimizerConfig(), ObjectiveConfig(mftd=mftd))
    inputs = make_batch(setting.model, batch, device)
    return lambda: step(*inputs)


def record(step: Callable[[], object], steps: int, device: torch.device) -> profile:
    """Run some steps to warm up, then record some."""
    for _ in range(WARM_UP):
        step()
    synchronize(device)
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
    with profile(activities=activities) as recorded:
        for _ in range(steps):
            step()
        synchronize(device)
    return recorded


def kernels(recorded: profile) -> Table:
    """What took most time: kernels on CUDA, else operators without what they called."""
    events = recorded.events() or []
    on_device = [event for event in events if event.device_type == DeviceType.CUDA]
    totals: dict[str, tuple[float, int]] = {}
    for event in on_device or events:
        taken = event.time_range.elapsed_us() if on_device else event.self_cpu_time_total
        before, count = totals.get(event.name, (0.0, 0))
        totals[event.name] = before + taken, count + 1
    everything = sum(taken for taken, _ in totals.values()) or 1.0
    ordered = sorted(totals.items(), key=lambda item: -item[1][0])[:SHOWN]
    rows = [
        [f"{three(100 * taken / everything)} %", duration(taken), str(count), name[:70]]
        for name, (taken, count) in ordered
    ]
    return Table(["share", "time", "calls", "kernel" if on_device else "operator"], rows)


def summary(recorded: profile, steps: int, batch: int) -> str:
    """Time of a step, use of the device, and what took most time."""
    events = recorded.events() or []
    on_device = [event for event in events if event.device_type == DeviceType.CUDA]
    ranges = [event.time_range for event in on_device or events]
    found = usage((item.start, item.end) for item in ranges)
    seconds = found.span / steps / 1e6
    lines = [
        f"{duration(found.span / steps)} a step, {three(batch / seconds)} samples/s, while being recorded"
    ]
    if on_device:
        idle = 100 * (1 - found.busy / found.span)
        lines.append(
            f"device idle for {three(idle)} % of the time, the host being late: {found.gaps // steps} gaps "
            f"a step, the longest {duration(found.longest_gap)}; {len(on_device) // steps} kernels a step"
        )
    return "\n".join([*lines, "", plain(kernels(recorded))])


def positive(text: str) -> int:
    """For argparse: a whole number from 1 on."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}, expected a whole number of at least 1")
    return int(text)


def main(arguments: Sequence[str] | None = None, small: Setting = SMALL) -> int:
    """The command; returns the exit code.

    Args:
        small: the network for the CPU.
    """
    parser = argparse.ArgumentParser(prog="python -m benchmarks.profile_step", description=__doc__)
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument(
        "--device", type=device_argument, default=default, help="default: a GPU if there is one"
    )
    parser.add_argument("--batch", type=positive, help="even; default 64 on CUDA, 8 on the CPU")
    parser.add_argument("--steps", type=positive, default=3, help="recorded steps, default 3")
    parser.add_argument("--without-mftd", action="store_true")
    parser.add_argument("--compiled", action="store_true", help="with the transformer blocks compiled")
    parser.add_argument("--trace", type=Path, default=Path("step.json"), help="default step.json")
    options = parser.parse_args(arguments)
    gpu = options.device.type == "cuda"
    batch = options.batch or (64 if gpu else 8)
    if batch % 2:
        parser.error(f"--batch is {batch}, expected an even number: sample i is mixed with sample B-1-i")
    setting = VIT_BASE if gpu else small
    step = step_to_profile(setting, batch, not options.without_mftd, options.compiled, options.device)
    recorded = record(step, options.steps, options.device)
    try:
        options.trace.parent.mkdir(parents=True, exist_ok=True)
        recorded.export_chrome_trace(str(options.trace))
    except (OSError, RuntimeError) as error:
        parser.error(f"--trace {options.trace}: {error}")
    print(f"{setting.name} B={batch}\n{summary(recorded, options.steps, batch)}\n\n{options.trace}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
