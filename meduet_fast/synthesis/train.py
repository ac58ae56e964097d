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
from meduet_fast.engine.dry_run import format_rows
from meduet_fast.models.transformer3d import MeDUETTransformer3D
from meduet_fast.models.unet3d import MeDUETUNet3D

from .alignment import AlignmentHead
from .config import SynthesisConfig
from .crops import FactorCrops, Given
from .factors import FactorTable
from .networks import Network
from .task import SynthesisTraining
from .transfer import transfer


def new_network(config: SynthesisConfig, patch: int, **sizes: Any) -> Network:
    """Build a network of these settings, with first weights.

    Args:
        config: of the run.
        patch: edge of the encoder's patches in latent voxels.
        sizes: arguments of the networks that depend on the data.

    Raises:
        UserError: for sizes that do not fit together.
    """
    sizes |= {
        "content": config.content,
        "content_projection": config.content_projection,
        "content_pool": config.content_pool,
        "content_by_volume": config.standardise == "volume",
        "prediction": config.diffusion.objective,
    }
    if config.network == "transformer":
        return MeDUETTransformer3D(**sizes, **asdict(config.transformer))
    return MeDUETUNet3D(**sizes, **asdict(config.unet), features_patch=patch)


def build_network(config: SynthesisConfig, table: FactorTable) -> Network:
    """Build the network of a run, with first weights, for the crops and factors of a table.

    Raises:
        UserError: for sizes that do not fit together.
    """
    network = new_network(
        config,
        table.patch,
        in_channels=len(table.latents_mean),
        sample_size=table.window,
        content_dim=table.content.shape[1],
        style_dim=table.style.shape[1],
        latents_mean=tuple(table.latents_mean.tolist()),
        latents_std=tuple(table.latents_deviation.tolist()),
    )
    if config.standardise == "none":
        return network
    content = table.content_mean, table.content_deviation  # (D,) each
    if config.content == "tokens":
        content = table.token_mean, table.token_deviation
    if config.standardise == "volume":
        content = torch.zeros_like(content[0]), torch.ones_like(content[1])  # they come as such
    network.set_statistics(*content, table.style_mean, table.style_deviation)
    return network


def open_crops(config: SynthesisConfig, store: LatentStore, table: FactorTable) -> FactorCrops:
    """Open the crops of a run.

    Raises:
        UserError: see :class:`~.crops.FactorCrops`.
    """
    held_out = HeldOut.choose(store, config.held_out, config.held_out_fraction, config.seed)
    given = Given(
        config.factor_source, config.content == "tokens", config.standardise == "volume",
        config.exchanged_share, config.diffusion.align > 0,
    )  # fmt: skip
    return FactorCrops(store, table, config, held_out, given)


def build_task(config: SynthesisConfig, table: FactorTable, network: Network) -> SynthesisTraining:
    """Build the task of a run, with the head for alignment if it is on."""
    head = None
    if config.diffusion.align:
        head = AlignmentHead(network.feature_width, table.content.shape[1] + table.style.shape[1])
    return SynthesisTraining(config, network, head, table)


def begin(init: Path | None, network: Network, output: Path | None, resume: bool) -> Beginning:
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
        beginning = begin(init, network, output, resume)
        if launch_number("RANK", 0) == 0 and beginning.rows:
            print(format_rows(beginning.rows), file=sys.stderr)
        task = build_task(config, table, network)
        task.init = beginning.record
        return task, crops

    return fit(make, config, output, resume)
