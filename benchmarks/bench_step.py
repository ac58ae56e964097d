"""The whole pretraining step: losses, backward, clipping, AdamW, the teacher's average.

``python -m benchmarks.bench_step [--device cpu] [--quick] [--peer FOLDER] [--json PATH]``

Ours is what training does on the device, with its transformer blocks compiled. The peers are our
own plain re-implementation of the published step (:mod:`benchmarks.published_step`): as published, and with
its blocks compiled and, on CUDA, in bfloat16. FLOPs are those that our step has to do, attention included,
the same figure for everyone. Nobody is timed whose losses and gradients do not agree with the published ones.
With ``--peer`` the published code runs too, from a checkout of it.
"""

from __future__ import annotations

import argparse
import copy
import gc
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from meduet_fast.data.augment import augment
from meduet_fast.data.crops import CropBatches
from meduet_fast.data.loader import crop_loader
from meduet_fast.engine.metrics import peak_tflops
from meduet_fast.engine.parallel import compile_blocks
from meduet_fast.pretraining import (
    ObjectiveConfig,
    OptimizerConfig,
    PretrainConfig,
    pretraining_losses,
    random_mix_mask,
)
from meduet_fast.pretraining.cost import flops_per_sample, memory_estimate

from .command import command
from .harness import OUT_OF_TIME, Case, Variant, not_importable, time_case
from .published_step import Gate, Losses, PublishedStep, published_losses
from .reference_peer import ReferencePeer, checkout
from .results import Row
from .step_parts import (
    SMALL,
    VIT_BASE,
    Batch,
    Models,
    OurStep,
    Setting,
    check_graph,
    make_batch,
    make_models,
    plain_kernels,
)
from .tables import OURS

PUBLISHED = "published"
REFERENCE = "published code"
NO_REDUNDANCY = f"{OURS}, redundant work removed"
FUSED = f"{OURS}, fused kernels"
BFLOAT16 = f"{OURS}, bf16"
GRAPH = f"{OURS}, CUDA graph"
# From the published step to ours, each with everything before it; the third and fourth need CUDA.
STAGES = {
    PUBLISHED: "published",
    NO_REDUNDANCY: "redundant work removed",
    FUSED: "fused kernels",
    BFLOAT16: "bf16, nothing waits",
    OURS: "blocks compiled",
    GRAPH: "CUDA graph",
}
GATE_BATCH = 2  # samples; in float32, for which large batches have neither memory nor time
ROUNDS_S = 2.0  # seconds of timed rounds of a case, where three rounds do not take longer


def variants(
    setting: Setting, batch: int, mftd: bool, device: torch.device, stages: bool, peer: Path | None
) -> list[Variant]:
    """Ours and its peers, each with weights of its own, equal at the start.

    Args:
        stages: with everything that lies between the published step and ours.
        peer: a checkout of the published code, to be run too.
    """
    gpu = device.type == "cuda"
    low, published_amp = (torch.bfloat16, torch.float16) if gpu else (None, None)
    optimizer, objective = OptimizerConfig(), ObjectiveConfig(mftd=mftd)
    base = make_models(setting.model, device)
    gate = Gate(*base, make_batch(setting.model, GATE_BATCH, device), mftd)
    inputs = make_batch(setting.model, batch, device)
    losses_of = partial(pretraining_losses, check_values=False)

    def copies(compiled: bool = False) -> Models:
        student, teacher = (copy.deepcopy(model) for model in base)
        if compiled:
            compile_blocks([*student.transformer_blocks(), *teacher.transformer_blocks()])
        return student, teacher

    def published(
        name: str,
        amp: torch.dtype | None,
        losses: Losses = published_losses,
        compiled: bool = False,
        plain: bool = False,
    ) -> Variant:
        """The published update around some implementation of the losses."""
        models = copies(compiled)
        step = PublishedStep(*models, optimizer, amp, losses)
        kernels = plain_kernels if plain else nullcontext

        def call() -> None:
            with kernels():
                step(*inputs, objective)

        def check() -> None:
            with kernels():
                gate.check(losses, *models, amp)

        return Variant(name, call, check)

    def ours(name: str, compiled: bool) -> Variant:
        """What training runs."""
        models = copies(compiled)
        step = OurStep(*models, optimizer, objective)
        return Variant(name, lambda: step(*inputs), lambda: gate.check(losses_of, *models, low))

    found = [ours(OURS, compiled=True), published(PUBLISHED, published_amp)]
    found.append(published(f"{PUBLISHED}, compiled" + " bf16" * gpu, low, compiled=True))
    if peer:
        found.append(_reference(peer, base, inputs, mftd))
    if not gpu:
        found.append(ours(NO_REDUNDANCY, compiled=False))
        found += [Variant(name, unavailable="needs CUDA") for name in (FUSED, BFLOAT16, GRAPH) if stages]
    elif stages:
        found += [
            published(NO_REDUNDANCY, published_amp, losses_of, plain=True),
            published(FUSED, published_amp, losses_of),
            ours(BFLOAT16, compiled=False),
        ]
    return found


