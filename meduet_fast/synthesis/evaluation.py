"""The command ``synthesize evaluate``: runs of synthesis into a page of figures, held against each other."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from meduet_fast.autoencoder import Tokenizer, load_tokenizer
from meduet_fast.data.held_out import HELD_OUT_VOLUMES, HeldOut
from meduet_fast.data.store import LatentStore
from meduet_fast.data.store_index import IMPORTED
from meduet_fast.devices import select_device
from meduet_fast.encoding.encode import load_pretrained
from meduet_fast.engine.checkpoint import read_run
from meduet_fast.errors import UserError
from meduet_fast.files import refuse_unwritable
from meduet_fast.progress import ProgressBar

from .conditions import choose_windows
from .crops import check_table
from .factors import FactorTable
from .features import FeatureNetwork, SliceFeatures, TokenizerFeatures
from .judge import EvaluateConfig, Judge, SampleLatents, Scales
from .measures import Bench
from .pipeline import MeDUETPipeline, SamplingSettings
from .report import write_report

FOLDER = "evaluation"
# Takes a run, its table and settings; gives what samples from it, and where that is from, for the page.
OpenGenerator = Callable[[Path, FactorTable, EvaluateConfig], tuple[SampleLatents, Mapping[str, str]]]


def open_pipeline(
    run: Path, table: FactorTable, config: EvaluateConfig
) -> tuple[SampleLatents, Mapping[str, str]]:
    """Open the last checkpoint of a run; each of its samples is one window of the table.

    Raises:
        UserError: see :meth:`~.pipeline.MeDUETPipeline.from_run`.
    """
    pipeline = MeDUETPipeline.from_run(run, config.average).to(select_device(config.device))

    def asked(row: int) -> str:
        x, y, z = table.start[row].tolist()
        return f"{table.volumes[int(table.volume[row])]['name']}@{x},{y},{z}"

    def sample(content: Sequence[int], style: Sequence[int], scales: Scales, seeds: Sequence[int]) -> Tensor:
        settings = SamplingSettings(
            config.steps, config.sampler, *scales, mode=config.mode, batch_size=config.batch_size
        )
        made = pipeline.sample(
            [asked(row) for row in content], [asked(row) for row in style], seeds, settings=settings
        )
        return torch.stack([one.latents for one in made])  # (N, C, x, y, z)

    return sample, {name: str(value) for name, value in pipeline.about()["network"].items()}


def evaluate(
    runs: Sequence[Path],
    output: Path | None,
    config: EvaluateConfig,
    open_generator: OpenGenerator = open_pipeline,
) -> Path:
    """Evaluate runs of synthesis on the same held-out places, with the same seeds.

    Args:
        runs: folders of ``synthesize train``, all of one store and one table of factors.
        output: folder of the page; by default ``evaluation`` in the run, if there is one run.
        config: how.
        open_generator: opens a run to sample from.

    Returns:
        The page; beside it lie the grids and ``evaluation.json``.

    Raises:
        UserError: runs, table, store, encoder or tokenizer are absent, or do not fit together; a folder that
            can't be written; a network of features that is none.
    """
    if not runs or (output is None and len(runs) > 1):
        raise UserError(f"output: found none for {len(runs)} runs, expected a folder for their page")
    output = output or runs[0] / FOLDER
    refuse_unwritable(output)
    names = [run.resolve().name for run in runs]
    if again := [name for name, count in Counter(names).items() if count > 1]:
        raise UserError(f"runs: found two of the name {again[0]}, expected names that tell them apart")
    records = [read_run(run, of_checkpoint=False) for run in runs]
    table, store, held_out = _shared(runs, records)
    device = select_device(config.device)
    found = load_pretrained(Path(table.encoder["weights"]))
    if found.record()["weights_sha256"] != table.encoder["weights_sha256"]:
        raise UserError(f"{found.file}: not the encoder any more that made the factors of {table.path}")
    whole = bool(found.run and found.run["config"].get("objective", {}).get("lambda_whole"))
    tokenizer = _tokenizer(store, device.type)
    networks: list[FeatureNetwork] = [] if tokenizer is None else [TokenizerFeatures(tokenizer)]
    if config.features is not None:
        networks.append(SliceFeatures(Path(config.features), device))
    opened = [open_generator(run, table, config) for run in runs]
    with ProgressBar("Encoding real crops", 1, "set") as bar:
        windows = choose_windows(table, store, held_out, config.seed)
        conditions = windows.conditions(config.samples)
        bench = Bench(
            windows, found.model.to(device), tokenizer, conditions, config.decoded, networks, whole,
            config.seed,
        )  # fmt: skip
        bar.update()
    judge = Judge(bench, config)
    evaluations = [judge.evaluate(name, sample) for name, (sample, _) in zip(names, opened, strict=True)]
    origins = {name: origin for name, (_, origin) in zip(names, opened, strict=True)}
    return write_report(output, judge, evaluations, origins)


def _shared(
    runs: Sequence[Path], records: Sequence[Mapping[str, Any]]
) -> tuple[FactorTable, LatentStore, HeldOut]:
    """Open what all runs were trained on, and tell what all of them held out."""
    first, tables = records[0], {}
    for run, record in zip(runs, records, strict=True):
        if "factors" not in record:
            raise UserError(f"{run}: not a run of synthesis: no 'factors' in its run.json")
        told = record["config"].get("held_out_fraction"), record.get(HELD_OUT_VOLUMES)
        tables[run] = record["factors_identity"], record["data"], told
    if other := next((run for run in runs if tables[run] != tables[runs[0]]), None):
        raise UserError(
            f"{other}: trained on another store or table of factors than {runs[0]}, or held out other volumes"
        )
    table, store = FactorTable.open(first["factors"]), LatentStore.open(first["data"])
    if table.identity != first["factors_identity"]:
        raise UserError(f"{table.path}: another table of factors than {runs[0]} was trained with")
    check_table(table, store)
    fraction, volumes = first["config"]["held_out_fraction"], first.get(HELD_OUT_VOLUMES)
    return table, store, HeldOut.of_run(store, fraction, volumes)


def _tokenizer(store: LatentStore, device: str) -> Tokenizer | None:
    """Load what decodes a store's latents; None for imported ones, whose tokenizer is unknown."""
    if store.index.tokenizer == IMPORTED:
        return None
    tokenizer = load_tokenizer(store.index.tokenizer_spec, device)
    if tokenizer.identity != store.index.tokenizer:
        raise UserError(
            f"{store.path}: its latents are of tokenizer {store.index.tokenizer}, but "
            f"{store.index.tokenizer_spec!r} is now {tokenizer.identity}; put the old tokenizer back"
        )
    return tokenizer
