"""Measures on generators whose quality is known: the truth, noise, and those that ignore a factor."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from meduet_fast.data.held_out import HeldOut
from meduet_fast.data.store import LatentStore
from meduet_fast.data.store_writer import StoreWriter, VolumeRecord
from meduet_fast.errors import UserError
from meduet_fast.settings import SettingError
from meduet_fast.synthesis.conditions import PLACES, Windows, choose_windows
from meduet_fast.synthesis.features import crop_factors
from meduet_fast.synthesis.judge import EvaluateConfig, Evaluation, Judge, Scales
from meduet_fast.synthesis.measures import DISTANCES, Bench, distance_estimate, mean_estimate, ratio_estimate
from meduet_fast.synthesis.report import write_report
from meduet_fast.synthesis.verdicts import interval, judged, scales_text, verdicts

from .fakes import CROP, PATCH, KnownFactors, Repeating

DOMAINS = ("a", "b", "c", "d")  # the last is of another anatomy
CONFIG = EvaluateConfig(samples=32, decoded=16, scales=((1.0, 1.0), (0.0, 2.0), (2.0, 0.0)))


@dataclass
class Table:
    """What is used of a table of factors."""

    volume: Tensor
    start: Tensor
    window: tuple[int, int, int]
    volumes: list[dict[str, Any]]
    content_mean: Tensor
    content_deviation: Tensor
    path: Path = Path("table")
    patch: int = PATCH


def write_store(path: Path) -> LatentStore:
    """One anatomy scanned by three domains, which add an offset each; another by the fourth."""
    with StoreWriter(path, tokenizer="t-1", tokenizer_spec="t", channels=4, compression=4) as writer:
        for number, domain in enumerate(DOMAINS):
            part = "head" if domain == "d" else "chest"
            anatomy = torch.Generator().manual_seed(len(part))
            affine = np.diag([1.5, 1.5, 1.5, 1.0])
            affine[:3, 3] = (-60, -50, -40)
            record = VolumeRecord(
                name=domain, domain=domain, body_part=part, content_key=domain, source=f"{domain}.nii",
                latent=torch.randn(4, 16, 12, 12, generator=anatomy) + number, affine=affine,
                spacing=(1.5, 1.5, 1.5), intensity={"kind": "ct_window", "low": -100.0, "high": 200.0},
            )  # fmt: skip
            writer.add(record)
    return LatentStore.open(path)


def window_table(store: LatentStore, stride: int = 2) -> Table:
    """All windows of a store on a grid, as a table of factors has them."""
    rows = [
        (volume, x, y, z)
        for volume, entry in enumerate(store.entries)
        for x in range(0, entry.grid[0] - CROP + 1, stride)
        for y in range(0, entry.grid[1] - CROP + 1, stride)
        for z in range(0, entry.grid[2] - CROP + 1, stride)
    ]
    volume, start = torch.tensor(rows).split([1, 3], 1)  # (N, 1), (N, 3)
    latents = store.read_crops(volume[:, 0].tolist(), start.tolist(), (CROP,) * 3).float()
    content = torch.from_numpy(crop_factors(KnownFactors(), latents).content)
    names = [{"name": entry.name} for entry in store.entries]
    return Table(volume[:, 0], start, (CROP,) * 3, names, content.mean(0), content.std(0))


@pytest.fixture(scope="module")
def windows(tmp_path_factory: pytest.TempPathFactory) -> Windows:
    store = write_store(tmp_path_factory.mktemp("evaluation") / "store")
    return choose_windows(window_table(store), store, HeldOut(store.entries, 0.4))


class Means:
    """Features of images for the tests: their mean and deviation."""

    name, note = "moments", "mean and deviation"

    def __call__(self, images: Sequence[Tensor]) -> np.ndarray:
        return np.array([[[image.mean(), image.std()]] for image in images], dtype=np.float32)


@pytest.fixture(scope="module")
def judge(windows: Windows) -> Judge:
    bench = Bench(
        windows, KnownFactors(), Repeating(), windows.conditions(CONFIG.samples), CONFIG.decoded, [Means()],
        whole=True,
    )  # fmt: skip
    return Judge(bench, CONFIG)


@dataclass
class Generator:
    """Adds the offset of a domain to the place asked for: what a perfect generator does."""

    windows: Windows
    obeys_content: bool = True
    obeys_style: bool = True
    noise: float = 0.2

    def __call__(
        self, content: Sequence[int], style: Sequence[int], scales: Scales, seeds: Sequence[int]
    ) -> Tensor:
        parts = []
        for place, donor, seed in zip(content, style, seeds, strict=True):
            random = torch.Generator().manual_seed(seed)
            crop = self.windows.latents([place])[0] - self.windows.domain(place)
            other = torch.randn(crop.shape, generator=random)
            crop = crop if self.obeys_content and scales[0] else other
            offset = self.windows.domain(donor)
            if not (self.obeys_style and scales[1]):
                offset = int(torch.randint(len(DOMAINS), (), generator=random))
            parts.append(crop + offset + self.noise * torch.randn(crop.shape, generator=random))
        return torch.stack(parts)


@pytest.fixture(scope="module")
def perfect(judge: Judge) -> Evaluation:
    return judge.evaluate("perfect", Generator(judge.bench.windows))


def values(evaluation: Evaluation, scales: Scales = (1.0, 1.0)) -> dict[str, float]:
    return {name: figure.estimate.value for name, figure in evaluation.figures[scales].items()}


def test_conditions_are_balanced_and_on_held_out_places(windows: Windows) -> None:
    conditions = windows.conditions(32)
    assert len(windows.tested) == 4 * PLACES
    assert all(windows.table.start[row, 0] >= 8 for row in windows.tested)
    assert all(windows.table.start[row, 0] + CROP <= 8 for row in windows.trained)
    assert np.bincount([windows.domain(item.style) for item in conditions]).tolist() == [8] * 4
    assert len({item.content for item in conditions}) == 32  # every place once
    for item in conditions:
        own, asked = windows.volume(item.content), windows.domain(item.style)
        if item.truth is None:
            assert 3 in (own, asked)
            assert own != asked
        else:
            assert windows.domain(item.truth) == asked
            np.testing.assert_array_equal(windows.table.start[item.truth], windows.table.start[item.content])
            if item.truth != item.content:  # in one anatomy, the style is of another place
                assert windows.twin(item.style, own) != item.content


def test_a_perfect_generator_gets_to_the_ceiling(judge: Judge, perfect: Evaluation) -> None:
    found = values(perfect)
    assert found["style_obeyed"] == found["content_found"] == 1
    assert found["distance_to_truth"] < 0.1
    assert found["decoded_error"] < 0.1
    figures = perfect.figures[1.0, 1.0]
    bench_kinds = judge.bench.feature_widths()
    for name in ("style_obeyed", "content_found", *(f"{d}/{k}" for d in DISTANCES for k in bench_kinds)):
        way = figures[name].way
        assert way is not None
        assert way > 0.85, name
    lines = [part for line in verdicts(perfect) for part in line.split("; ") if "moments" not in part]
    assert not any("does not work" in line or "not left out" in line for line in lines), lines


def test_the_store_itself_is_the_ceiling(judge: Judge) -> None:
    assert judge.real["content_found"].value == judge.real["style_obeyed"].value == 1
    assert judge.real["distance_to_truth"].value == judge.real["decoded_error"].value == 0
    # The exchange of style by statistics is near it, where styles are offsets.
    assert judge.exchange["style_obeyed"].value > 0.9
    assert judge.exchange["distance_to_truth"].value < 0.2 * judge.unchanged


def test_noise_gets_chance(judge: Judge) -> None:
    random = Generator(judge.bench.windows, obeys_content=False, obeys_style=False)
    figures = judge.evaluate("noise", random).figures[1.0, 1.0]
    for name, chance in (("style_obeyed", 1 / 4), ("content_found", 1 / PLACES)):
        figure = figures[name]
        assert figure.floor == chance
        assert abs(figure.estimate.value - chance) < 4 * np.sqrt(chance * (1 - chance) / 32)
        assert figure.way is not None
        assert figure.way < 0.45
    assert figures["decoded_error"].estimate.value > 0.7
    assert figures["ms_ssim"].way is not None
    assert figures["ms_ssim"].way > 0.5  # nothing is less alike


@pytest.mark.parametrize("ignored", ["style", "content"])
def test_a_generator_that_ignores_one_factor_keeps_the_other(judge: Judge, ignored: str) -> None:
    generator = Generator(judge.bench.windows, **{f"obeys_{ignored}": False})
    evaluation = judge.evaluate("half", generator)
    found = values(evaluation)
    assert (found["style_obeyed"] > 0.9) == (ignored != "style")
    assert (found["content_found"] > 0.9) == (ignored != "content")
    assert (found["decoded_error"] < 0.9) or ignored == "content"


def test_a_scale_of_0_is_judged_by_what_it_leaves_out(judge: Judge, perfect: Evaluation) -> None:
    assert values(perfect, (0.0, 2.0))["content_found"] < 0.4
    assert values(perfect, (0.0, 2.0))["style_obeyed"] == 1
    assert values(perfect, (2.0, 0.0))["style_obeyed"] < 0.6
    assert "ms_ssim" not in perfect.figures[0.0, 2.0]
    leaky = Generator(judge.bench.windows)

    def ignores_scales(content: Any, style: Any, scales: Scales, seeds: Any) -> Tensor:
        return leaky(content, style, (1.0, 1.0), seeds)

    lines = verdicts(judge.evaluate("leaky", ignores_scales))
    assert sum("not left out, although its scale is 0" in line for line in lines) == 2


def test_copies_and_one_and_the_same_crop_are_noticed(judge: Judge, perfect: Evaluation) -> None:
    windows = judge.bench.windows

    def copies(content: Sequence[int], style: Any, scales: Any, seeds: Any) -> Tensor:
        return windows.latents(windows.trained[: len(content)])

    evaluation = judge.evaluate("copies", copies)
    assert values(evaluation)["nearest_training"] < 1e-3
    assert any("copies training crops" in line for line in verdicts(evaluation))
    assert values(evaluation)["ms_ssim"] == pytest.approx(1, abs=1e-3)
    assert any("hardly differ" in line for line in verdicts(evaluation))
    assert values(perfect)["nearest_training"] > 0.5


def test_evaluating_twice_gives_the_same(judge: Judge, perfect: Evaluation) -> None:
    again = judge.evaluate("perfect", Generator(judge.bench.windows))
    assert again.to_dict() == perfect.to_dict()


def test_intervals_are_over_volumes() -> None:
    volumes = np.repeat([0, 1, 2, 3], 8)
    apart = mean_estimate((volumes < 2).astype(float), volumes, seed=0)
    assert (apart.value, apart.low, apart.high, apart.count) == (0.5, 0, 1, 32)
    same = mean_estimate(np.tile([0.0, 1.0], 16), volumes, seed=0)
    assert same.low == same.value == same.high == 0.5
    assert ratio_estimate(2 * np.ones(4), np.ones(4), np.arange(4), seed=0).value == 2
    assert mean_estimate(np.ones(1), np.zeros(1), seed=0).high == 1  # of one crop


def test_halves_of_volumes_tell_the_error_of_a_mean() -> None:
    """The distance of means in one dimension is a mean, whose standard error is known."""
    random = np.random.default_rng(0)
    rows = random.standard_normal((40, 1, 1)) + 10
    found = distance_estimate(
        lambda a, b: float(a.mean() - b.mean()), rows, np.zeros((4, 1, 1)), np.arange(40), seed=0
    )
    expected = 1.96 * rows.std() / np.sqrt(40)
    assert (found.high - found.low) / 2 == pytest.approx(expected, rel=0.3)


def test_the_page_has_every_figure_and_two_generators_side_by_side(
    judge: Judge, perfect: Evaluation, tmp_path: Path
) -> None:
    made = [replace(perfect, name="scratch"), perfect]
    origins = {"scratch": {"weights": "one"}, "perfect": {"weights": "other"}}
    path = write_report(tmp_path / "out", judge, made, origins)
    html = path.read_text()
    numbers = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    for generator, evaluation in zip(numbers["generators"], made, strict=True):
        assert f"<h2>{evaluation.name}</h2>" in html
        for line in generator["verdicts"]:
            assert line.replace("'", "&#x27;") in html
        for pair, figures in zip(generator["scales"], evaluation.figures.values(), strict=True):
            assert pair["figures"].keys() == figures.keys()
            for figure in pair["figures"].values():
                assert np.isfinite([figure["value"], figure["low"], figure["high"]]).all()
                assert figure["low"] <= figure["value"] <= figure["high"]
        assert (tmp_path / "out" / f"{evaluation.name}-grid.png").is_file()
    first = html[html.index("What works, by the rule below") : html.index("</table>")]
    for item in made:
        for scales, figures in item.figures.items():
            [row] = re.findall(f'"row">{item.name} at {scales_text(scales)}</th>(.*?)</tr>', first)
            words = judged(figures, scales)
            assert f"{interval(figures['style_obeyed'])}: {words['style_obeyed']}" in row
    for text in ("Comparison", "level 50, window 300", "bar is 20 mm", "scratch, weights", "MS-SSIM"):
        assert text in html, text
    assert html.count("data:image/png;base64,") == 2
    assert "http" not in html


def test_without_a_tokenizer_the_rest_is_measured(windows: Windows, tmp_path: Path) -> None:
    bench = Bench(windows, KnownFactors(), None, windows.conditions(16), 8, whole=True)
    judge = Judge(bench, EvaluateConfig(samples=16, decoded=8, scales=((1.0, 1.0),)))
    evaluation = judge.evaluate("perfect", Generator(windows))
    assert evaluation.grid is None
    assert {"style_obeyed", "content_found", "kid/encoder"} <= set(evaluation.figures[1.0, 1.0])
    assert "decoded_error" not in evaluation.figures[1.0, 1.0]
    assert "mostly noise" in "".join(judge.doubts())
    assert "data:image" not in write_report(tmp_path, judge, [evaluation], {"perfect": {}}).read_text()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"samples": 1}, "samples: found 1, expected 2 or more"),
        ({"scales": ()}, "scales: found none"),
        ({"scales": ((1.0, -1.0),)}, "style_scale: found -1, expected 0 or more"),
        ({"scales": ((float("inf"), 1.0),)}, "content_scale: found inf"),
    ],
)
def test_bad_settings_are_refused_in_one_line(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingError, match=message):
        EvaluateConfig(**settings)


def test_tables_that_do_not_fit_are_refused_in_one_line(windows: Windows) -> None:
    store = windows.store
    apart = window_table(store, stride=16)  # one in each volume
    with pytest.raises(UserError, match="table: no volume has two windows of"):
        choose_windows(apart, store, HeldOut(store.entries, 0.4))
    apart.start[:, 0] = 12
    with pytest.raises(UserError, match="table: no window lies in the training region"):
        choose_windows(apart, store, HeldOut(store.entries, 0.4))
