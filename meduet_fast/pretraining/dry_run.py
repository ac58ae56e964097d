"""Tell the plan of a run before it starts."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from meduet_fast.data.store import LatentStore
from meduet_fast.engine.beginning import find_beginning
from meduet_fast.engine.dry_run import Rows, check_start, describe_run, format_rows, format_table, si
from meduet_fast.engine.memory import describe_memory
from meduet_fast.engine.parallel import shard_count

from .config import PretrainConfig
from .cost import count_parameters, flops_per_sample, memory_estimate
from .init_weights import read_initial
from .losses import ObjectiveConfig
from .task import MeDUETPretraining
from .train import LatentCrops


def format_plan(
    config: PretrainConfig,
    data: Path | None = None,
    processes: int = 1,
    local: int | None = None,
    output: Path | None = None,
    resume: bool = False,
    init: Path | None = None,
) -> str:
    """Format the plan of a run, to be read.

    Args:
        config: of the run.
        data: its latent store, if there is one yet.
        processes: as many as GPUs.
        local: those of one machine; all of them if None.
        output: the run's folder, if it is known yet.
        resume: whether the run in it would go on.
        init: weights that it begins from, if it does.

    Raises:
        UserError: for all that :func:`~meduet_fast.pretraining.pretrain` would refuse before its first step.
    """
    model = config.model
    count = count_parameters(model)
    rows: Rows = [
        ("encoder", f"{model.depth} blocks, {model.embed_dim} wide, {model.num_heads} heads"),
        ("decoder", f"{model.decoder_depth} blocks, {model.decoder_embed_dim} wide, "
                    f"{model.decoder_num_heads} heads"),
        ("tokens", f"{model.num_tokens} a crop: {model.latent_size}^3 latent voxels in patches of "
                   f"{model.patch_size}^3"),
        ("parameters", f"{si(count, '')} of the student, as many of the teacher"),
    ]  # fmt: skip
    domains = identity = None
    doubts: list[str] = []
    if data is not None:
        store = LatentStore.open(data)
        crops = LatentCrops(store, config)
        domains, identity, doubts = (
            len(store.domains),
            crops.identity,
            crops.held_out.doubts(model.latent_size),
        )
        volumes, edges = len(store.entries), [min(entry.grid) for entry in store.entries]
        rows += [
            ("data", f"{volumes} volumes of {domains} domains ({', '.join(store.domains)})"),
            ("data", f"their shortest edges are {min(edges)} to {max(edges)} latent voxels, a crop's is "
                     f"{model.latent_size}"),
            ("held out", crops.held_out.describe()),
        ]  # fmt: skip

    def losses(step: int) -> str:
        objective = config.objective_at(step)
        whole = ["whole crops"] * (objective.lambda_whole > 0)
        return " + ".join(["reconstruction", *whole, *["MFTD"] * objective.mftd, *["SiQC"] * objective.siqc])

    with torch.device("meta"):
        task = MeDUETPretraining(config)
    check_start(task, config, output, identity, resume, processes)
    rows += find_beginning(
        init, lambda path: read_initial(path, task.student).beginning(), output, resume
    ).rows
    rows += describe_run(task, config, processes, local, losses)
    estimate = memory_estimate(config, shard_count(config, processes, local or processes))
    rows += describe_memory(estimate, task.student, 1, config)
    rows += [("warning", doubt) for doubt in (*config.doubts(domains), *doubts)]
    return format_rows(rows)


def format_sizes(configs: Mapping[str, PretrainConfig]) -> str:
    """Format parameters, FLOPs and memory of several configurations as a Markdown table."""
    rows = [
        ["configuration", "blocks x width (heads)", "parameters", "FLOP a crop, with / without MFTD",
         "crops at once", "memory a GPU / sharded over 8"],
    ]  # fmt: skip
    by_size = sorted(configs.items(), key=lambda item: (item[1].model.embed_dim, item[1].model.num_tokens))
    for name, config in by_size:
        model = config.model
        flops = [si(flops_per_sample(model, ObjectiveConfig(mftd=mftd)), "") for mftd in (True, False)]
        memory = [si(memory_estimate(config, shards).total, "B") for shards in (1, 8)]
        rows.append([
            f"`{name}`", f"{model.depth} x {model.embed_dim} ({model.num_heads})",
            si(count_parameters(model), ""), " / ".join(flops),
            f"{config.batch_size}{', recomputed' * config.recompute}", " / ".join(memory),
        ])  # fmt: skip
    return format_table(rows)
