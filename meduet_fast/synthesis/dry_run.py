"""Tell the plan of a run before it starts, and the sizes of the packaged configurations."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from meduet_fast.data.store import LatentStore
from meduet_fast.engine.dry_run import Rows, check_start, describe_run, format_rows, format_table, si
from meduet_fast.engine.memory import describe_memory
from meduet_fast.engine.parallel import shard_count

from .config import SynthesisConfig
from .cost import flops_per_crop, memory_estimates
from .factors import FactorTable
from .train import begin, build_network, build_task, new_network, open_crops

# What the packaged configurations are meant for: a network of `pretrain --config vit_base`, or `demo`.
_PUBLISHED = {"sample_size": (64, 64, 32), "content_dim": 768, "style_dim": 192, "patch": 4}
_DEMO = {"sample_size": (12, 12, 12), "content_dim": 96, "style_dim": 24, "patch": 2}


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
    """Format the plan of a run, to be read; arguments as for :func:`~.train.train_synthesis`.

    Raises:
        UserError: for all that :func:`~.train.train_synthesis` would refuse before its first step.
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
                      + "".join(f", aligned until step {start}" for start in task.phase_starts())),
        ("data", f"{len(table.volumes)} volumes; held out: {crops.held_out.describe()}"),
    ]  # fmt: skip
    rows += begin(init, network, output, resume).rows
    rows += describe_run(task, config, processes, local)
    shards = shard_count(config, processes, local or processes)
    [estimate] = memory_estimates(config, network, table.patch, [shards])
    rows += describe_memory(estimate, network, config.averages, config)
    return format_rows(rows)


def format_sizes(configs: Mapping[str, SynthesisConfig]) -> str:
    """Format parameters, FLOPs and memory of packaged configurations as a Markdown table."""
    rows = [
        ["configuration", "blocks x width (heads), or channels", "parameters", "crop", "FLOP a crop",
         "crops at once", "memory a GPU / sharded over 8"],
    ]  # fmt: skip
    sized = []
    for name, config in configs.items():
        sizes: dict[str, Any] = _DEMO if name.endswith("_demo") else _PUBLISHED
        with torch.device("meta"):
            network = new_network(config, **sizes)
        count = sum(parameter.numel() for parameter in network.parameters())
        flops = flops_per_crop(network, sizes["patch"])
        estimates = memory_estimates(config, network, sizes["patch"], (1, 8))
        memory = [si(estimate.total, "B") for estimate in estimates]
        body, unet = config.transformer, config.unet
        shape = f"{body.depth} x {body.hidden_size} ({body.num_heads})"
        if config.network == "unet":
            shape = f"{', '.join(map(str, unet.num_channels))} ({unet.num_heads})"
        sized.append((count, [
            f"`{name}`", shape, si(count, ""), " x ".join(map(str, sizes["sample_size"])), si(flops, ""),
            f"{config.batch_size}{', recomputed' * config.recompute}", " / ".join(memory),
        ]))  # fmt: skip
    return format_table([*rows, *(row for _, row in sorted(sized))])
