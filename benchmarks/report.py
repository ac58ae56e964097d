"""The page of all results, ``docs/benchmarks.md``, and the folder that a GPU machine sends home.

``python -m benchmarks.report [--results FOLDER ...] [--output docs]``

Everything on the page comes from results files and is the same for the same files; nothing is measured here.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from meduet_fast.files import atomic_path

from .results import RESULTS, Results, device_folder
from .tables import (
    HEADLINE_HEADER,
    Table,
    bench_table,
    benches,
    headline_table,
    headlines,
    markdown,
    plain,
    si,
)

PICTURES = "benchmarks"
TARGET = "H100"  # the device that the project is built for

INTRODUCTION = """# Benchmarks

Written by `python -m benchmarks.report` from the files in `benchmarks/results`; do not edit. `make bench`
measures what a CPU can in under 10 minutes, `make bench-gpu` everything on a GPU, `python -m
benchmarks.bench_<name>` one thing. `python -m benchmarks.compare A B` says what became slower between two
runs; [gpu-runner.md](gpu-runner.md) says how to have that done by a GPU runner.

How to read the tables:

- *Ours is x times as fast*: variants take turns, and this is the median of the ratios of neighbouring
  calls, with their 10th and 90th percentile. Below 1, the other one is faster.
- *Median* is the time of one call, *10 to 90 %* its percentiles; *cold* has the device's L2 cache emptied
  before each call; *host* is the time until the call returns, the device still working. On a CPU there is
  neither.
- On a CPU *ours* of patch_embed, decoder_streams, pool, reconstruction and group_norm is their eager
  definition: the kernels are for CUDA. Those rows show what an operation costs beside plain and compiled
  PyTorch where no kernel runs.
- *Bytes* and *FLOPs* are what the operation has to move and to do, stated by the operation, the same for
  every variant. *Of measured peak* is the larger of the two shares of what this machine was measured to
  reach in the same run.
- *Memory* is what a call allocates above its inputs at its worst moment.
- *store*: "version 1" is how latents were kept before they lay in chunks, "mapped" how they were read then.
  Adding to many volumes and loading from many stand beside the same with few.
- No row was timed before its result agreed with the operation's definition.
"""


def load_runs(folders: Sequence[Path]) -> dict[str, list[Results]]:
    """All results below the folders: by device, oldest first.

    Raises:
        ValueError: naming a file that is not one of results, or a folder that is not there.
    """
    runs: dict[str, list[Results]] = {}
    for folder in folders:
        if not folder.is_dir():
            raise ValueError(f"{folder}: no such folder")
        for path in sorted(folder.rglob("*.json")):
            results = Results.load(path)
            runs.setdefault(results.provenance["device"], []).append(results)
    for found in runs.values():
        found.sort(key=lambda results: (results.provenance["date"], results.provenance["commit"]))
    return dict(sorted(runs.items()))


def newest(runs: Sequence[Results]) -> list[Results]:
    """Return the runs of a device, newest first, each with the benchmarks that no newer one has."""
    kept, seen = [], set[str]()
    for results in reversed(runs):
        rows = [row for row in results.rows if row.bench not in seen]
        if rows:
            kept.append(replace(results, rows=rows))
            seen.update(row.bench for row in rows)
    return kept


def provenance_table(results: Results) -> Table:
    """Where and with what a run was measured, and the peaks that it found."""
    rows = [[name, value] for name, value in results.provenance.items()]
    for name, value in sorted(results.peaks.items()):
        if name.startswith("matrix_flops_per_s_"):
            rows.append([f"measured peak, {name.removeprefix('matrix_flops_per_s_')}", si(value, "FLOP/s")])
        else:
            rows.append(["measured peak, copy (read + write)", si(value, "B/s")])
    return Table(["what", "value"], rows)


def _headline_table(runs: dict[str, list[Results]]) -> Table:
    """All devices' headlines, latest run of each benchmark."""
    header = ["device", "date", *HEADLINE_HEADER]
    rows = []
    for device, found in runs.items():
        for results in newest(found):
            date = results.provenance["date"][:10]
            rows += [[device, date, *row] for row in headline_table(results).rows]
    if not any(TARGET in device for device in runs):
        rows.append([TARGET, "", "not measured", *[""] * (len(header) - 3)])
    return Table(header, rows)


