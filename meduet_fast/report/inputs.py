"""Gather what a report is made of, the run, its store and its networks, and measure everything on them."""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

import meduet_fast
from meduet_fast.autoencoder import Tokenizer, load_tokenizer
from meduet_fast.data.store import LatentStore
from meduet_fast.data.store_index import index_path
from meduet_fast.engine.checkpoint import latest_checkpoint, read_run
from meduet_fast.engine.loop import RUN_FILE
from meduet_fast.engine.metrics import METRICS_FILE, first_and_last, read_metrics
from meduet_fast.errors import UserError
from meduet_fast.models import MeDUET
from meduet_fast.prepare.import_cache import TOKENIZER as IMPORTED
from meduet_fast.pretraining.config import doubts
from meduet_fast.probing import (
    FactorTable,
    ProbeResult,
    SwapErrors,
    choose_crops,
    probe_factors,
    swap_errors,
    untrained_like,
)
from meduet_fast.progress import track

from .curves import HEADLINE_LOSS, Records
from .pictures import Side, choose_pairs, make_sides, prepared_image

RECIPE = 3  # raised when the code makes other reports of the same run, so that earlier ones count as stale
# The average of the weights over the last steps: steadier than the student, and what users take downstream.
NETWORK = "teacher"


@dataclass(frozen=True)
class ReportInputs:
    """Run, store and networks of a report.

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

    def doubts(self) -> list[str]:
        """Return what the run warned about at its start."""
        optimizer = self.config["optimizer"]
        momenta = optimizer["teacher_momentum"], optimizer["final_teacher_momentum"]
        return doubts(self.config["steps"], *momenta, len(self.store.domains))

    def identity(self) -> str:
        """Compute the SHA-256 (hex) of all that a report depends on."""
        digest = hashlib.sha256(f"{meduet_fast.__version__} {RECIPE} {self.store.path.resolve()}".encode())
        for path in (self.run / METRICS_FILE, self.weights, index_path(self.store.path)):
            digest.update(hashlib.sha256(path.read_bytes()).digest())
        return digest.hexdigest()


def open_run(run: Path, data: Path | None) -> ReportInputs:
    """Find and check everything, before any long work.

    Raises:
        UserError: no run, no checkpoint or records in it, no store at its place, or a store whose tokenizer
            is not to be had.
    """
    if not (run / RUN_FILE).is_file():
        raise UserError(f"{run}: no {RUN_FILE} found; expected the folder of a pretraining run")
    settings = read_run(run, of_checkpoint=False)
    checkpoint = latest_checkpoint(run)
    records = read_metrics(run)
    if not records:
        raise UserError(f"{run / METRICS_FILE}: no records yet; let the run go on for log_every steps")
    path = data or Path(settings["data"])
    if data is None and not path.exists():
        raise UserError(f"{path}: the run's latent store is no longer there; say where it is with --data")
    store = LatentStore.open(path)
    config = settings["config"]
    if store.index.channels != config["model"]["in_channels"]:
        raise UserError(
            f"{path}: latents have {store.index.channels} channels, the run was trained on "
            f"{config['model']['in_channels']}; name its own store with --data"
        )
    step = read_run(checkpoint)["step"]
    weights = checkpoint / f"{NETWORK}.safetensors"
    if not weights.is_file():
        raise UserError(f"{weights}: not found; the checkpoint is not complete")
    tokenizer = None
    if store.index.tokenizer != IMPORTED:
        spec = store.index.tokenizer_spec
        tokenizer = load_tokenizer(spec, "cuda" if torch.cuda.is_available() else "cpu")
        if tokenizer.identity != store.index.tokenizer:
            raise UserError(
                f"{store.path}: its latents are of tokenizer {store.index.tokenizer}, but {spec!r} is now "
                f"{tokenizer.identity}; run `meduet-fast prepare` and pretrain again, or put the old "
                "tokenizer back"
            )
    return ReportInputs(run, config, records, weights, step, store, tokenizer)


@dataclass(frozen=True)
class Findings:
    """Results of all measurements.

    Attributes:
        loss: the headline's, see ``curves.py``, over the first and over the last tenth of the records.
        separation: None if the store cannot tell.
        why_not: the reason, then.
        table: factors of the trained network; None as above.
        swaps: names of two domains of one anatomy, and the errors of swapping their styles.
        pictures: pairs of crops and what became of them.
    """

    loss: tuple[float, float]
    separation: ProbeResult | None
    why_not: str
    table: FactorTable | None
    swaps: list[tuple[str, str, SwapErrors]]
    pictures: list[tuple[Side, Side]]

    def numbers(self) -> dict[str, Any]:
        """Return everything but the images, as JSON values."""
        first, last = self.loss
        return {
            f"{HEADLINE_LOSS}_loss": {"first_tenth": first, "last_tenth": last},
            "separation": self.separation.to_dict() if self.separation else None,
            "why_no_separation": self.why_not,
            "swaps": [
                {"first": first, "second": second, "errors": asdict(errors)}
                for first, second, errors in self.swaps
            ],
            "pictures": [
                {"first": sides[0].own, "second": sides[1].own, "psnr_db": [side.psnr() for side in sides]}
                for sides in self.pictures
            ],
        }


def measure(inputs: ReportInputs) -> Findings:
    """Measure separation and swap styles, on held-out crops."""
    loss = first_and_last(inputs.records, HEADLINE_LOSS)
    model = MeDUET.from_pretrained(inputs.weights)
    model = model.to("cuda" if torch.cuda.is_available() else "cpu")
    store, config = inputs.store, inputs.config
    try:
        crops = choose_crops(store, model.config.latent_size, config["held_out_fraction"])
    except UserError as error:  # the rest of the report is worth having; the page gives the reason
        return Findings(loss, None, str(error), None, [], [])
    untrained = untrained_like(model.config, config["seed"]).to(model.cls_token.device)
    separation, table = probe_factors(model, untrained, store, crops)
    pairs = choose_pairs(store, crops)
    swaps: list[tuple[str, str, SwapErrors]] = []
    for pair in track([pair for pair in pairs if pair.same_anatomy], "Swapping styles", unit="pair"):
        first, second = (store.entries[index].domain for index in pair.volumes)
        swaps.append((first, second, swap_errors(model, store, crops, *pair.volumes)))
    pictures: list[tuple[Side, Side]] = []
    if inputs.tokenizer is not None:
        volumes = sorted({index for pair in pairs for index in pair.volumes})
        images = {
            index: prepared_image(store, index) for index in track(volumes, "Reading images", unit="volume")
        }
        for pair in track(pairs, "Decoding", unit="pair"):
            pictures.append(make_sides(model, inputs.tokenizer, store, pair, images))
    return Findings(loss, separation, "", table, swaps, pictures)
