"""Evaluate generators: every figure beside what chance, real scans and the pretrained decoder give."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from meduet_fast.data.crops import EVALUATION, random_stream
from meduet_fast.progress import ProgressBar
from meduet_fast.settings import FROM_1, SEED, Range, SettingError, check_numbers

from .guidance import Guidance, GuidanceMode
from .measures import Bench, Estimate

Scales = tuple[float, float]  # of content and of style
# Takes rows of the table that give content, rows that give style, both scales, and a seed for every crop;
# gives latents (N, C, x, y, z).
SampleLatents = Callable[[Sequence[int], Sequence[int], Scales, Sequence[int]], Tensor]
AGAIN = 6  # conditions that are asked for twice, for the diversity within one
GRID_ROWS, GRID_COLUMNS = 4, 6


@dataclass(frozen=True)
class EvaluateConfig:
    """Say how generators are evaluated.

    Attributes:
        scales: pairs of content scale and style scale; a 0 shows what the other factor does alone.
        samples: crops of each pair of scales, from 2 on: as many as there are domains times 8 places ask for
            every domain at 8 places.
        decoded: how many of them are decoded, of those that a real scan shows: for FID, KID and MMD, MS-SSIM
            and decoded errors. Decoding takes longer than all else on a CPU.
        features: a TorchScript network on whose features of slices sets are compared, too: from (N, 3, H, W)
            in [0, 1] to (N, F). Such a file holds code, which is run.
        average: which average of a run's weights.
        steps: evaluations of the network.
        sampler: see ``synthesize sample``.
        mode: see ``synthesize sample``.
        batch_size: crops that are sampled at once.
        device: where everything works; "auto" takes CUDA where there is one.
        seed: of the samples and of all that is drawn.

    Raises:
        UserError: if a number is out of its range.
    """

    scales: tuple[Scales, ...] = ((1.0, 1.0), (2.0, 2.0), (0.0, 2.0), (2.0, 0.0))
    samples: int = 48
    decoded: int = 24
    features: str | None = None
    average: str = "power_0.100"
    steps: int = 30
    sampler: str | None = None
    mode: GuidanceMode = "joint"
    batch_size: int = 16
    device: str = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        check_numbers(self, Range(2), "samples", "decoded")
        check_numbers(self, FROM_1, "steps", "batch_size")
        check_numbers(self, SEED, "seed")
        if not self.scales:
            raise SettingError("scales", "found none, expected at least one pair")
        for content, style in self.scales:
            Guidance(content, style, self.mode)  # checks them

    @property
    def shown(self) -> Scales:
        """Return the scales of the grid: the last pair that asks for both factors, else the first."""
        return next((pair for pair in reversed(self.scales) if min(pair) > 0), self.scales[0])


@dataclass(frozen=True)
class Measure:
    """Describe a figure.

    Attributes:
        title: what it is: a short name, and after a colon more.
        floor, ceiling: what the values beside it are.
        higher: whether more is better; None if it is to be near the ceiling from either side.
        share: whether it is a part of 1.
    """

    title: str
    floor: str
    ceiling: str
    higher: bool | None = False
    share: bool = False

    @property
    def short(self) -> str:
        """Return its short name."""
        return self.title.partition(":")[0]


MEASURES = {
    "style_obeyed": Measure(
        "Style obeyed: the probe takes the crop for the domain asked for",
        "chance", "real scans of the domain", higher=True, share=True,
    ),
    "content_found": Measure(
        "Content found: of all places of its volume the one asked for is nearest",
        "chance", "another real scan of the place", higher=True, share=True,
    ),
    "distance_to_truth": Measure(
        "Distance to the truth: squared, from the scan of the place in the style asked for, in variances",
        "content's own scan, unchanged", "that scan itself",
    ),
    "decoded_error": Measure(
        "Decoded error: squared, to the place asked for, over that to another place in that style",
        "chance", "that scan itself",
    ),
    "nearest_training": Measure(
        "Nearest training crop: its distance, over that of real held-out crops",
        "a copy", "real held-out crops", higher=None,
    ),
    "ms_ssim": Measure(
        "MS-SSIM: likeness of two crops of one condition", "always the same crop", "real crops of two places",
        higher=None,
    ),
}  # fmt: skip
_DISTANCES = {"fid": "FID", "kid": "KID", "mmd": "MMD (RBF)"}


def describe(name: str) -> Measure:
    """Return what a figure is; ``kid/tokenizer`` is a distance on features."""
    if name in MEASURES:
        return MEASURES[name]
    distance, _, features = name.partition("/")
    return Measure(f"{_DISTANCES[distance]}, features of {features}", "noise", "real scans")


@dataclass(frozen=True)
class Figure:
    """Hold a figure of a generator at one pair of scales, and what it is held against.

    Attributes:
        name: see :func:`describe`.
        estimate: the generator's.
        floor: what knows nothing, or does nothing.
        ceiling: what real scans give, at the same number of crops; None if the store cannot tell.
        exchange: what the pretrained decoder's own exchange of style gives; None as above.
    """

    name: str
    estimate: Estimate
    floor: float
    ceiling: float | None
    exchange: float | None

    @property
    def way(self) -> float | None:
        """Return how far it gets from floor (0) to ceiling (1); None without a ceiling."""
        if self.ceiling is None or self.ceiling == self.floor:
            return None
        return (self.estimate.value - self.floor) / (self.ceiling - self.floor)

    @property
    def told_apart(self) -> bool:
        """Tell whether the interval lies wholly on the better side of the floor."""
        higher = describe(self.name).higher
        return self.estimate.low > self.floor if higher else self.estimate.high < self.floor

    def to_dict(self) -> dict[str, Any]:
        """Return all numbers, as JSON values."""
        rest = {"floor": self.floor, "ceiling": self.ceiling, "exchange": self.exchange}
        return {**asdict(self.estimate), **rest}


@dataclass(frozen=True)
class Grid:
    """Hold decoded crops, contents by styles.

    Attributes:
        scales: at which they were sampled.
        contents, styles: rows of the table that give them.
        real_contents, real_styles: images (X, Y, Z) of the real crops.
        made: images by content and style.
    """

    scales: Scales
    contents: list[int]
    styles: list[int]
    real_contents: list[Tensor]
    real_styles: list[Tensor]
    made: list[list[Tensor]]


@dataclass(frozen=True)
class Evaluation:
    """Hold what was measured of one generator.

    Attributes:
        name: of the generator.
        figures: by pair of scales and name.
        grid: what it makes; None without a tokenizer.
    """

    name: str
    figures: dict[Scales, dict[str, Figure]]
    grid: Grid | None

    def to_dict(self) -> dict[str, Any]:
        """Return all numbers, as JSON values."""
        return {
            "name": self.name,
            "scales": [
                {
                    "content_scale": content,
                    "style_scale": style,
                    "figures": {name: figure.to_dict() for name, figure in figures.items()},
                }
                for (content, style), figures in self.figures.items()
            ],
        }


class Judge:
    """Evaluate generators on one bench: floors and ceilings are measured once for all of them.

    Args:
        bench: what they are measured on.
        config: how.
    """

    def __init__(self, bench: Bench, config: EvaluateConfig) -> None:
        self.bench, self.config = bench, config
        with ProgressBar("Measuring floors and ceilings", 3, "set") as bar:
            self.real = self._measure(bench.real_crops(), real=True)
            bar.update(text="real scans")
            self.exchange = self._measure(bench.exchanged())
            bar.update(text="exchange of style")
            self.noise = self._measure(bench.noise())
            bar.update(text="noise")
        self.real_likeness = bench.real_likeness() if bench.tokenizer else None
        self.unchanged = bench.unchanged()

    def evaluate(self, name: str, sample: SampleLatents) -> Evaluation:
        """Sample and measure a generator.

        Args:
            name: of the generator.
            sample: makes latents.
        """
        bench, config = self.bench, self.config
        asked = [(item.content, item.style) for item in bench.conditions]
        figures: dict[Scales, dict[str, Figure]] = {}
        contents, styles = bench.windows.grid(GRID_ROWS, GRID_COLUMNS)
        cells = [(content, style) for content in contents for style in styles] if bench.tokenizer else []
        both = [pair for pair in config.scales if min(pair) > 0]
        again = asked[:AGAIN] if bench.tokenizer else []
        total = len(config.scales) * len(asked) + len(both) * len(again) + len(cells)
        with ProgressBar(f"Sampling {name}", total, "crop") as bar:

            def draw(rows: Sequence[tuple[int, int]], scales: Scales, stream: int) -> Tensor:
                """Sample in batches, with seeds that no other call has."""
                seeds = random_stream(config.seed, EVALUATION, number=stream).integers(2**62, size=len(rows))
                parts = []
                for first in range(0, len(rows), config.batch_size):
                    some = slice(first, first + config.batch_size)
                    content, style = zip(*rows[some], strict=True)
                    parts.append(sample(content, style, scales, seeds[some].tolist()).float().cpu())
                    bar.update(len(content), f"scales {scales[0]:g} and {scales[1]:g}")
                return torch.cat(parts)  # (N, C, x, y, z)

            for scales in config.scales:
                latents = draw(asked, scales, stream=10)
                found = bench.measure(latents, self._images(latents) if scales in both else None)
                if scales in both and again:
                    pairs = zip(latents, draw(again, scales, stream=11), strict=False)
                    decoded = [(bench.decode(one), bench.decode(other)) for one, other in pairs]
                    found["ms_ssim"] = bench.likeness(decoded, bench.volumes[: len(again)])
                figures[scales] = {key: self._figure(key, estimate) for key, estimate in found.items()}
            grid = None
            if cells:
                made = [bench.decode(crop) for crop in draw(cells, config.shown, stream=12)]
                width = len(styles)
                grid = Grid(
                    config.shown, contents, styles,
                    [bench.image(row) for row in contents], [bench.image(row) for row in styles],
                    [made[first : first + width] for first in range(0, len(made), width)],
                )  # fmt: skip
        return Evaluation(name, figures, grid)

    def doubts(self) -> list[str]:
        """Say what of the setup weakens the figures, a line each."""
        bench, windows = self.bench, self.bench.windows
        found = []
        if not windows.unseen:
            found.append("the run held nothing out: what is called held out here, training has seen")
        absent = sorted(set(range(len(windows.store.domains))) - set(windows.domains))
        if absent:
            names = ", ".join(windows.store.domains[domain] for domain in absent)
            found.append(f"no held-out windows of {names}: these domains are not asked for")
        if not bench.crossed:
            found.append("no anatomy was scanned twice: nothing is known of the truth in another style")
        for kind, width in bench.feature_widths().items():
            if len(bench.shown) <= width:
                found.append(
                    f"FID on {len(bench.shown)} crops with {width} features of {kind} is mostly noise: hold "
                    "it against its ceiling, or take KID"
                )
        return found

    def _images(self, latents: Tensor) -> dict[int, Tensor]:
        """Decode the crops that are shown, by number of the condition."""
        if self.bench.tokenizer is None:
            return {}
        return {number: self.bench.decode(latents[number]) for number in self.bench.shown}

    def _measure(self, latents: Tensor, real: bool = False) -> dict[str, Estimate]:
        return self.bench.measure(latents, self._images(latents), halves=0, real=real)

    def _figure(self, name: str, estimate: Estimate) -> Figure:
        floors: dict[str, float | None] = {
            "style_obeyed": self.bench.chance_of_domain(),
            "content_found": self.bench.chance_of_place(),
            "distance_to_truth": self.unchanged,
            "decoded_error": 1.0,
            "nearest_training": 0.0,
            "ms_ssim": 1.0,
        }
        ceilings = {"nearest_training": 1.0, "ms_ssim": self.real_likeness}
        real, exchange = (
            measured[name].value if name in measured else None for measured in (self.real, self.exchange)
        )
        floor = floors[name] if name in floors else self.noise[name].value
        assert floor is not None  # what has no truth has no such figure
        return Figure(name, estimate, floor, ceilings.get(name, real), exchange)
