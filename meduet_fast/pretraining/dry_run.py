"""The plan of a run, told before it starts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from meduet_fast.data.store import LatentStore
from meduet_fast.engine.distributed import launch_number
from meduet_fast.engine.parallel import shard_count

from .config import PretrainConfig
from .cost import MemoryEstimate, count_parameters, flops_per_sample, memory_estimate
from .losses import ObjectiveConfig
from .train import check_store

# Bytes of a parameter on disk: student, teacher, AdamW's two moments in float32, and both models once more.
_CHECKPOINT_BYTES = 6 * 4


def _phases(config: PretrainConfig) -> list[tuple[int, int, ObjectiveConfig]]:
    """(first step, end, objective) of each stretch of steps with the same losses."""
    starts = sorted(
        {0, *(s for s in (config.mftd_start_step, config.siqc_start_step) if 0 < s < config.steps)}
    )
    ends = [*starts[1:], config.steps]
    return [(start, end, config.objective_at(start)) for start, end in zip(starts, ends, strict=True)]


def _losses_on(objective: ObjectiveConfig) -> str:
    return " + ".join(["reconstruction", *["MFTD"] * objective.mftd, *["SiQC"] * objective.siqc])


def _si(value: float, unit: str) -> str:
    """Four digits with a decimal prefix: 8.375e11 FLOP -> 837.5 GFLOP."""
    prefixes = " kMGTPEZ"
    power = next((n for n in range(len(prefixes)) if value < 999.95 * 1000**n), len(prefixes) - 1)
    return f"{value / 1000**power:.4g} {prefixes[power].strip()}{unit}"


def _memory(estimate: MemoryEstimate) -> str:
    listed = ", ".join(f"{name} {_si(value, 'B')}" for name, value in asdict(estimate).items())
    return f"{_si(estimate.total, 'B')} a GPU: {listed}"


def _store_lines(data: Path, config: PretrainConfig) -> list[str]:
    store = LatentStore.open(data)
    check_store(store, config)
    edges = [min(entry.grid) for entry in store.entries]
    return [
        f"{len(store.entries)} volumes of {len(store.domains)} domains ({', '.join(store.domains)})",
        f"their shortest edges are {min(edges)} to {max(edges)} latent voxels, a crop's is "
        f"{config.model.latent_size}",
    ]


def _mesh(config: PretrainConfig, processes: int, shards: int) -> str:
    if processes == 1:
        return "1 GPU"
    copies = {"ddp": "a copy of all weights on each", "fsdp": "one copy, sharded over all"}
    text = copies.get(config.parallel, f"{processes // shards} copies, each sharded over {shards}")
    return f"{processes} processes, one GPU each: {text} ({config.parallel})"


def format_plan(
    config: PretrainConfig, data: Path | None = None, processes: int = 1, local: int | None = None
) -> str:
    """The plan of a run, to be read.

    Args:
        config: of the run.
        data: its latent store, if there is one yet.
        processes: as many as GPUs.
        local: those of one machine; all of them if None.

    Raises:
        UserError: if the store is absent, damaged or does not fit the configuration, or the processes do not.
    """
    model = config.model
    count = count_parameters(model)
    per_step = config.batch_size * config.accumulate * processes
    shards = shard_count(config, processes, local or processes)
    rows: list[tuple[str, str]] = [
        ("encoder", f"{model.depth} blocks, {model.embed_dim} wide, {model.num_heads} heads"),
        ("decoder", f"{model.decoder_depth} blocks, {model.decoder_embed_dim} wide, "
                    f"{model.decoder_num_heads} heads"),
        ("tokens", f"{model.num_tokens} a crop: {model.latent_size}^3 latent voxels in patches of "
                   f"{model.patch_size}^3"),
        ("parameters", f"{_si(count, '')} of the student, as many of the teacher"),
    ]  # fmt: skip
    if data is not None:
        rows += [("data", line) for line in _store_lines(data, config)]
    rows += [
        ("mesh", _mesh(config, processes, shards)),
        ("batch", f"{config.batch_size} crops at once x {config.accumulate} accumulated x {processes} = "
                  f"{per_step} crops a step"),
        ("steps", f"{config.steps}, {config.steps * per_step} crops"),
    ]  # fmt: skip
    total = 0
    for start, end, objective in _phases(config):
        flops = flops_per_sample(model, objective)
        total += flops * (end - start) * per_step
        rows.append(("compute", f"{_si(flops, 'FLOP')} a crop from step {start} on: {_losses_on(objective)}"))
    rows.append(("compute", f"{_si(total, 'FLOP')} in all"))
    rows.append(("memory", f"{_memory(memory_estimate(config, shards))} (estimated; CUDA takes 2 GB more)"))
    checkpoint = _si(_CHECKPOINT_BYTES * count, "B")
    rows.append(("disk", f"{config.keep_checkpoints} checkpoints of {checkpoint}"))
    lines, last = [], ""
    for name, text in rows:
        lines.append(f"{'' if name == last else name:12}{text}")
        last = name
    return "\n".join(lines)


def print_plan(config: PretrainConfig, data: Path | None = None) -> None:
    """Print the plan of a run for the processes that torchrun started, once.

    Raises:
        UserError: as :func:`format_plan`.
    """
    processes = launch_number("WORLD_SIZE", 1)
    if launch_number("RANK", 0) == 0:
        print(format_plan(config, data, processes, launch_number("LOCAL_WORLD_SIZE", processes)))


def format_sizes(configs: Mapping[str, PretrainConfig]) -> str:
    """Parameters, FLOPs and memory of several configurations, as a Markdown table."""
    rows: list[list[str]] = [
        ["configuration", "blocks x width (heads)", "patch", "tokens", "parameters", "FLOP a crop",
         "without MFTD", "crops at once x accumulated", "recompute", "memory a GPU", "sharded over 8"],
    ]  # fmt: skip
    rows.append(["---"] * len(rows[0]))
    by_size = sorted(configs.items(), key=lambda item: (item[1].model.embed_dim, item[1].model.num_tokens))
    for name, config in by_size:
        model = config.model
        row = [f"`{name}`", f"{model.depth} x {model.embed_dim} ({model.num_heads})"]
        row += [str(model.patch_size), str(model.num_tokens), _si(count_parameters(model), "")]
        row += [_si(flops_per_sample(model, ObjectiveConfig(mftd=mftd)), "") for mftd in (True, False)]
        row.append(f"{config.batch_size} x {config.accumulate}")
        row.append("yes" if config.recompute else "no")
        whole, sharded = memory_estimate(config), memory_estimate(config, 8)
        row += [_si(estimate.total, "B") for estimate in (whole, sharded)]
        rows.append(row)
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
