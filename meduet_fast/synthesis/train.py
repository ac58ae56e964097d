"""The command ``synthesize train``: a latent store and its table of factors into a network of synthesis."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from meduet_fast.data.held_out import HeldOut
from meduet_fast.data.store import LatentStore
from meduet_fast.encoding.encode import teacher_file
from meduet_fast.engine import FitResult, fit
from meduet_fast.engine.beginning import Beginning, find_beginning
from meduet_fast.engine.distributed import launch_number
from meduet_fast.engine.dry_run import Rows, check_start, describe_run, format_rows, si
from meduet_fast.models.transformer3d import MeDUETTransformer3D
from meduet_fast.models.unet3d import MeDUETUNet3D

from .alignment import AlignmentHead
from .config import SynthesisConfig
from .crops import FactorCrops
from .factors import FactorTable
from .networks import Network
from .task import SynthesisTraining
from .transfer import transfer


def build_network(config: SynthesisConfig, table: FactorTable) -> Network:
    """Build the network of a run, with first weights, for the crops and factors of a table.

    Raises:
        UserError: for sizes that do not fit together.
    """
    shared: dict[str, Any] = {
        "in_channels": len(table.latents_mean),
        "sample_size": table.window,
        "content_dim": table.content.shape[1],
        "style_dim": table.style.shape[1],
        "content": config.content,
        "content_projection": config.content_projection,
        "content_pool": config.content_pool,
        "prediction": config.diffusion.objective,
        "latents_mean": tuple(table.latents_mean.tolist()),
        "latents_std": tuple(table.latents_deviation.tolist()),
    }
    network: Network
    if config.network == "transformer":
        network = MeDUETTransformer3D(**shared, **asdict(config.transformer))
    else:
        network = MeDUETUNet3D(**shared, **asdict(config.unet), features_patch=table.patch)
    if config.standardise == "table":
        content = (
            (table.token_mean, table.token_deviation)
            if config.content == "tokens"
            else (table.content_mean, table.content_deviation)
        )
        network.set_statistics(*content, table.style_mean, table.style_deviation)
    return network


def open_crops(config: SynthesisConfig, store: LatentStore, table: FactorTable) -> FactorCrops:
    """Open the crops of a run.

    Raises:
        UserError: see :class:`~.crops.FactorCrops`.
    """
    held_out = HeldOut.choose(store, config.held_out, config.held_out_fraction, config.seed)
    tokens, aligned = config.content == "tokens", config.diffusion.align > 0
    return FactorCrops(store, table, config, held_out, config.factor_source, tokens, aligned)


def build_task(config: SynthesisConfig, table: FactorTable, network: Network) -> SynthesisTraining:
    """Build the task of a run, with the head for alignment if it is on."""
    head = None
    if config.diffusion.align:
        head = AlignmentHead(network.feature_width, table.content.shape[1] + table.style.shape[1])
    return SynthesisTraining(config, network, head, table)


def _beginning(init: Path | None, network: Network, output: Path | None, resume: bool) -> Beginning:
    """Find what a run begins from, and write it into the network if it begins now."""
    return find_beginning(
        init, lambda path: transfer(network, path).beginning(), output, resume, teacher_file
    )


def train_synthesis(
    data: Path,
    factors: Path,
    output: Path,
    config: SynthesisConfig,
    resume: bool = False,
    init: Path | None = None,
) -> FitResult:
    """Train a network of synthesis; see :func:`meduet_fast.engine.fit`.

    Args:
        data: a latent store.
        factors: its table, of ``meduet-fast factors``.
        output: the run's folder.
        config: settings.
        resume: go on from the last checkpoint, if there is one.
        init: a pretrained encoder to take weights from, see :func:`~.transfer.transfer`; None for none. A
            resumed run must have begun from the same, or be given none.

    Raises:
        UserError: for bad settings, data, table or weights that do not fit, latents that can't be read, a
            non-finite loss, a full disk, a lost process, a killed reader.
    """

    def make() -> tuple[SynthesisTraining, FactorCrops]:
        table = FactorTable.open(factors)
        crops = open_crops(config, LatentStore.open(data), table)
        network = build_network(config, table)
        beginning = _beginning(init, network, output, resume)
        if launch_number("RANK", 0) == 0 and beginning.rows:
            print(format_rows(beginning.rows), file=sys.stderr)
        task = build_task(config, table, network)
        task.init = beginning.record
        return task, crops

    return fit(make, config, output, resume)


def format_plan(
    data: Path,
    factors: Path,
    output: Path | None,
    config: SynthesisConfig,
    resume: bool = False,
    init: Path | None = None,
    processes: int = 1,
    local: int | None = None,
) -> str:
    """Format the plan of a run, to be read; arguments as for :func:`train_synthesis`.

    Raises:
        UserError: for all that :func:`train_synthesis` would refuse before its first step.
    """
    table = FactorTable.open(factors)
    crops = open_crops(config, LatentStore.open(data), table)
    with torch.device("meta"):
        network = build_network(config, table)
        task = build_task(config, table, network)
    check_start(task, config, output, crops.identity, resume, processes)
    x, y, z = table.window
    count = si(sum(parameter.numel() for parameter in network.parameters()), "")
    rows: Rows = [
        ("network", f"{type(network).__name__}, {count} parameters"),
        ("crops", f"windows of {x} x {y} x {z} latent voxels, {crops.windows} to train on"),
        ("objective", f"{config.diffusion.objective}, content {config.content}"
                      + "".join(f", aligned until step {step}" for step in task.phase_starts())),
        ("data", f"{len(table.volumes)} volumes; held out: {crops.held_out.describe()}"),
    ]  # fmt: skip
    rows += _beginning(init, network, output, resume).rows
    rows += describe_run(task, config, processes, local)
    return format_rows(rows)
