"""Demixing: the decoder's four inputs, and sources taken apart, beside gathers and the published way.

``python -m benchmarks.bench_decoder_streams [--device cpu] [--quick] [--only NAME] [--json PATH]``
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from meduet_fast.kernels import MixIndex
from meduet_fast.kernels.workloads import mixing_workloads, streams_workload
from meduet_fast.pretraining.reference import compact

from .command import cases_command
from .harness import Case, Variant
from .operations import op_cases, standard_peers

MASKED_SELECT = "masked_select, as published"


def streams_by_masked_select(
    content: Tensor,
    style: Tensor,
    prefix: Tensor,
    mask_token: Tensor,
    position: Tensor,
    index: MixIndex,
    straight: bool,
    swapped: bool,
) -> Tensor:
    """Compact sources, fuse, put them back into their places: for straight and for exchanged styles."""
    second = index.mask.unsqueeze(-1)
    contents, styles = ([compact(x, mask) for mask in (~index.mask, index.mask)] for x in (content, style))
    sequences = []
    for wanted, given in ((straight, styles), (swapped, styles[::-1])):
        if wanted:
            tokens = torch.zeros_like(content).masked_scatter(~second, contents[0] + given[0])
            tokens = tokens.masked_scatter(second, contents[1] + given[1])
            for hidden in (second, ~second):
                shown = torch.where(hidden, mask_token.to(tokens.dtype), tokens)
                sequences.append(torch.cat([prefix, shown], 1))
    return torch.cat(sequences) + position.to(content.dtype)


def demix_by_masked_select(x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Select tokens of source 1 and of source 2, (B, L/2, D) each."""
    return compact(x, ~mask), compact(x, mask)


def cases(device: torch.device, quick: bool) -> Iterator[Case]:
    """Yield the four streams of a ViT-B step, and a batch taken apart, over the batch."""
    gpu = device.type == "cuda"
    for batch in (16, 64, 256) if gpu else (4,) if quick else (4, 8, 16):
        streams = streams_workload(batch, 216, 384)
        yield from op_cases(
            "decoder_streams",
            f"four streams B={batch} L=216 D=384",
            streams,
            device,
            {"batch": batch, "tokens": 216, "width": 384},
            standard_peers(streams, with_compiler=gpu or batch == 4)
            | {MASKED_SELECT: lambda: streams_by_masked_select},
        )
        apart = next(item for item in mixing_workloads(batch) if item.op == "demix_tokens")
        yield from op_cases(
            "decoder_streams",
            f"sources apart B={batch} L=216 D=768",
            apart,
            device,
            {"batch": batch, "tokens": 216, "width": 768},
            standard_peers(apart, with_compiler=gpu) | {MASKED_SELECT: lambda: demix_by_masked_select},
        )


def test_decoder_streams(benchmark: Any, variant: Variant) -> None:
    benchmark(variant.call)


if __name__ == "__main__":
    sys.exit(cases_command(cases, __doc__ or ""))
