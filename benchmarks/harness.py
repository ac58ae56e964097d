"""Timing that can be trusted: correct first, variants in turns, medians with their spread.

A case is one computation, done by several variants. No variant is timed before its check is green. Then all
take turns, A B C A B C, so that a machine that slows down slows down all of them, and neighbouring calls
give the ratios. On CUDA the device's own time counts (events), behind a short wait that lets the host run
ahead; the host's time is a figure of its own.
"""

from __future__ import annotations

import gc
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, NamedTuple

import numpy as np
import torch

from .results import Row
from .tables import OURS

WRONG = "not correct: "
OUT_OF_TIME = "the time for this benchmark was spent"
MIN_ROUNDS, MAX_ROUNDS = 3, 200
_MAX_WAIT = 0.02  # seconds that the device is kept waiting for the host, at most
_LONG = 0.1  # seconds of a call to which it makes no difference what a cache held at its start
_CLOCK = 2e9  # cycles a second, about; the wait need not be exact


@dataclass(frozen=True)
class Variant:
    """One way to do a case's computation.

    Attributes:
        name: "ours" for the project's fastest form.
        call: does it once.
        check: raises AssertionError if the result is not right; None for the definition itself.
        unavailable: why it cannot be timed, for example "xformers is not installed".
    """

    name: str
    call: Callable[[], object] = lambda: None
    check: Callable[[], object] | None = None
    unavailable: str = ""


@dataclass(frozen=True)
class Case:
    """One computation; the fields up to ``flops`` are those of :class:`~benchmarks.results.Row`.

    Attributes:
        build: makes inputs and variants; called when it is the case's turn, so that few inputs exist at once.
        per_call: what a call gets done, for rates: {"samples": 64} gives ``samples_per_s``.
        clock: "device" is the device's own time, "wall" includes the host's, as a training loop sees it. The
            same on the CPU.
        names: of the variants, where they are to be known before ``build``: pytest asks for them.
    """

    bench: str
    name: str
    dtype: str
    direction: str
    shape: dict[str, int]
    bytes: int | None
    flops: int | None
    build: Callable[[], Sequence[Variant]]
    per_call: Mapping[str, float] = field(default_factory=dict)
    clock: Literal["device", "wall"] = "device"
    names: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.name} {self.direction} {self.dtype}".strip()

    def row(self, variant: str, **measured: Any) -> Row:
        """A row with the case's own fields."""
        return Row(
            self.bench, self.name, variant, self.direction, self.dtype, self.shape,
            bytes=self.bytes, flops=self.flops, **measured,
        )  # fmt: skip


class Sample(NamedTuple):
    """Seconds of one call: by the case's clock, and of the host alone."""

    seconds: float
    host: float


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def sample(call: Callable[[], object], device: torch.device) -> Sample:
    """One call by the wall clock, with the device's work."""
    synchronize(device)
    begin = time.perf_counter()
    call()
    host = time.perf_counter() - begin
    synchronize(device)
    return Sample(time.perf_counter() - begin, host)


def sample_device(call: Callable[[], object], wait: float, before: Callable[[], object]) -> Sample:
    """One call by the device's clock.

    Args:
        call: what is timed.
        wait: seconds that the device waits first, so that the host is ahead of it.
        before: leaves the caches as wanted.
    """
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    before()
    torch.cuda._sleep(int(min(wait, _MAX_WAIT) * _CLOCK))
    start.record()
    begin = time.perf_counter()
    call()
    host = time.perf_counter() - begin
    end.record()
    end.synchronize()
    return Sample(start.elapsed_time(end) / 1e3, host)


def rounds(samplers: Mapping[str, Callable[[], Sample]], budget_s: float) -> dict[str, list[Sample]]:
    """Sample all in turns, until the budget is spent: 3 rounds at least, 200 at most."""
    taken: dict[str, list[Sample]] = {name: [] for name in samplers}
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        begin = time.perf_counter()
        for number in range(MAX_ROUNDS):
            if number >= MIN_ROUNDS and time.perf_counter() - begin > budget_s:
                break
            for name, take in samplers.items():
                taken[name].append(take())
    finally:
        if enabled:
            gc.enable()
    return taken


def figures(seconds: Mapping[str, Sequence[float]], name: str) -> dict[str, Any]:
    """The times of one variant as fields of a row.

    Args:
        seconds: by variant, of a call in each round.
        name: of the variant; the ratios are the others' times over its own, round by round.
    """
    own = np.array(seconds[name])
    low, median, high = np.quantile(own, [0.1, 0.5, 0.9]).tolist()
    beside = {other: np.array(values) / own for other, values in seconds.items() if other != name}
    return {
        "median_us": 1e6 * median,
        "low_us": 1e6 * low,
        "high_us": 1e6 * high,
        "repeats": len(own),
        "ratios": {other: float(np.median(values)) for other, values in beside.items()},
        "ratio_spread": {
            other: (float(np.quantile(values, 0.1)), float(np.quantile(values, 0.9)))
            for other, values in beside.items()
        },
    }


def peak_memory(call: Callable[[], object], device: torch.device) -> int | None:
    """Bytes that a call allocates above what is there already, at the worst moment; None on the CPU."""
    if device.type != "cuda":
        return None
    synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    call()
    synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def first_line(error: BaseException) -> str:
    """Of its message, for tables and error lines."""
    return (str(error).strip().splitlines() or ["no message"])[0][:200]


