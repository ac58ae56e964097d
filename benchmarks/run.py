"""All benchmarks that suit a machine, one file of results, tables at the end.

``python -m benchmarks.run [--set cpu|gpu] [--only BENCH ...] [--seconds S] [--output FOLDER]``

The set "cpu" is made to take under 10 minutes on two cores and writes to ``benchmarks/results/<device>``.
"gpu" is made to take under 8 minutes on an H100; of packages, only torch and triton must be there. With
``--output`` all goes into one folder to carry home: results, tables, pictures; until they are complete, rows
are in ``unfinished.json`` there as soon as they are measured. Exit code 1: a result was not right, or a
benchmark failed; 3: the device can't be used any more, and the benchmarks behind that were not run.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from .command import print_table, report_failures
from .harness import OUT_OF_TIME, WRONG, first_line, measure_peaks, not_importable, time_cases
from .report import write_folder
from .results import Results, Row, provenance
from .tables import OURS

UNFINISHED = "unfinished.json"
LOST = 3  # exit code


class Share(NamedTuple):
    """A benchmark of a set, in the file ``bench_<name>``.

    Attributes:
        name: of the benchmark.
        seconds: that it may take; 0 for one that limits itself.
    """

    name: str
    seconds: float = 0.0


# What matters most comes first; what the time does not reach is said not to be measured.
SETS = {
    "cpu": (
        Share("step"),
        Share("loader"),
        Share("store"),
        Share("contrast_memory"),
        Share("contrast", 40),
        Share("patch_embed", 40),
        Share("decoder_streams", 40),
        Share("pool", 30),
        Share("model", 90),
        Share("diffusion_unet", 90),
        Share("autoencoder"),
        Share("reconstruction", 15),
        Share("group_norm", 15),
        Share("attention", 15),
        Share("accelerate", 30),
    ),
    "gpu": (
        Share("step", 180),
        Share("patch_embed", 50),
        Share("decoder_streams", 50),
        Share("pool", 35),
        Share("attention", 40),
        Share("contrast", 75),
        Share("model", 60),
        Share("diffusion_unet", 60),
        Share("reconstruction", 30),
        Share("group_norm", 35),
        Share("accelerate", 30),
        Share("autoencoder"),
        Share("loader"),
    ),
}
LIMITS = {"cpu": 570.0, "gpu": 450.0}  # seconds, of all that do not limit themselves


def measure(share: Share, device: torch.device, quick: bool, seconds: float, left: float) -> Iterator[Row]:
    """Yield the rows of one benchmark as they come; one that fails must not take the others with it.

    Args:
        share: the benchmark.
        device: what it runs on.
        quick: whether a few cases are enough.
        seconds: that it may take, if it doesn't limit itself.
        left: seconds of the whole run.
    """
    try:
        module = importlib.import_module(f".bench_{share.name}", __package__)
        if hasattr(module, "cases"):
            yield from time_cases(module.cases(device, quick), device, seconds)
        elif left <= 0:
            yield Row(share.name, "all", OURS, unavailable=OUT_OF_TIME)
        elif share.seconds:
            yield from module.rows(device, quick, seconds=seconds)
        else:
            yield from module.rows(device, quick)
        return
    except ImportError as error:
        reason = not_importable(error)
    except Exception as error:
        traceback.print_exc()
        reason = f"{WRONG}{type(error).__name__}: {first_line(error)}"
    yield Row(share.name, "all", OURS, unavailable=reason)


def lost(device: torch.device) -> bool:
    """Return whether a kernel has left the device unusable for this process."""
    try:
        torch.zeros(1, device=device).item()
    except RuntimeError:
        return True
    return False


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__)
    gpu = torch.cuda.is_available()
    parser.add_argument("--set", choices=SETS, default="gpu" if gpu else "cpu", help="default: what fits")
    parser.add_argument("--only", nargs="+", default=[], metavar="BENCH", help="these benchmarks alone")
    parser.add_argument("--seconds", type=float, help="for all of it; shares shrink, default 570 (cpu), 450")
    parser.add_argument("--output", type=Path, help="write a folder: results, tables, pictures")
    options = parser.parse_args(arguments)
    shares = SETS[options.set]
    unknown = set(options.only) - {share.name for share in shares}
    if unknown:
        parser.error(f"no benchmark {', '.join(sorted(unknown))} in the set {options.set}")
    if options.set == "gpu" and not gpu:
        parser.error("the set gpu needs a CUDA device, and there is none")

    device = torch.device("cuda" if options.set == "gpu" else "cpu")
    begin = time.perf_counter()
    results = Results(provenance(device), measure_peaks(device), [])
    limit = options.seconds or LIMITS[options.set]
    chosen = [share for share in shares if not options.only or share.name in options.only]
    for number, share in enumerate(chosen):
        started = time.perf_counter()
        left = limit - (started - begin)
        wanted = sum(other.seconds for other in chosen[number:])
        seconds = share.seconds * min(1.0, max(left, 0.0) / wanted) if wanted else 0.0
        for row in measure(share, device, options.set == "cpu", seconds, left):
            results.rows.append(row)
            if options.output:  # so that a crash or a kill leaves what was measured
                results.save(options.output / UNFINISHED)
        print(f"{share.name}: {time.perf_counter() - started:.0f} s", file=sys.stderr, flush=True)
        if lost(device):
            print(f"{device} can't be used any more: {share.name} broke it", file=sys.stderr)
            return LOST
    print_table(results)
    for path in write_folder(results, options.output) if options.output else [results.save()]:
        print(path)
    if options.output:
        (options.output / UNFINISHED).unlink(missing_ok=True)
    print(f"{len(results.rows)} rows in {(time.perf_counter() - begin) / 60:.1f} minutes")
    return report_failures(results.rows)


if __name__ == "__main__":
    sys.exit(main())
