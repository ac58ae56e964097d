"""Many GPUs, on paper: step time and weak-scaling efficiency computed from one GPU's and from link speeds.

``python -m benchmarks.scale [RESULTS] [--step-ms MS [--batch B]]``

Nothing here is measured but the step time of one GPU, where RESULTS (a file of a CUDA device) has it; with
``--step-ms`` it is assumed, and the output says so; with neither there is communication only. Every
assumption is a field of :class:`Links`, and is printed.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from meduet_fast.models import MeDUET, MeDUETConfig

from .results import Results, Row
from .tables import OURS, Table, duration, markdown, si, three, without_batch

GPUS = (1, 8, 64, 512)
DEFAULT_BATCH = 64
FLOAT32, BFLOAT16 = 4, 2


@dataclass(frozen=True)
class Links:
    """How GPUs are connected, and how well it is used: assumptions, all of them.

    Attributes:
        node: GPUs of a node.
        in_node: bytes/s a GPU sends to its node, one direction (NVLink 4).
        between: bytes/s a GPU sends to other nodes (400 Gb/s InfiniBand for each GPU).
        reached: share of both speeds that a collective reaches.
        in_node_hop: seconds before the first byte arrives in the node.
        between_hop: seconds before the first byte arrives at another node.
        bucket: bytes of one gradient reduction (PyTorch's default).
        hidden: largest share of a communication that runs beside computation.
        backward: share of a step in which gradients can be reduced.
        matrix_rate: FLOP/s of the contrast against other GPUs' keys.
    """

    node: int = 8
    in_node: float = 450e9
    between: float = 50e9
    reached: float = 0.8
    in_node_hop: float = 5e-6
    between_hop: float = 10e-6
    bucket: float = 25e6
    hidden: float = 0.9
    backward: float = 0.5
    matrix_rate: float = 400e12


class Traffic(NamedTuple):
    """What one GPU sends in a step: bytes to its node, bytes to other nodes, and the seconds that takes."""

    in_node: float
    between: float
    seconds: float

    def times(self, count: float) -> Traffic:
        return Traffic(*(count * item for item in self))

    def plus(self, other: Traffic) -> Traffic:
        return Traffic(*(a + b for a, b in zip(self, other, strict=True)))


class Plan(NamedTuple):
    """A way to spread training: traffic by number of GPUs, and the share of a step that can hide it."""

    name: str
    traffic: dict[int, Traffic]
    window: float


class Step(NamedTuple):
    """One GPU's step: seconds, samples, and where that comes from."""

    seconds: float
    batch: int
    source: str


def gather(total: float, gpus: int, links: Links, parts: int = 1) -> Traffic:
    """All-gather of ``total`` bytes that ``gpus`` hold in equal shares; a reduce-scatter costs the same.

    Each GPU exchanges with those of its own rank in other nodes, then the node shares what came in. Between
    nodes the faster of a ring (fewer bytes, a hop a node) and a tree (hops grow with the logarithm) is taken.

    Args:
        total: bytes.
        gpus: 1 to ``links.node``, or a multiple of it.
        links: speeds.
        parts: collectives that it is split into; each waits for its hops.

    Raises:
        ValueError: for a last node that is not full.
    """
    local = min(gpus, links.node)
    if gpus % local:
        raise ValueError(f"{gpus} GPUs do not fill nodes of {links.node}")
    nodes = gpus // local
    in_node, lane = total * (local - 1) / local, total / local
    near = in_node / (links.in_node * links.reached) + parts * (local - 1) * links.in_node_hop
    options = [
        (lane * (nodes - 1) / nodes, nodes - 1),
        (lane if nodes > 1 else 0.0, math.ceil(math.log2(nodes))),
    ]
    far, between = min(
        (sent / (links.between * links.reached) + parts * hops * links.between_hop, sent)
        for sent, hops in options
    )
    return Traffic(in_node, between, near + far)


def count_parameters(config: MeDUETConfig) -> tuple[int, int]:
    """Parameters that an encoding needs, and those that a decoding needs, counted without memory."""
    with torch.device("meta"):
        model = MeDUET(config)
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    decoder = sum(
        size
        for name, size in sizes.items()
        if name.startswith(("decoder", "mask_token", "latent_entanglement"))
    )
    return sum(sizes.values()) - decoder, decoder


def plans(config: MeDUETConfig, links: Links) -> list[Plan]:
    """Replicas with gradients in float32 or bfloat16, and fully sharded."""
    encoder, decoder = count_parameters(config)
    parameters = encoder + decoder

    def reduce(size: int, gpus: int) -> Traffic:
        total = parameters * size
        return gather(total, gpus, links, math.ceil(total / links.bucket)).times(2)

    def shard(gpus: int) -> Traffic:
        # The student encodes twice and decodes once, each forward and backward; the teacher the same, forward
        # only. Gathered block by block in bfloat16; the gradients are scattered once, in float32.
        encodings = gather(encoder * BFLOAT16, gpus, links, config.depth).times(2 * 2 + 2)
        decodings = gather(decoder * BFLOAT16, gpus, links, config.decoder_depth).times(2 + 1)
        gradients = gather(parameters * FLOAT32, gpus, links, config.depth + config.decoder_depth)
        return encodings.plus(decodings).plus(gradients)

    return [
        Plan("replicas, float32 gradients", {n: reduce(FLOAT32, n) for n in GPUS}, links.backward),
        Plan("replicas, bfloat16 gradients", {n: reduce(BFLOAT16, n) for n in GPUS}, links.backward),
        Plan("fully sharded (FSDP)", {n: shard(n) for n in GPUS}, 1.0),
    ]


def keys(config: MeDUETConfig, batch: int, gpus: int, links: Links) -> tuple[Traffic, float]:
    """Contrast against all GPUs' keys: gathering them, and the seconds that the further products take."""
    rows, width = 4 * batch, config.embed_dim + config.style_dim
    flops = 6 * rows * rows * (gpus - 1) * width  # forward and backward
    return gather(gpus * rows * width * FLOAT32, gpus, links), flops / links.matrix_rate


def step_seconds(step: Step, plan: Plan, gpus: int, config: MeDUETConfig, links: Links) -> float:
    """Of one step on ``gpus`` GPUs, the batch a GPU unchanged."""
    reduction = plan.traffic[gpus].seconds
    exposed = max((1 - links.hidden) * reduction, reduction - plan.window * step.seconds)
    traffic, products = keys(config, step.batch, gpus, links)
    return step.seconds + exposed + traffic.seconds + products


def measured_steps(results: Results) -> list[Step]:
    """The best batch of every form of the step (with MFTD, without) that a CUDA device was timed on."""
    if "cuda" not in results.provenance:
        return []
    best: dict[str, Row] = {}
    for row in results.rows:
        if (row.bench, row.variant) == ("step", OURS) and row.median_us and "batch" in row.shape:
            kind = without_batch(row)
            rate = row.shape["batch"] / row.median_us
            if kind not in best or rate > best[kind].shape["batch"] / (best[kind].median_us or 1):
                best[kind] = row
    where = ", ".join(results.provenance[key] for key in ("device", "date", "commit"))
    return [
        Step((row.median_us or 0) / 1e6, row.shape["batch"], f"measured: {row.case}, {row.dtype}; {where}")
        for row in best.values()
    ]


def _traffic_table(config: MeDUETConfig, batch: int, links: Links) -> Table:
    header = ["what", "GPUs", "sent by each GPU in its node", "to other nodes", "time"]
    entries = [(plan.name, plan.traffic) for plan in plans(config, links)]
    entries.append(
        (f"keys of the contrast, {batch} samples/GPU", {n: keys(config, batch, n, links)[0] for n in GPUS})
    )
    rows = [
        [
            name,
            str(n),
            si(traffic[n].in_node, "B"),
            si(traffic[n].between, "B"),
            duration(1e6 * traffic[n].seconds),
        ]
        for name, traffic in entries
        for n in GPUS[1:]
    ]
    return Table(header, rows)


def _step_table(step: Step, config: MeDUETConfig, links: Links) -> Table:
    header = ["how", "GPUs", "step", "samples/s, all GPUs", "weak-scaling efficiency"]
    rows = []
    for plan in plans(config, links):
        for n in GPUS:
            seconds = step_seconds(step, plan, n, config, links)
            rate, share = n * step.batch / seconds, step.seconds / seconds
            rows.append([plan.name, str(n), duration(1e6 * seconds), three(rate), f"{three(100 * share)} %"])
    return Table(header, rows)


def _assumptions(links: Links) -> list[str]:
    return [
        f"Nodes of {links.node} GPUs; a GPU sends {si(links.in_node, 'B/s')} to its node (NVLink 4) and "
        f"{si(links.between, 'B/s')} to other nodes (400 Gb/s InfiniBand); collectives reach "
        f"{100 * links.reached:.0f} % of either.",
        f"A hop takes {1e6 * links.in_node_hop:.0f} µs in a node and {1e6 * links.between_hop:.0f} µs "
        "between nodes, where a ring or a tree is taken, whichever is faster.",
        f"Replicas reduce gradients in buckets of {si(links.bucket, 'B')}. Sharded weights are gathered "
        "block by block in bfloat16 for each pass, their gradients scattered once in float32.",
        f"At most {100 * links.hidden:.0f} % of that runs beside computation: for replicas during the "
        f"{100 * links.backward:.0f} % of a step that is backward, for sharded weights at any time.",
        "The contrast sees the keys of all GPUs (float32), gathered with nothing beside it; its further "
        f"products run at {si(links.matrix_rate, 'FLOP/s')}.",
        "The teacher's average costs no communication: each GPU averages its own copy or shard.",
        "Not modelled: slow GPUs or links, other traffic, reading of data.",
    ]


def describe(steps: Sequence[Step]) -> str:
    """The model as Markdown: assumptions, traffic, and a table for every step time."""
    config, links = MeDUETConfig(), Links()
    parameters = sum(count_parameters(config))
    batch = steps[0].batch if steps else DEFAULT_BATCH
    parts = [
        f"**Computed, not measured.** ViT-B, {parameters:,} parameters, {batch} samples a GPU. Assumed:",
        "\n".join(f"- {line}" for line in _assumptions(links)),
        markdown(_traffic_table(config, batch, links)),
    ]
    for step in steps:
        title = (
            f"From {duration(1e6 * step.seconds)} a step of {step.batch} samples on one GPU ({step.source}):"
        )
        parts += [title, markdown(_step_table(step, config, links))]
    if not steps:
        parts.append("Step time and efficiency: not given, since the step time of one H100 is not measured.")
    return "\n\n".join(parts)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scale", description=__doc__)
    parser.add_argument("results", type=Path, nargs="?", help="a file of results of a CUDA device")
    parser.add_argument("--step-ms", type=float, help="assume this step time of one GPU")
    parser.add_argument("--batch", type=int, default=DEFAULT_BATCH, help="samples of the assumed step")
    options = parser.parse_args(arguments)
    if options.step_ms is not None and not (0 < options.step_ms < math.inf and options.batch > 0):
        parser.error("--step-ms and --batch must be positive")
    steps = []
    if options.step_ms is not None:
        steps.append(Step(options.step_ms / 1e3, options.batch, "assumed"))
    if options.results is not None:
        try:
            measured = measured_steps(Results.load(options.results))
        except ValueError as error:
            parser.error(str(error))
        if not measured:
            parser.error(f"{options.results}: has no row of our training step on a CUDA device")
        steps += measured
    print(describe(steps))
    return 0


if __name__ == "__main__":
    sys.exit(main())
