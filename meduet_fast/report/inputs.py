"""Gather what a report is made of, the run, its store and its networks, and measure everything on them."""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

import meduet_fast
from meduet_fast.autoencoder import Tokenizer, load_tokenizer
from meduet_fast.data.held_out import HELD_OUT_VOLUMES, HeldOut
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
    FillErrors,
    PairVerdict,
    ProbeResult,
    StyleChange,
    choose_crops,
    fill_errors,
    probe_factors,
    untrained_like,
)
from meduet_fast.progress import track

from .curves import HEADLINE_LOSS, Records
from .pictures import FilledPicture, Painter, StylePicture, choose_pairs

RECIPE = 4  # raised when the code makes other reports of the same run, so that earlier ones count as stale
# The average of the weights over the last steps: steadier than the student, and what users take downstream.
NETWORK = "teacher"
WAYS = ("by_statistics", "by_rank")  # to change a style, see probing.style_swap


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
        held_out: what the run was not trained on.
        tokenizer: what decodes them; None for imported latents, whose tokenizer is unknown.
    """

    run: Path
    config: dict[str, Any]
    records: Records
    weights: Path
    step: int
    store: LatentStore
    held_out: HeldOut
    tokenizer: Tokenizer | None

    @property
    def whole(self) -> bool:
        """Tell whether the network was trained to put whole crops together."""
        return bool(self.config["objective"].get("lambda_whole", 0))

    def doubts(self) -> list[str]:
        """Return what is hardly meant, as of the checkpoint that is looked at."""
        optimizer = self.config["optimizer"]
        momenta = optimizer["teacher_momentum"], optimizer["final_teacher_momentum"]
        nothing = "nothing was held out: what is called so here is a third of each volume, which training saw"
        return [
            *([] if self.held_out.fraction else [nothing]),
            *doubts(self.config["steps"], *momenta, len(self.store.domains), self.step),
            *self.held_out.doubts(self.config["model"]["latent_size"]),
        ]

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
    held_out = HeldOut.of_run(store, config["held_out_fraction"], settings.get(HELD_OUT_VOLUMES))
    return ReportInputs(run, config, records, weights, step, store, held_out, tokenizer)


@dataclass(frozen=True)
class Findings:
    """Results of all measurements.

    Attributes:
        loss: the headline's, see ``curves.py``, over the first and over the last tenth of the records.
        separation: None if the store cannot tell.
        why_not: the reason, then.
        table: factors of the trained network; None as above.
        filled: how well hidden tokens are filled in, for each volume looked at.
        verdicts: on changes of style between two acquisitions of one anatomy, both directions together.
        panels: every direction of every pair: own domain, the other's, and what was measured.
        filled_pictures: regions whose tokens were filled in.
        style_pictures: regions whose style was changed.
    """

    loss: tuple[float, float]
    separation: ProbeResult | None
    why_not: str
    table: FactorTable | None
    filled: list[FillErrors]
    verdicts: list[PairVerdict]
    panels: list[tuple[str, str, StyleChange]]
    filled_pictures: list[FilledPicture]
    style_pictures: list[StylePicture]

    def fill_gain(self) -> float:
        """Return the part of interpolation's error that the network removes; negative if it adds to it.

        Errors are parts of their volume's variance, so that each volume counts the same.
        """
        network = sum(item.network / item.variance for item in self.filled)
        return 1 - network / sum(item.interpolation / item.variance for item in self.filled)

    def best_way(self) -> str:
        """Return the way, "by_statistics" or "by_rank", that brings images nearer to the truth on average."""
        return max(WAYS, key=self.style_gain)

    def style_gain(self, way: str) -> float:
        """Return the mean over the pairs of :meth:`PairVerdict.gain`."""
        return fmean(verdict.gain(way) for verdict in self.verdicts)

    def numbers(self) -> dict[str, Any]:
        """Return everything but the images, as JSON values."""
        first, last = self.loss
        return {
            f"{HEADLINE_LOSS}_loss": {"first_tenth": first, "last_tenth": last},
            "separation": self.separation.to_dict() if self.separation else None,
            "why_no_separation": self.why_not,
            "filled": [asdict(item) for item in self.filled],
            "fill_gain": self.fill_gain() if self.filled else None,
            "style_pairs": [
                {
                    **asdict(verdict),
                    **{f"gain_{way}": verdict.gain(way) for way in WAYS},
                    **{f"works_{way}": verdict.works(way) for way in WAYS},
                }
                for verdict in self.verdicts
            ],
            "style_gain": {way: self.style_gain(way) for way in WAYS} if self.verdicts else None,
            "style_panels": [
                {"domain": own, "style_of": other, **asdict(change)} for own, other, change in self.panels
            ],
            "pictures": [
                *({"domain": item.region.domain, "psnr_db": item.psnr} for item in self.filled_pictures),
                *(
                    {"domain": item.region.domain, "style_of": item.other, "away": item.away}
                    for item in self.style_pictures
                ),
            ],
        }


def measure(inputs: ReportInputs) -> Findings:
    """Measure separation, what is filled in, and changes of style, on held-out crops and regions."""
    loss = first_and_last(inputs.records, HEADLINE_LOSS)
    model = MeDUET.from_pretrained(inputs.weights)
    model = model.to("cuda" if torch.cuda.is_available() else "cpu")
    store, config = inputs.store, inputs.config
    try:
        crops = choose_crops(store, model.config.latent_size, inputs.held_out)
    except UserError as error:  # the rest of the report is worth having; the page gives the reason
        return Findings(loss, None, str(error), None, [], [], [], [], [])
    untrained = untrained_like(model.config, config["seed"]).to(model.cls_token.device)
    separation, table = probe_factors(model, untrained, store, crops)
    filled = fill_errors(model, store, crops)
    painter = Painter(model, inputs.whole, store, crops, inputs.tokenizer)
    pairs = choose_pairs(store, crops)
    verdicts: list[PairVerdict] = []
    panels: list[tuple[str, str, StyleChange]] = []
    style_pictures: list[StylePicture] = []
    for pair in track(pairs, "Changing styles", unit="pair"):
        first, second = pair.volumes
        domains = store.entries[first].domain, store.entries[second].domain
        changed, forth = painter.change(first, second, pair.same_anatomy)
        _, back = painter.change(second, first, pair.same_anatomy)
        panels += [(*domains, forth), (*domains[::-1], back)]
        if pair.same_anatomy:
            verdicts.append(PairVerdict.of(*domains, (forth, back)))
        if inputs.tokenizer is not None:
            style_pictures.append(painter.draw_style(first, second, pair.same_anatomy, changed, forth))
    filled_pictures: list[FilledPicture] = []
    if inputs.tokenizer is not None:
        others = [pair.volumes for pair in pairs if not pair.same_anatomy]  # no partner that shows the place
        shown = [others[0], others[0][::-1]] if others else [pairs[0].volumes]
        filled_pictures = [
            painter.draw_filled(*volumes) for volumes in track(shown, "Filling in", unit="volume")
        ]
    return Findings(loss, separation, "", table, filled, verdicts, panels, filled_pictures, style_pictures)
