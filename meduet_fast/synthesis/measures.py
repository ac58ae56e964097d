"""Measure a set of crops, one for each condition: are they like real ones, do they obey, are they copies?

The same measures are taken of a generator, of real scans in its place, of the pretrained decoder's exchange
of style and of noise, so that each figure has a floor and a ceiling of its own kind.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from meduet_fast.autoencoder import Tokenizer
from meduet_fast.data.crops import EVALUATION, random_stream
from meduet_fast.data.windows import Start
from meduet_fast.models import MeDUET
from meduet_fast.probing import StyleStatistics, restyle_region_by_statistics, style_statistics
from meduet_fast.probing.probe import fit_probe

from .conditions import Condition, Windows
from .features import CropFactors, FeatureNetwork, crop_factors
from .metrics import bootstrap_interval, frechet_distance, kernel_distance, ms_ssim, rbf_mmd

MOST_TRAINED = 4096  # training crops among which the nearest is looked for
STATISTICS_CROPS = 32  # whose styles stand for their volume when the pretrained decoder exchanges them
HALVES = 20
ENCODER = "encoder"
Distance = Callable[[np.ndarray, np.ndarray], float]
DISTANCES: dict[str, Distance] = {"fid": frechet_distance, "kid": kernel_distance, "mmd": rbf_mmd}


@dataclass(frozen=True)
class Estimate:
    """Hold a figure.

    Attributes:
        value: the figure.
        low, high: ends of its 95 % interval over volumes.
        count: crops that it is of.
    """

    value: float
    low: float
    high: float
    count: int


def ratio_estimate(above: np.ndarray, below: np.ndarray, volumes: np.ndarray, seed: int) -> Estimate:
    """Estimate mean(above) / mean(below), with the interval of a bootstrap over volumes.

    Args:
        above, below: (N,) values; ones below give the mean of those above.
        volumes: (N,) volume of each; all values of a volume are drawn together.
        seed: of the bootstrap.
    """
    value = float(above.mean() / below.mean())
    # One crop is one volume: as of any single volume, the ends are the value.
    low, high = bootstrap_interval(above, volumes, below, seed) if len(above) > 1 else (value, value)
    return Estimate(value, low, high, len(above))


def mean_estimate(values: np.ndarray, volumes: np.ndarray, seed: int) -> Estimate:
    """Estimate a mean; see :func:`ratio_estimate`."""
    return ratio_estimate(values.astype(np.float64), np.ones(len(values)), volumes, seed)


def distance_estimate(
    distance: Distance,
    found: np.ndarray,
    reference: np.ndarray,
    volumes: np.ndarray,
    seed: int,
    halves: int = HALVES,
) -> Estimate:
    """Estimate the distance of two sets of features, mean over planes, with an interval over volumes.

    A bootstrap would draw crops twice, and a crop is too like itself for these distances. Instead halves of
    the volumes are drawn without repeats: their spread is the standard error of the whole.

    Args:
        distance: of two sets (N, F) and (M, F).
        found: (N, P, F) features in each of P planes.
        reference: (M, P, F).
        volumes: (N,) volume of each crop; of one volume, the crops are halved.
        seed: of the halves.
        halves: how many; 0 leaves the interval's ends NaN.
    """

    def over_planes(rows: np.ndarray) -> float:
        with warnings.catch_warnings():  # of few samples, which Judge.doubts tells once
            warnings.simplefilter("ignore", RuntimeWarning)
            return float(np.mean([distance(found[rows, p], reference[:, p]) for p in range(found.shape[1])]))

    value = over_planes(np.arange(len(found)))
    names, member = np.unique(volumes, return_inverse=True)
    if len(names) == 1:
        member = np.arange(len(found))
    total = member.max() + 1
    random, half = random_stream(seed, EVALUATION, number=4), total // 2
    drawn = [np.flatnonzero(np.isin(member, random.permutation(total)[:half])) for _ in range(halves)]
    spread = np.std([over_planes(rows) for rows in drawn if len(rows) > 1] or [np.nan])
    error = 1.96 * float(spread) * np.sqrt((1 / total) / (1 / half - 1 / total))
    return Estimate(value, value - error, value + error, len(found))


class Bench:
    """Measure sets of crops made for one list of conditions; what all sets are held against is made once.

    Args:
        windows: held-out and training windows.
        model: the pretrained network.
        tokenizer: decodes latents; None leaves out all that images tell.
        conditions: what is asked for.
        decoded: how many crops of a set are decoded, of those that a real scan shows.
        networks: give features on which sets are compared, beside the encoder's.
        whole: whether the network was trained to put whole crops together.
        seed: of noise and intervals.

    Attributes:
        shown: conditions whose crops are decoded: numbers in ``conditions``.
        crossed: conditions whose truth is another scan than the content's own.
        asked: (N,) domain asked for.
        volumes: (N,) volume of the content.
    """

    def __init__(
        self,
        windows: Windows,
        model: MeDUET,
        tokenizer: Tokenizer | None,
        conditions: Sequence[Condition],
        decoded: int,
        networks: Sequence[FeatureNetwork] = (),
        whole: bool = False,
        seed: int = 0,
    ) -> None:
        self.windows, self.model, self.tokenizer, self.conditions = windows, model, tokenizer, conditions
        self.networks, self.whole, self.seed = (networks if tokenizer else ()), whole, seed
        self.volumes = np.array([windows.volume(item.content) for item in conditions])  # (N,)
        self.asked = np.array([windows.domain(item.style) for item in conditions])  # (N,)
        known = [number for number, item in enumerate(conditions) if item.truth is not None]
        self.shown = known[:decoded]
        self.crossed = [number for number in known if conditions[number].truth != conditions[number].content]
        self._place = {row: number for number, row in enumerate(windows.tested)}
        self.real = windows.latents(windows.tested)  # (T, C, x, y, z)
        self._factors = crop_factors(model, self.real)
        self._images: dict[int, Tensor] = {}
        self._statistics: dict[int, StyleStatistics] = {}
        fitted = [row for rows in windows.fitted.values() for row in rows]
        domains = np.array([windows.domain(row) for row in fitted])
        styles = crop_factors(model, windows.latents(fitted)).style
        self._probe = fit_probe(styles, domains) if len(windows.fitted) > 1 else None
        random = random_stream(seed, EVALUATION, number=2)
        trained = windows.latents(sorted(random.permutation(windows.trained)[:MOST_TRAINED].tolist()))
        self.mean = trained.mean((0, 2, 3, 4))[:, None, None, None]  # (C, 1, 1, 1)
        self.deviation = trained.std((0, 2, 3, 4))[:, None, None, None].clamp_min(1e-6)  # (C, 1, 1, 1)
        self._trained = self._flat(trained)  # (M, C x y z)
        self._nearest_real = self._nearest(self.real).mean()
        self._reference = self._features(*self._reference_crops()) if len(self.shown) > 1 else {}

    def rows(self, rows: Sequence[int]) -> Tensor:
        """Return held-out windows by row of the table, (N, C, x, y, z)."""
        return self.real[[self._place[row] for row in rows]]

    def image(self, row: int) -> Tensor:
        """Return the image (X, Y, Z) of a held-out window, decoded once."""
        if row not in self._images:
            self._images[row] = self.decode(self.real[self._place[row]])
        return self._images[row]

    def decode(self, latents: Tensor) -> Tensor:
        """Decode a crop (C, x, y, z): an image (X, Y, Z) in [0, 1]."""
        assert self.tokenizer is not None
        return self.tokenizer.decode(latents[None])[0, 0].cpu()

    def real_crops(self) -> Tensor:
        """Return what is real: the truth, and where there is none the crop whose style is asked for."""
        return self.rows([item.style if item.truth is None else item.truth for item in self.conditions])

    def noise(self) -> Tensor:
        """Return noise with mean and deviation of the latents' channels."""
        generator = torch.Generator().manual_seed(self.seed)
        drawn = torch.randn(len(self.conditions), *self.real.shape[1:], generator=generator)
        return drawn * self.deviation + self.mean  # (N, C, x, y, z)

    def exchanged(self) -> Tensor:
        """Let the pretrained decoder give each content the style asked for; by statistics."""
        results = []
        for item in self.conditions:
            content, style = self.rows([item.content, item.style])  # (C, x, y, z) each
            own, donor = (self._style(row) for row in (item.content, item.style))
            results.append(restyle_region_by_statistics(self.model, content, style, own, donor, self.whole))
        return torch.stack(results)  # (N, C, x, y, z)

    def measure(
        self, latents: Tensor, images: dict[int, Tensor] | None, halves: int = HALVES, real: bool = False
    ) -> dict[str, Estimate]:
        """Take all measures of crops.

        Args:
            latents: (N, C, x, y, z), one crop for each condition.
            images: those of ``shown``, by number of the condition; empty leaves out what images tell, None
                also the distances of sets.
            halves: see :func:`distance_estimate`.
            real: whether they are :meth:`real_crops`, of which a candidate place itself is no answer.

        Returns:
            Estimates by name, as far as the store can tell.
        """
        factors = crop_factors(self.model, latents)
        found = {}
        if self._probe is not None:
            hits = self._probe.predict(factors.style) == self.asked  # (N,)
            found["style_obeyed"] = mean_estimate(hits, self.volumes, self.seed)
        placed = self.crossed if real else list(range(len(latents)))
        if placed:
            hits = np.array([self._finds_place(number, factors.content[number]) for number in placed])
            found["content_found"] = mean_estimate(hits, self.volumes[placed], self.seed)
        if self.crossed:
            away = self._flat(latents[self.crossed]) - self._flat(self._truths(self.crossed))
            squares = away.square().mean(1).numpy()  # (crossed,)
            found["distance_to_truth"] = mean_estimate(squares, self.volumes[self.crossed], self.seed)
        nearest = self._nearest(latents)  # (N,)
        ones = np.full(len(nearest), self._nearest_real)
        found["nearest_training"] = ratio_estimate(nearest, ones, self.volumes, self.seed)
        if images:
            found["decoded_error"] = self._decoded_error(images)
        if images is not None and len(self.shown) > 1:
            shown = [images[number] for number in self.shown] if images else []
            features = self._features(
                shown, CropFactors(factors.content[self.shown], factors.style[self.shown])
            )
            volumes = self.volumes[self.shown]
            for kind, rows in features.items():
                for name, distance in DISTANCES.items():
                    found[f"{name}/{kind}"] = distance_estimate(
                        distance, rows, self._reference[kind], volumes, self.seed, halves
                    )
        return found

    def likeness(self, pairs: Sequence[tuple[Tensor, Tensor]], volumes: np.ndarray) -> Estimate:
        """Measure how like the two images of each pair are, by MS-SSIM."""
        one, other = (torch.stack(images)[:, None] for images in zip(*pairs, strict=True))  # (N, 1, X, Y, Z)
        return mean_estimate(ms_ssim(one, other).numpy(), volumes, self.seed)

    def unchanged(self) -> float | None:
        """Return the distance to the truth of the content's own scan, None without any truth."""
        if not self.crossed:
            return None
        own = self.rows([self.conditions[number].content for number in self.crossed])
        return float((self._flat(own) - self._flat(self._truths(self.crossed))).square().mean())

    def elsewhere(self) -> float | None:
        """Return the distance to the truth of other places in its own style, None without any truth."""
        if not self.crossed:
            return None
        truths = [self._truth(number) for number in self.crossed]
        others = self.rows([self._others(row)[0] for row in truths])
        return float((self._flat(others) - self._flat(self.rows(truths))).square().mean())

    def real_likeness(self) -> float:
        """Return the MS-SSIM of two places of one scan, mean over the volumes."""
        rows = [places[:2] for places in self.windows.places.values()]
        pairs = [(self.image(one), self.image(other)) for one, other in rows]
        return self.likeness(pairs, np.arange(len(pairs))).value

    def feature_widths(self) -> dict[str, int]:
        """Return the number of features of each kind that sets are compared on."""
        return {kind: rows.shape[2] for kind, rows in self._reference.items()}

    def chance_of_domain(self) -> float:
        """Return how often a guess names the domain."""
        return 1 / len(self.windows.fitted)

    def chance_of_place(self) -> float:
        """Return how often a guess finds the place."""
        return float(np.mean([1 / len(self.windows.places[volume]) for volume in self.volumes]))

    def _truth(self, number: int) -> int:
        row = self.conditions[number].truth
        assert row is not None
        return row

    def _truths(self, numbers: Sequence[int]) -> Tensor:
        return self.rows([self._truth(number) for number in numbers])

    def _others(self, row: int) -> list[int]:
        """Return the other held-out windows of a window's volume, the one after it first."""
        rows = self.windows.places[self.windows.volume(row)]
        number = rows.index(row)
        return [*rows[number + 1 :], *rows[:number]]

    def _flat(self, latents: Tensor) -> Tensor:
        """Return latents (N, C, x, y, z) as rows in units of their channels' deviations, (N, C x y z)."""
        return ((latents - self.mean) / self.deviation).flatten(1)

    def _nearest(self, latents: Tensor) -> np.ndarray:
        """Return the mean squared difference of each crop to its nearest training crop, (N,)."""
        rows = self._flat(latents)
        nearest = [torch.cdist(some, self._trained).amin(1) for some in rows.split(64)]
        return (torch.cat(nearest).square() / rows.shape[1]).numpy()

    def _finds_place(self, number: int, content: np.ndarray) -> bool:
        """Tell whether a content (D,) is nearest to that of the place asked for, of those of its volume."""
        row, table = self.conditions[number].content, self.windows.table
        rows = self.windows.places[self.windows.volume(row)]
        candidates = self._factors.content[[self._place[other] for other in rows]]  # (places, D)
        values = torch.from_numpy(np.concatenate([content[None], candidates]))  # (1 + places, D)
        values = F.normalize((values - table.content_mean) / table.content_deviation)
        return bool(rows[int((values[1:] @ values[0]).argmax())] == row)

    def _style(self, row: int) -> StyleStatistics:
        """Measure the style of a window's volume, on training windows, or on held-out ones without any."""
        volume, size = self.windows.volume(row), self.model.config.latent_size
        if volume not in self._statistics:
            own = [r for r in self.windows.trained if self.windows.volume(r) == volume]
            rows = (own or self.windows.places[volume])[:: max(1, len(own) // STATISTICS_CROPS)]
            offsets = [(edge - size) // 2 for edge in self.windows.table.window]  # the middle of a window
            starts: list[Start] = []
            for first in self.windows.table.start[rows[:STATISTICS_CROPS]]:
                x, y, z = (first + torch.tensor(offsets)).tolist()
                starts.append((x, y, z))
            self._statistics[volume] = style_statistics(self.model, self.windows.store, volume, starts)
        return self._statistics[volume]

    def _reference_crops(self) -> tuple[list[Tensor], CropFactors]:
        """Return training crops of the domains of those that are shown, as images and factors."""
        taken: dict[int, int] = {}
        rows = []
        for number in self.shown:
            domain = int(self.asked[number])
            fitted = self.windows.fitted[domain]
            taken[domain] = taken.get(domain, -1) + 1
            rows.append(fitted[taken[domain] % len(fitted)])
        latents = self.windows.latents(rows)
        images = [self.decode(crop) for crop in latents] if self.tokenizer and self.networks else []
        return images, crop_factors(self.model, latents)

    def _features(self, images: list[Tensor], factors: CropFactors) -> dict[str, np.ndarray]:
        """Return (N, P, F) features by kind: the encoder's, and of images if there are any."""
        both = np.concatenate([factors.content, factors.style], 1)[:, None]  # (N, 1, D+Ds)
        return {ENCODER: both, **({net.name: net(images) for net in self.networks} if images else {})}

    def _decoded_error(self, images: dict[int, Tensor]) -> Estimate:
        """Compare images with the place asked for and with another, both in the style asked for."""
        wanted, other = [], []
        for number, image in images.items():
            truth = self._truth(number)
            wanted.append(float((image - self.image(truth)).square().mean()))
            other.append(float((image - self.image(self._others(truth)[0])).square().mean()))
        volumes = self.volumes[list(images)]
        return ratio_estimate(np.array(wanted), np.array(other), volumes, self.seed)