def _device_section(runs: Sequence[Results], pictures: Sequence[tuple[str, str]]) -> str:
    parts = [f"## {runs[-1].provenance['device']}"]
    for results in newest(runs):
        parts.append(markdown(provenance_table(results)))
        if results.provenance == runs[-1].provenance:
            parts += [f"![{caption}]({PICTURES}/{name})\n\n*{caption}*" for name, caption in pictures]
        for bench in benches(results):
            parts += [f"### {bench}", markdown(bench_table(results, bench))]
    return "\n\n".join(parts)


def write_report(folders: Sequence[Path], output: Path) -> Path:
    """Write ``<output>/benchmarks.md`` and its pictures.

    Args:
        folders: with results at any depth.
        output: folder, made if it is not there; pictures go to ``benchmarks/`` in it.

    Returns:
        the page.

    Raises:
        ValueError: for an unusable file of results, or none.
        OSError: if something cannot be written.
    """
    # Here, since a machine that only measures need not have what these two need.
    from .plots import write_plots
    from .scale import describe, measured_steps

    runs = load_runs(folders)
    if not runs:
        raise ValueError(f"{', '.join(map(str, folders))}: no results; `make bench` makes some")
    parts = [INTRODUCTION, "## Headline figures", markdown(_headline_table(runs))]
    if not any(TARGET in device for device in runs):
        parts.append(f"{TARGET}: not measured.")
    parts.append(
        "The strongest peer of each case counts; the figure is the geometric mean over a benchmark's cases, "
        "forward and backward alike. Samples/s are those of ours in its best case."
    )
    written = set()
    for device, found in runs.items():
        pictures = write_plots(found, output / PICTURES, prefix=f"{device_folder(device)}-")
        written |= {name for name, _ in pictures}
        parts.append(_device_section(found, pictures))
    for stale in (output / PICTURES).glob("*.png"):
        if stale.name not in written:
            stale.unlink()
    steps = [step for device, found in runs.items() if TARGET in device for step in measured_steps(found[-1])]
    parts += [
        f"## Many {TARGET}s, on paper",
        describe(steps),
        "Other step times: `python -m benchmarks.scale --step-ms MS`.",
    ]
    page = output / "benchmarks.md"
    with atomic_path(page) as temporary:
        temporary.write_text("\n\n".join(part.strip() for part in parts) + "\n", encoding="utf-8")
    return page


def text_tables(results: Results) -> str:
    """A run as plain text: provenance, headlines, every table."""
    parts = [plain(provenance_table(results))]
    if headlines(results):
        parts.append("Against the strongest peer of each case\n\n" + plain(headline_table(results)))
    parts += [f"{bench}\n\n{plain(bench_table(results, bench))}" for bench in benches(results)]
    return "\n\n\n".join(parts) + "\n"


def write_folder(results: Results, folder: Path) -> list[Path]:
    """Write one run as a folder to carry home: the JSON, ``table.txt``, pictures.

    The JSON is called as it would be below ``benchmarks/results/<device>/``. Where the packages that draw are
    not installed, ``table.txt`` says at its end which one is missing.

    Returns:
        the files written.

    Raises:
        OSError: if something cannot be written.
    """
    name = f"{results.provenance['date'][:10]}-{results.provenance['commit']}.json"
    written = [results.save(folder / name)]
    text = text_tables(results)
    try:
        from .plots import write_plots
    except ImportError as error:
        text += f"\nNo pictures: {error}. `python -m benchmarks.report` draws them where it is installed.\n"
    else:
        written += [folder / name for name, _ in write_plots([results], folder)]
    table = folder / "table.txt"
    with atomic_path(table) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return [*written, table]


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__)
    parser.add_argument(
        "--results", type=Path, nargs="+", default=[RESULTS], help="folders, read at any depth"
    )
    parser.add_argument(
        "--output", type=Path, default=RESULTS.parent.parent / "docs", help="folder of the page"
    )
    options = parser.parse_args(arguments)
    try:
        print(write_report(options.results, options.output))
    except (OSError, ValueError) as error:
        parser.error(str(error))
    return 0


if __name__ == "__main__":
    sys.exit(main())