def not_importable(error: ImportError) -> str:
    """Why a row is not available."""
    if isinstance(error, ModuleNotFoundError):
        return f"{error.name} is not installed"
    return f"cannot be imported: {first_line(error)}"


def obstacle(variant: Variant, device: torch.device) -> str:
    """Check and warm up; why the variant cannot be timed, or "".

    A check that fails is an error of the run (:func:`failures`), and so is anything that stops ours. A peer
    that cannot run here, or does not fit into memory, is not.
    """
    if variant.unavailable:
        return variant.unavailable
    try:
        if variant.check:
            variant.check()
        variant.call()
        synchronize(device)
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        return "out of memory"
    except AssertionError as error:
        return WRONG + first_line(error)
    except Exception as error:  # a peer may fail in any way
        reason = f"{type(error).__name__}: {first_line(error)}"
        return WRONG + reason if variant.name == OURS else reason
    return ""


def _cold(device: torch.device) -> Callable[[], object]:
    """Overwrites twice the L2 cache."""
    size = 2 * torch.cuda.get_device_properties(device).L2_cache_size
    return torch.empty(max(size, 2**20), dtype=torch.uint8, device=device).zero_


def time_case(case: Case, device: torch.device, budget_s: float = 1.0) -> list[Row]:
    """Check and time all variants of a case.

    Args:
        case: what to time.
        device: where its inputs are.
        budget_s: seconds for the timed rounds, checks and compilation not counted.

    Returns:
        A row for each variant, unavailable ones too.
    """
    try:
        variants = case.build()
    except torch.OutOfMemoryError:
        return [case.row(OURS, unavailable="out of memory")]
    except AssertionError as error:
        return [case.row(OURS, unavailable=WRONG + first_line(error))]
    reasons = {variant.name: obstacle(variant, device) for variant in variants}
    calls = {variant.name: variant.call for variant in variants if not reasons[variant.name]}
    cold: dict[str, list[Sample]] = {}
    if device.type == "cuda" and case.clock == "device":
        first = {name: sample(call, device) for name, call in calls.items()}

        def samplers(before: Callable[[], object] | None) -> dict[str, Callable[[], Sample]]:
            return {
                name: partial(sample_device, call, 1.5 * first[name].host, before or call)
                for name, call in calls.items()
            }

        if any(one.seconds > _LONG for one in first.values()):
            taken = rounds(samplers(lambda: None), budget_s)
        else:
            cold = rounds(samplers(_cold(device)), budget_s / 3)
            taken = rounds(samplers(None), budget_s)
    else:
        taken = rounds({name: partial(sample, call, device) for name, call in calls.items()}, budget_s)
    seconds = {name: [one.seconds for one in samples] for name, samples in taken.items()}
    rows = []
    for variant in variants:
        name = variant.name
        if reasons[name]:
            rows.append(case.row(name, unavailable=reasons[name]))
            continue
        measured = figures(seconds, name)
        per_s = 1e6 / measured["median_us"]
        measured["extra"] = {f"{what}_per_s": amount * per_s for what, amount in case.per_call.items()}
        measured["peak_memory"] = peak_memory(variant.call, device)
        if device.type == "cuda":
            measured["host_us"] = 1e6 * statistics.median(one.host for one in taken[name])
        if cold:
            measured["cold_us"] = 1e6 * statistics.median(one.seconds for one in cold[name])
        rows.append(case.row(name, **measured))
    return rows


def time_cases(cases: Iterable[Case], device: torch.device, budget_s: float) -> Iterator[Row]:
    """Yield all cases' rows as they come; those that the budget (seconds, checks included) misses say so."""
    begin = time.perf_counter()
    for case in cases:
        left = budget_s - (time.perf_counter() - begin)
        if left <= 0:
            yield from (case.row(name, unavailable=OUT_OF_TIME) for name in case.names or (OURS,))
            continue
        yield from time_case(case, device, min(1.0, left / 4))
        print(f"  {case.bench}: {case}", file=sys.stderr, flush=True)


def failures(rows: Iterable[Row]) -> list[str]:
    """What was not right, one line each."""
    return [
        f"{row.bench}, {row.case}, {row.variant}, {row.direction} {row.dtype}: {row.unavailable}"
        for row in rows
        if row.unavailable.startswith(WRONG)
    ]


def _fastest(call: Callable[[], object], device: torch.device, budget_s: float) -> float:
    call()
    return min(one.seconds for one in rounds({"": lambda: sample(call, device)}, budget_s)[""])


def measure_peaks(device: torch.device) -> dict[str, float]:
    """What the machine reaches: bytes a second (read and written) of a large copy, FLOP/s of square products.

    Keys as in ``Results.peaks``. The best of some calls, within 5 seconds. float32 is without TF32.
    """
    gpu = device.type == "cuda"
    source = torch.ones(2**30 if gpu else 2**27, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds = _fastest(lambda: target.copy_(source), device, 0.5)
    peaks = {"copy_bytes_per_s": 2 * source.numel() / seconds}
    edge = 8192 if gpu else 1024
    for dtype in (torch.float32, torch.bfloat16, torch.float16)[: 3 if gpu else 2]:
        left, right = (torch.randn(edge, edge, device=device).to(dtype) for _ in range(2))
        seconds = _fastest(partial(torch.matmul, left, right), device, 0.7)
        peaks[f"matrix_flops_per_s_{str(dtype).removeprefix('torch.')}"] = 2 * edge**3 / seconds
    return peaks
