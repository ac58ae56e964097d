"""Measure how well content and style are separated: a linear probe for the domain, a search for the place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from meduet_fast.data.store import LatentStore
from meduet_fast.models import MeDUET, MeDUETConfig
from meduet_fast.progress import ProgressBar

from .crops import ProbeCrops
from .factors import FactorTable, factor_table

if TYPE_CHECKING:
    from sklearn.pipeline import Pipeline


@dataclass(frozen=True)
class FactorScores:
    """One measure (0 to 1) of both factors, of the trained and of an untrained network."""

    content: float
    style: float
    untrained_content: float
    untrained_style: float


@dataclass(frozen=True)
class ProbeResult:
    """Separation of content and style, as probe and retrieval measure it.

    Attributes:
        probe: balanced accuracy of a linear probe for the domain on held-out crops. Style should be high,
            content at chance.
        probe_chance: 1 / number of domains.
        retrieval: how often the nearest crop of another acquisition is the same place. Content should be
            high, style low. None if no volumes show the same anatomy.
        retrieval_chance: 1 / number of places; None as above.
        domains: names of the domains probed.
        volumes: names of the volumes that the held-out crops are of.
        same_anatomy: whether they show the same anatomy; if not, domains differ in content too.
        unseen: whether pretraining kept away from the held-out crops.
        crops_fitted: crops that the probe was fitted on, all volumes together.
        crops_tested: held-out crops, all volumes together.
    """

    probe: FactorScores
    probe_chance: float
    retrieval: FactorScores | None
    retrieval_chance: float | None
    domains: list[str]
    volumes: list[str]
    same_anatomy: bool
    unseen: bool
    crops_fitted: int
    crops_tested: int

    @property
    def gap_points(self) -> float:
        """Probe accuracy of style minus that of content, in percentage points."""
        return 100 * (self.probe.style - self.probe.content)

    def to_dict(self) -> dict[str, Any]:
        """Return all numbers, as JSON values."""
        return {**asdict(self), "gap_points": self.gap_points}


def untrained_like(config: MeDUETConfig, seed: int) -> MeDUET:
    """Build a network as it is before its first step; with a run's seed, that run's own start."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return MeDUET(config)


def probe_factors(
    model: MeDUET, untrained: MeDUET, store: LatentStore, crops: ProbeCrops
) -> tuple[ProbeResult, FactorTable]:
    """Measure how well a network separates content and style, by probe and by retrieval.

    Args:
        model: the trained network; the teacher is the one to use downstream.
        untrained: the same architecture before training, see :func:`untrained_like`.
        store: the latents.
        crops: see :func:`~meduet_fast.probing.crops.choose_crops`.

    Returns:
        What was measured, and the trained network's factors.
    """
    with ProgressBar("Measuring separation", 2 * crops.num_crops, "crop") as bar:
        tables = [factor_table(network, store, crops, bar) for network in (model, untrained)]
    both = [(table, factor) for table in tables for factor in ("content", "style")]
    probe = FactorScores(*(probe_accuracy(table, factor) for table, factor in both))
    retrieval, retrieval_chance = None, None
    if crops.groups:
        found = [place_retrieval(table, crops.groups, factor) for table, factor in both]
        retrieval, retrieval_chance = FactorScores(*(accuracy for accuracy, _ in found)), found[0][1]
    trained = tables[0]
    domains = np.unique(trained.domain)
    result = ProbeResult(
        probe=probe,
        probe_chance=1 / len(domains),
        retrieval=retrieval,
        retrieval_chance=retrieval_chance,
        domains=[store.domains[index] for index in domains],
        volumes=[store.entries[index].name for index in sorted(crops.tested)],
        same_anatomy=bool(crops.groups),
        unseen=crops.unseen,
        crops_fitted=int((~trained.held_out).sum()),
        crops_tested=int(trained.held_out.sum()),
    )
    return result, trained


def fit_probe(values: np.ndarray, domain: np.ndarray) -> Pipeline:
    """Fit a linear probe: logistic regression, L2 penalty of C = 1, on dimensions scaled to deviation 1.

    Args:
        values: (N, D) factors.
        domain: (N,) classes.

    Returns:
        A pipeline of scikit-learn, with ``predict``.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    return make_pipeline(StandardScaler(), LogisticRegression(C=1.0, max_iter=2000)).fit(values, domain)


def probe_accuracy(table: FactorTable, factor: str) -> float:
    """Fit a linear probe for the domain and measure its balanced accuracy (0 to 1).

    Fitted on the crops of the training region, see :func:`fit_probe`, measured on the held-out ones.

    Args:
        table: factors.
        factor: "content" or "style".
    """
    from sklearn.metrics import balanced_accuracy_score

    values, fitted = getattr(table, factor), ~table.held_out
    probe = fit_probe(values[fitted], table.domain[fitted])
    predicted = probe.predict(values[table.held_out])
    return float(balanced_accuracy_score(table.domain[table.held_out], predicted))


def place_retrieval(table: FactorTable, groups: Sequence[Sequence[int]], factor: str) -> tuple[float, float]:
    """Measure how often the nearest held-out crop of another acquisition shows the same place.

    For every ordered pair of volumes of a group, of different domains: each crop of the first looks for its
    nearest among the crops of the second, by the cosine of the factors after the group's mean was subtracted.

    Args:
        table: factors; within a group, equal ``position`` means the same place.
        groups: volumes that show the same anatomy.
        factor: "content" or "style".

    Returns:
        Top-1 accuracy and what guessing would give, both 0 to 1.
    """
    hits, chances = [], []
    for group in groups:
        rows = table.rows(table.held_out & np.isin(table.volume, group))
        values = getattr(rows, factor) - getattr(rows, factor).mean(0)  # (N, D)
        values = values / np.maximum(np.linalg.norm(values, axis=1, keepdims=True), 1e-12)
        for query in group:
            own = rows.volume == query
            for other in group:
                candidates = rows.volume == other
                if rows.domain[candidates][0] == rows.domain[own][0]:
                    continue
                nearest = (values[own] @ values[candidates].T).argmax(1)  # (queries,)
                hits.append(rows.position[candidates][nearest] == rows.position[own])
                chances.append(np.full(own.sum(), 1 / candidates.sum()))
    return float(np.concatenate(hits).mean()), float(np.concatenate(chances).mean())
