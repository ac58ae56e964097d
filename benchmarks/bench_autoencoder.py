"""Encoding and decoding of volumes by the built-in tokenizer: as it is, accelerated, compiled.

``python -m benchmarks.bench_autoencoder [--device cpu] [--quick] [--json PATH]``

Ours is the tokenizer after ``accelerate``. float32, as when a data set is prepared. A volume fits into one
window, so that everyone does the same work. Only forward: preparing needs no gradients.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from .command import command
from .harness import Case, Variant, time_cases
from .published_step import relative
from .results import Row
from .tables import OURS

TOLERANCE = 1e-4  # of the output, relative
ENCODE, DECODE = "encode", "decode"


def variants(edge: int, what: str, device: torch.device, with_compiler: bool) -> list[Variant]:
    """Three tokenizers with the same weights, on a volume of noise or its latents.

    Raises:
        ImportError: if MONAI is not installed.
    """
    from meduet_fast.autoencoder import load_tokenizer
    from meduet_fast.autoencoder.autoencoder import Tokenizer
    from meduet_fast.layers import accelerate

    generator = torch.Generator().manual_seed(0)
    x = torch.rand(1, 1, edge, edge, edge, generator=generator).to(device)
    plain = load_tokenizer(device=device)
    if what == DECODE:
        x = plain.encode(x)
    expected = getattr(plain, what)(x)

    def check(run: Callable[[Tensor], Tensor]) -> None:
        error = relative(run(x), expected)
        if not error <= TOLERANCE:
            raise AssertionError(f"{what}d volume is off by {error:.3g}, allowed {TOLERANCE:.3g}")

    def variant(name: str, change: Callable[[Tokenizer], object]) -> Variant:
        tokenizer = load_tokenizer(device=device)
        change(tokenizer)
        run = getattr(tokenizer, what)
        return Variant(name, partial(run, x), partial(check, run))

    def compiled(tokenizer: Tokenizer) -> None:
        network = tokenizer.network
        setattr(network, what, torch.compile(getattr(network, what), fullgraph=True))

    found = [variant(OURS, lambda tokenizer: accelerate(tokenizer.network)), variant("plain", lambda _: None)]
    return [*found, variant("plain, compiled", compiled)] if with_compiler else found


def rows(device: torch.device, quick: bool) -> list[Row]:
    """Cubes of 96 and 128 voxels on CUDA, smaller ones on the CPU."""
    gpu = device.type == "cuda"
    edges = (96, 128) if gpu else (48,) if quick else (48, 96)
    cases = [
        Case(
            bench="autoencoder",
            name=f"{what} {edge}^3",
            dtype="float32",
            direction="forward",
            shape={"edge": edge},
            bytes=None,
            flops=None,
            build=partial(variants, edge, what, device, gpu or not quick),
            per_call={"megavoxels": edge**3 / 1e6},
        )
        for edge in (edges[:1] if quick else edges)
        for what in (ENCODE, DECODE)
    ]
    return list(time_cases(cases, device, 60.0))


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns the exit code."""
    return command(lambda options: rows(options.device, options.quick), __doc__ or "", arguments)


if __name__ == "__main__":
    sys.exit(main())
