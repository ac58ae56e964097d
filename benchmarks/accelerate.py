"""The page of the models that ``accelerate`` changes, ``docs/accelerate.md``.

``python -m benchmarks.accelerate [--only NAME] [--seconds S] [--output FILE]``

Each model of ``bench_accelerate`` beside its accelerated copy on the CPU: differences in float64, times in
float32 in turns. A model that can't be built is a row that says why. The page is written after each model.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import nn

from meduet_fast.files import atomic_path
from meduet_fast.layers import restore

from .bench_accelerate import EXAMPLES, Example, make_pair, outputs_and_gradients, relative_difference, run
from .harness import not_importable, rounds, sample
from .results import provenance
from .tables import Table, markdown, three

CPU = torch.device("cpu")
HEADER = [
    "model", "modules that changed", "outputs off by", "gradients off by", "forward", "forward + backward",
]  # fmt: skip
INTRODUCTION = """# What `accelerate` changes

Written by `python -m benchmarks.accelerate`; do not edit. Each model is small and stands beside its
accelerated copy.

- *Off by*: the largest difference of all outputs, and of all gradients of parameters, each tensor relative
  to its largest value; in float64, MAISI in float32.
- *Forward* and *forward + backward*: the original's time over the accelerated one's on this CPU, float32;
  both take turns in one process; the median of the ratios of neighbouring calls, and how many there were.
  Below 1 the original is faster. On a machine with other work, these are rough.
- On a CPU no kernel of GroupNorm with SiLU runs, but its definition in plain PyTorch, which takes as long as
  the original: what is to be gained there is on CUDA. Attention without N x N scores gains on both.

Left alone in diffusers: attention, which goes through `scaled_dot_product_attention` already; the decoders
of AutoencoderKLCogVideoX and of AutoencoderKLKVAEVideo, which scale and shift between norm and SiLU by what
the latents say, at each place; the one norm at the end of each U-Net, encoder and decoder; the residual
blocks of AutoencoderKLCosmos, of AutoencoderKLMiniMaxH3 and of the encoder of AutoencoderKLKVAEVideo, whose
norms are classes of their own; AutoencoderKLWan, AutoencoderKLQwenImage, AutoencoderKLHunyuanVideo15 and
AutoencoderKLLTXVideo, which have no group norm.
AutoencoderKLAllegro encodes in large tiles alone and is not in the table; its blocks are of kinds that
are."""


def _ratio(pair: Sequence[Callable[[], object]], seconds: float) -> str:
    """Time two calls in turns: the first one's time over the second one's."""
    for call in pair:
        call()
    samplers = {str(index): partial(sample, call, CPU) for index, call in enumerate(pair)}
    before, after = ([item.seconds for item in taken] for taken in rounds(samplers, seconds).values())
    return f"{three(float(np.median(np.array(before) / np.array(after))))} ({len(before)})"


def row(example: Example, seconds: float) -> list[str]:
    """Compare and time one model.

    Args:
        example: the model.
        seconds: for the timed rounds of each direction, at least three rounds.

    Returns:
        Cells below ``HEADER``.
    """
    try:
        before, after, inputs = make_pair(example, CPU)
    except ImportError as error:
        return [example.name, not_importable(error), "", "", "", ""]
    with torch.no_grad():
        ratio = _ratio([partial(run, model, inputs) for model in (before, after)], seconds)
    both = _ratio([partial(outputs_and_gradients, model, inputs) for model in (before, after)], seconds)

    wide = [item.to(example.check) if item.is_floating_point() else item for item in inputs]
    count = len(run(before.to(example.check), wide))
    found = [outputs_and_gradients(model.to(example.check), wide) for model in (before, after)]
    outputs = relative_difference(found[0][:count], found[1][:count])
    gradients = relative_difference(found[0][count:], found[1][count:])
    changed = Counter(_original(after, path) for path in restore(after))
    swapped = ", ".join(f"{number} {name}" for name, number in sorted(changed.items()))
    return [example.name, swapped, f"{outputs:.1e}", f"{gradients:.1e}", ratio, both]


def _original(model: nn.Module, path: str) -> str:
    return type(model.get_submodule(path)).__name__


def page(rows: Sequence[Sequence[str]]) -> str:
    """Return the page, with the table and what it was measured with."""
    measured = Table(["what", "value"], [[name, value] for name, value in provenance(CPU).items()])
    table = Table(HEADER, [list(cells) for cells in rows])
    return "\n\n".join([INTRODUCTION, markdown(table), markdown(measured)]) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.accelerate", description=__doc__)
    parser.add_argument("--only", default="", help="models whose name contains this")
    parser.add_argument("--seconds", type=float, default=3.0, help="for the timed rounds of each direction")
    parser.add_argument("--output", type=Path, default=Path("docs/accelerate.md"), help="the page")
    options = parser.parse_args(arguments)
    chosen = [example for example in EXAMPLES if options.only in example.name]
    if not chosen:
        parser.error(f"--only {options.only!r}: no model has this in its name")
    logging.disable(logging.WARNING)  # diffusers says at import what it can do without
    rows = []
    for example in chosen:
        rows.append(row(example, options.seconds))
        print("  ".join(rows[-1]), flush=True)
        with atomic_path(options.output) as partial_page:
            partial_page.write_text(page(rows), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