def graph_variants(setting: Setting, batch: int, mftd: bool, device: torch.device) -> list[Variant]:
    """Ours with a CUDA graph and without. Alone: a graph keeps its memory as long as it is there."""
    base = make_models(setting.model, device)
    inputs = make_batch(setting.model, batch, device)

    def step(graph: bool) -> OurStep:
        student, teacher = (copy.deepcopy(model) for model in base)
        compile_blocks([*student.transformer_blocks(), *teacher.transformer_blocks()])
        return OurStep(student, teacher, OptimizerConfig(), ObjectiveConfig(mftd=mftd), graph)

    # Captured at the first call, its check's: what goes wrong is the reason why it is not timed.
    plain, graphed = step(False), step(True)
    return [
        Variant(OURS, lambda: plain(*inputs)),
        Variant(GRAPH, lambda: graphed(*inputs), lambda: check_graph(graphed, step(False), inputs)),
    ]


def _reference(folder: Path, models: Models, batch: Batch, mftd: bool) -> Variant:
    try:
        reference = ReferencePeer(folder, models, batch, mftd)
    except ImportError as error:
        return Variant(REFERENCE, unavailable=not_importable(error))
    return Variant(REFERENCE, reference, reference.check)


def step_case(
    setting: Setting, batch: int, mftd: bool, device: torch.device, stages: bool, peer: Path | None = None
) -> Case:
    """One size of batch."""
    flops = batch * flops_per_sample(setting.model, ObjectiveConfig(mftd=mftd))
    tokens = setting.model.num_tokens
    return Case(
        bench="step",
        name=f"{setting.name} B={batch} {'with' if mftd else 'without'} MFTD",
        dtype="bfloat16" if device.type == "cuda" else "float32",
        direction="step",
        shape={"batch": batch, "tokens": tokens, "width": setting.model.embed_dim},
        bytes=None,
        flops=flops,
        build=lambda: variants(setting, batch, mftd, device, stages, peer),
        per_call={"samples": batch, "tokens": batch * tokens, "teraflops": flops / 1e12},
        clock="wall",
    )


def loading_rows(setting: Setting, batch: int, device: torch.device) -> list[Row]:
    """Our step without MFTD, its crops read from a store of noise: how much of it is waiting for them."""
    from .bench_loader import make_store

    waits: list[float] = []
    gpu, config = device.type == "cuda", setting.model
    case = step_case(setting, batch, False, device, stages=False)
    with tempfile.TemporaryDirectory() as folder:
        store = make_store(Path(folder) / "store")

        def build() -> list[Variant]:
            models = make_models(config, device)
            compile_blocks(block for model in models for block in model.transformer_blocks())
            step = OurStep(*models, OptimizerConfig(), ObjectiveConfig(mftd=False))
            crops = CropBatches(store, config.latent_size, batch)
            workers = 4 if gpu else 0
            loader = crop_loader(crops, total_steps=2**40, workers=workers, pin_memory=gpu)
            batches, generator = iter(loader), torch.Generator(device).manual_seed(0)

            def call() -> None:
                began = time.perf_counter()
                read = next(batches)
                waits.append(time.perf_counter() - began)
                latents = augment(read["latents"].to(device, non_blocking=True), generator).float()
                mask = random_mix_mask(batch, config.num_tokens, generator, device)
                step(latents, read["domain"].to(device, non_blocking=True), mask)

            return [Variant(OURS, call)]

        case = replace(case, bench="step_data", name=f"{case.name}, crops loaded", build=build)
        rows = time_case(case, device, ROUNDS_S)
    return [
        _with(row, data_wait_percent=1e8 * statistics.median(waits) / row.median_us) if row.median_us else row
        for row in rows
    ]


