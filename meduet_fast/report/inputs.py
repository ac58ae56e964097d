"""What a report is made of: the run, its store, its networks; and everything that is measured on them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

import meduet_fast
from meduet_fast.autoencoder import Tokenizer, load_tokenizer
from meduet_fast.data.store import INDEX_NAME, LatentStore
from meduet_fast.engine.checkpoint import latest_checkpoint, read_run
from meduet_fast.engine.loop import RUN_FILE
from meduet_fast.engine.metrics import METRICS_FILE, read_metrics
from meduet_fast.errors import UserError
from meduet_fast.models import MeDUET
from meduet_fast.prepare.import_cache import TOKENIZER as IMPORTED
from meduet_fast.probing import (
    EvaluationPlan,
    ExchangeErrors,
    FactorTable,
    Separation,
    exchange_errors,
    factor_table,
    measure,
    plan_evaluation,
    untrained_like,
)
from meduet_fast.progress import progress_bar, track

from .curves import Records, first_and_last
from .pictures import Pair, Side, choose_pairs, make_sides, prepared_image

RECIPE = 1  # raised when the code makes other reports of the same run, so that earlier ones count as stale
# The average of the weights over the last steps: steadier than the student, and what users take downstream.
NETWORK = "teacher"


@dataclass(frozen=True)
class Material:
    """A run and what belongs to it.

    Attributes:
        run: its folder.
        config: its settings.
        records: what it logged.
        weights: file of the network that is looked at.
        step: steps that it was trained for.
        store: the latents.
        tokenizer: what decodes them; None for imported latents, whose tokenizer is unknown.
    """

    run: Path
    config: dict[str, Any]
    records: Records
    weights: Path
    step: int
    store: LatentStore
    tokenizer: Tokenizer | None

    def identity(self) -> str:
        """SHA-256 (hex) of all that a report depends on."""
        digest = hashlib.sha256(f"{meduet_fast.__version__} {RECIPE} {self.store.path.resolve()}".encode())
        for path in (self.run / METRICS_FILE, self.weights, self.store.path / INDEX_NAME):
            digest.update(hashlib.sha256(path.read_bytes()).digest())
        return digest.hexdigest()


def open_run(run: Path, data: Path | None) -> Material:
    """Find and check everything, before any long work.

    Raises:
        UserError: no run, no checkpoint or records in it, no store at its place, or a store whose tokenizer
            is not to be had.
    """
    if not (run / RUN_FILE).is_file():
        raise UserError(f"{run}: no {RUN_FILE} found; expected the folder of a pretraining run")
    settings = read_run(run)
    checkpoint = latest_checkpoint(run)
    records = read_metrics(run)
    if not records:
        raise UserError(f"{run / METRICS_FILE}: no records yet; let the run go on for log_every steps")
    path = data or Path(settings["data"])
    if data is None and not path.exists():
        raise UserError(f"{path}: the run's latent store is no longer there; say where it is with --data")
    store = LatentStore.open(path)
    config = settings["config"]
    if store.channels != config["model"]["in_channels"]:
        raise UserError(
            f"{path}: latents have {store.channels} channels, the run was trained on "
            f"{config['model']['in_channels']}; name its own store with --data"
        )
    step = read_run(checkpoint)["step"]
    weights = checkpoint / f"{NETWORK}.safetensors"
    if not weights.is_file():
        raise UserError(f"{weights}: not found; the checkpoint is not complete")
    return Material(run, config, records, weights, step, store, _tokenizer_of(store))


def _tokenizer_of(store: LatentStore) -> Tokenizer | None:
    if store.tokenizer == IMPORTED:
        return None
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = load_tokenizer(store.index.tokenizer_spec, device)
    if tokenizer.identity != store.tokenizer:
        raise UserError(
            f"{store.path}: its latents are of tokenizer {store.tokenizer}, but "
            f"{store.index.tokenizer_spec!r} is now {tokenizer.identity}; run `meduet-fast prepare` and "
            "pretrain again, or put the old tokenizer back"
        )
    return tokenizer


@dataclass(frozen=True)
class ExchangeResult:
    """Exchanged styles between two domains: mean errors over many places."""

    first: str
    second: str
    errors: ExchangeErrors


@dataclass(frozen=True)
class Findings:
    """All that was measured.

    Attributes:
        reconstruction: loss of hidden tokens over the first and over the last tenth of the records.
        separation: None if the store cannot tell.
        why_not: the reason, then.
        table: factors of the trained network; None as above.
        exchanges: between volumes of one anatomy.
        pictures: pairs of crops and what became of them.
    """

    reconstruction: tuple[float, float]
    separation: Separation | None
    why_not: str
    table: FactorTable | None
    exchanges: list[ExchangeResult]
    pictures: list[tuple[Pair, tuple[Side, Side]]]

    def numbers(self) -> dict[str, Any]:
        """Everything but the images, as JSON values."""
        first, last = self.reconstruction
        return {
            "reconstruction_loss": {"first_tenth": first, "last_tenth": last},
            "separation": self.separation.to_dict() if self.separation else None,
            "why_no_separation": self.why_not,
            "exchanges": [asdict(item) for item in self.exchanges],
            "pictures": [
                {"first": sides[0].own, "second": sides[1].own, "psnr_db": [side.psnr() for side in sides]}
                for _, sides in self.pictures
            ],
        }


def investigate(material: Material) -> Findings:
    """Measure separation and exchange styles, on held-out crops."""
    reconstruction = first_and_last(material.records, "reconstruction")
    model = MeDUET.from_pretrained(material.weights)
    model = model.to("cuda" if torch.cuda.is_available() else "cpu")
    store = material.store
    try:
        plan = plan_evaluation(store, model.config.latent_size, material.config["held_out_fraction"])
    except UserError as error:  # the rest of the report is worth having; the page gives the reason
        return Findings(reconstruction, None, str(error), None, [], [])
    untrained = untrained_like(model.config, material.config["seed"]).to(model.cls_token.device)
    with progress_bar("Measuring separation", 2 * plan.num_crops, "crop") as bar:
        table = factor_table(model, store, plan, bar)
        separation = measure(table, factor_table(untrained, store, plan, bar), plan, store)
    pairs = choose_pairs(store, plan)
    return Findings(
        reconstruction,
        separation,
        "",
        table,
        _exchanges(model, store, plan, pairs),
        _pictures(model, material, pairs),
    )


def _exchanges(
    model: MeDUET, store: LatentStore, plan: EvaluationPlan, pairs: Sequence[Pair]
) -> list[ExchangeResult]:
    known = [pair for pair in pairs if pair.same_anatomy]
    found = []
    for pair in track(known, "Exchanging styles", unit="pair"):
        first, second = (store.entries[index].domain for index in pair.volumes)
        found.append(ExchangeResult(first, second, exchange_errors(model, store, plan, *pair.volumes)))
    return found


def _pictures(
    model: MeDUET, material: Material, pairs: Sequence[Pair]
) -> list[tuple[Pair, tuple[Side, Side]]]:
    if material.tokenizer is None:
        return []
    store = material.store
    volumes = sorted({index for pair in pairs for index in pair.volumes})
    images = {
        index: prepared_image(store, index) for index in track(volumes, "Reading images", unit="volume")
    }
    return [
        (pair, make_sides(model, material.tokenizer, store, pair, images))
        for pair in track(pairs, "Decoding", unit="pair")
    ]
