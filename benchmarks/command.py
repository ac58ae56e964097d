"""What the commands of the benchmarks share: options, tables, exit codes."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch

from .harness import Case, failures, first_line, measure_peaks, time_cases
from .results import Results, Row, provenance
from .tables import bench_table, benches, headline_table, headlines, plain


def print_table(results: Results) -> None:
    """The headline and a table for each benchmark, the ratio first; plain text if rich is not installed."""
    tables = [(name, bench_table(results, name)) for name in benches(results)]
    if headlines(results):
        tables.append(("all", headline_table(results)))
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        for title, table in tables:
            print(f"\n{title}\n{plain(table)}")
        return
    console = Console(width=None if sys.stdout.isatty() else 200)
    for title, content in tables:
        shown = Table(*content.header, title=title, title_justify="left")
        for line in content.rows:
            shown.add_row(*line)
        console.print(shown)


def device_argument(text: str) -> torch.device:
    """For argparse: a device that is there."""
    try:
        device = torch.device(text)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise argparse.ArgumentTypeError(f"{text}: {first_line(error)}") from error
    return device


def command(
    measure: Callable[[argparse.Namespace], list[Row]],
    description: str,
    arguments: Sequence[str] | None = None,
    add_options: Callable[[argparse.ArgumentParser], object] = lambda parser: None,
) -> int:
    """The command of one benchmark: measure, print a table, write the results if asked to.

    Args:
        measure: parsed options (``device``, ``quick`` and what ``add_options`` adds) -> rows.
        description: for the help text.
        arguments: of the command line.
        add_options: adds the benchmark's own options.

    Returns:
        Exit code: 1 if a result was not right.
    """
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument(
        "--device", type=device_argument, default=default, help="default: a GPU if there is one"
    )
    parser.add_argument("--quick", action="store_true", help="the few cases of `make bench`")
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    add_options(parser)
    options = parser.parse_args(arguments)
    rows = measure(options)
    results = Results(provenance(options.device), measure_peaks(options.device), rows)
    print_table(results)
    if options.json:
        results.save(options.json)
    return report_failures(rows)


def report_failures(rows: Iterable[Row]) -> int:
    """Say what was not right; the exit code."""
    wrong = failures(rows)
    for line in wrong:
        print(line, file=sys.stderr)
    return int(bool(wrong))


def cases_command(
    cases: Callable[[torch.device, bool], Iterable[Case]],
    description: str,
    arguments: Sequence[str] | None = None,
) -> int:
    """:func:`command` of a benchmark that consists of cases."""

    def add_options(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--budget", type=float, default=600.0, help="seconds for all cases, default 600")
        parser.add_argument("--only", default="", help="cases whose name contains this")

    def measure(options: argparse.Namespace) -> list[Row]:
        chosen = [case for case in cases(options.device, options.quick) if options.only in str(case)]
        return list(time_cases(chosen, options.device, options.budget))

    return command(measure, description, arguments, add_options)