def _with(row: Row, **extra: float) -> Row:
    return replace(row, extra=row.extra | extra)


def ablation(rows: Sequence[Row]) -> list[Row]:
    """The rows of one case as stages, the published step first, each with all changes before it."""
    by_name = {row.variant: row for row in rows}
    return [
        replace(by_name[name], bench="step_ablation", variant=stage, ratios={}, ratio_spread={})
        for name, stage in STAGES.items()
        if name in by_name
    ]


def does_not_fit(setting: Setting, batch: int, device: torch.device) -> str:
    """Why a batch is not tried on a GPU: its step takes more memory than there is; or ""."""
    total = torch.cuda.get_device_properties(device).total_memory
    needed = memory_estimate(PretrainConfig(model=setting.model, batch_size=batch)).total
    return f"takes about {needed / 1e9:.0f} GB of {total / 1e9:.0f}" if needed > total else ""


def graph_rows(setting: Setting, batch: int, device: torch.device) -> list[Row]:
    """Our step as a CUDA graph, beside itself; its memory lies in a pool that is not counted."""
    case = step_case(setting, batch, True, device, stages=False)
    build = partial(graph_variants, setting, batch, True, device)
    timed = time_case(replace(case, name=f"{case.name}, graph", build=build), device, ROUNDS_S)
    return [replace(row, peak_memory=None) if row.variant == GRAPH else row for row in timed]


def rows(
    device: torch.device, quick: bool, peer: Path | None = None, seconds: float = math.inf
) -> Iterator[Row]:
    """Yield batches with and without MFTD, the ablation, loading: ViT-B on CUDA, a small network on the CPU.

    Args:
        device: what it runs on.
        quick: the middle batch alone.
        peer: a checkout of the published code, to be run too.
        seconds: after which no further case begins; those left out say so.
    """
    began, peak = time.perf_counter(), peak_tflops(device)
    # Blocks differ in size, in precision and in need of a gradient: eight forms, all that the default allows.
    with torch._dynamo.config.patch(recompile_limit=32):
        for row in _rows(device, quick, peer, began + seconds):
            if peak and row.flops and row.median_us:
                row = _with(row, mfu_percent_of_data_sheet=1e-4 * row.flops / row.median_us / peak)
            yield row


def _rows(device: torch.device, quick: bool, peer: Path | None, end: float) -> Iterator[Row]:
    gpu = device.type == "cuda"
    setting, middle = (VIT_BASE, 64) if gpu else (SMALL, 8)
    # What matters most first.
    batches = [middle] if quick else [64, 128, 32, 192, 256] if gpu else [4, 8, 16]
    for batch in batches:
        for mftd in (True, False):
            stages = mftd and batch == middle
            case = step_case(setting, batch, mftd, device, stages, peer)
            reason = does_not_fit(setting, batch, device) if gpu else ""
            if time.perf_counter() > end:
                reason = OUT_OF_TIME
            if reason:
                yield case.row(OURS, unavailable=reason)
                continue
            timed = time_case(case, device, ROUNDS_S)
            yield from timed
            if stages:
                graphed = graph_rows(setting, batch, device) if gpu else []
                yield from graphed
                yield from ablation([*timed, *(replace(row, case=case.name) for row in graphed[1:])])
            if gpu:
                gc.collect()  # compiled blocks are in cycles with themselves
                torch.cuda.empty_cache()
    if time.perf_counter() < end:
        yield from loading_rows(setting, middle, device)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns the exit code."""

    def add_options(parser: argparse.ArgumentParser) -> None:
        parser.add_argument(
            "--peer", type=checkout, metavar="FOLDER", help="a checkout of the published code"
        )

    def measure(options: argparse.Namespace) -> list[Row]:
        return list(rows(options.device, options.quick, options.peer))

    return command(measure, __doc__ or "", arguments, add_options)


if __name__ == "__main__":
    sys.exit(main())
