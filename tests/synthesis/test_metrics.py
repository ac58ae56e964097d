"""Distances of distributions, similarity of images, and intervals over volumes."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import numpy as np
import pytest
import scipy.linalg
import torch

from meduet_fast.errors import UserError
from meduet_fast.synthesis.metrics import (
    bootstrap_interval,
    frechet_distance,
    kernel_distance,
    ms_ssim,
    rbf_mmd,
)

Distance = Callable[[np.ndarray, np.ndarray], float]


@pytest.fixture
def random() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.mark.parametrize("dimensions", [1, 3, 20])
def test_the_frechet_distance_is_its_definition(random: np.random.Generator, dimensions: int) -> None:
    first = random.normal(size=(80, dimensions)) @ random.normal(size=(dimensions, dimensions))
    second = random.normal(size=(50, dimensions)) @ random.normal(size=(dimensions, dimensions)) + 0.5
    covariances = [
        np.cov(samples, rowvar=False).reshape(dimensions, dimensions) for samples in (first, second)
    ]
    root = scipy.linalg.sqrtm(covariances[0] @ covariances[1]).real
    shift = first.mean(0) - second.mean(0)
    expected = shift @ shift + np.trace(covariances[0] + covariances[1] - 2 * root)
    assert frechet_distance(first, second) == pytest.approx(expected, rel=1e-8)
    assert frechet_distance(second, first) == pytest.approx(expected, rel=1e-8)


def test_the_frechet_distance_of_known_normals(random: np.random.Generator) -> None:
    """|m|^2 + sum of (s1 - s2)^2 over dimensions."""
    first, second = random.normal(size=(2, 20_000, 2)) * [[[1, 2]], [[3, 2]]] + [[[0, 0]], [[1, 0]]]
    assert frechet_distance(first, second) == pytest.approx(1 + 4, rel=0.03)


def test_fewer_samples_look_further_apart(random: np.random.Generator) -> None:
    """Two draws of one normal distribution."""
    found = [frechet_distance(*random.normal(size=(2, count, 16))) for count in (64, 512, 4096)]
    assert found[0] > 4 * found[1] > 16 * found[2] > 0


def test_no_more_samples_than_dimensions_are_warned_of(random: np.random.Generator) -> None:
    with pytest.warns(RuntimeWarning, match="^FID of no more samples than dimensions is mostly noise"):
        found = frechet_distance(*random.normal(size=(2, 8, 8)))
    assert found > 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        frechet_distance(*random.normal(size=(2, 9, 8)))


def test_the_kernel_distance_is_its_definition(random: np.random.Generator) -> None:
    first, second = random.normal(size=(5, 3)), random.normal(size=(7, 3)) + 1

    def kernel(x: np.ndarray, y: np.ndarray) -> float:
        return float((x @ y / 3 + 1) ** 3)

    within = [
        np.mean([kernel(x, y) for i, x in enumerate(samples) for j, y in enumerate(samples) if i != j])
        for samples in (first, second)
    ]
    across = np.mean([kernel(x, y) for x in first for y in second])
    assert kernel_distance(first, second) == pytest.approx(sum(within) - 2 * across)


def test_the_rbf_distance_is_its_definition(random: np.random.Generator) -> None:
    first, second = random.normal(size=(5, 3)), random.normal(size=(7, 3)) + 1
    samples = np.concatenate([first, second])
    width = np.median([np.linalg.norm(x - y) for i, x in enumerate(samples) for y in samples[:i]])

    def kernel(x: np.ndarray, y: np.ndarray) -> float:
        return float(np.exp(-np.sum((x - y) ** 2) / (2 * width**2)))

    within = [
        np.mean([kernel(x, y) for i, x in enumerate(samples) for j, y in enumerate(samples) if i != j])
        for samples in (first, second)
    ]
    across = np.mean([kernel(x, y) for x in first for y in second])
    assert rbf_mmd(first, second) == pytest.approx(sum(within) - 2 * across)


@pytest.mark.parametrize("distance", [kernel_distance, rbf_mmd])
def test_equal_distributions_are_0_apart_on_average(random: np.random.Generator, distance: Distance) -> None:
    """Also of few and unequal numbers of samples; FID of them is far from 0."""
    found = [distance(random.normal(size=(6, 10)), random.normal(size=(9, 10))) for _ in range(300)]
    error = np.std(found) / len(found) ** 0.5
    assert abs(np.mean(found)) < 3 * error
    moved = [distance(random.normal(size=(6, 10)), random.normal(size=(9, 10)) + 1) for _ in range(100)]
    assert np.mean(moved) > 10 * error


def test_the_rbf_distance_sees_a_spread(random: np.random.Generator) -> None:
    """Of one mean, to which a difference of means is blind."""
    first, second, wide = (
        random.normal(size=(200, 4)),
        random.normal(size=(150, 4)),
        3 * random.normal(size=(150, 4)),
    )
    assert rbf_mmd(first, wide) > 20 * abs(rbf_mmd(first, second))
    assert rbf_mmd(first, wide) > 0.05


def test_the_rbf_distance_of_copies() -> None:
    """A generator that makes one thing only leaves most distances 0; the others are all sqrt(2) here."""
    assert rbf_mmd(np.ones((5, 3)), np.ones((4, 3))) == 0
    assert rbf_mmd(np.ones((50, 3)), np.eye(3)) == pytest.approx(1 - np.exp(-0.5))


@pytest.mark.parametrize("distance", [frechet_distance, kernel_distance, rbf_mmd])
def test_features_that_cannot_be_compared(distance: Distance) -> None:
    for first, second, message in (
        (np.zeros((1, 3)), np.zeros((5, 3)), "features: found 1 sample, expected 2 or more"),
        (np.zeros((5, 3)), np.zeros((0, 3)), "features: found 0 samples, expected 2 or more"),
        (np.zeros((5, 3)), np.zeros((5, 4)), "features: found 3 and 4 dimensions, expected the same"),
        (
            np.zeros((5, 3)),
            np.full((5, 3), np.nan),
            "features: found values that are not finite, expected numbers",
        ),
    ):
        with pytest.raises(UserError) as caught:
            distance(first, second)
        assert str(caught.value) == message


@pytest.mark.parametrize("edge", [28, 64])
def test_similarity_falls_with_noise(one_thread: None, edge: int) -> None:
    torch.manual_seed(0)
    image = torch.linspace(0, 1, edge).expand(1, 1, edge, edge, edge)
    images = image.expand(3, -1, -1, -1, -1)
    noise = torch.tensor([0, 0.05, 0.3]).reshape(3, 1, 1, 1, 1) * torch.randn(1, 1, edge, edge, edge)
    found = ms_ssim(images, (images + noise).clamp(0, 1))
    assert found.shape == (3,)
    assert float(found[0]) == pytest.approx(1, abs=1e-5)
    assert 1 > found[1] > found[2] > 0


def test_similarity_has_as_many_scales_as_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    used = {}

    def note(
        first: torch.Tensor, second: torch.Tensor, dims: int, kernel_size: int, weights: np.ndarray
    ) -> torch.Tensor:
        used[min(first.shape[2:])] = (kernel_size, len(weights), round(float(weights.sum()), 6))
        return torch.ones(len(first), 1)

    monkeypatch.setattr("monai.metrics.regression.compute_ms_ssim", note)
    for edge in (28, 62, 63, 96, 175, 176):
        images = torch.zeros(1).expand(2, 1, edge, 200, 200)
        ms_ssim(images, images)
    for of, edges in (((7, 3, 1), (28, 62)), ((7, 4, 1), (63, 96, 175)), ((11, 5, 1), (176,))):
        assert [used[edge] for edge in edges] == [of] * len(edges)


def test_images_that_cannot_be_compared() -> None:
    small = torch.zeros(1, 1, 40, 27, 40)
    with pytest.raises(UserError, match=r"^MS-SSIM: found images 27 voxels wide, expected 28 or more$"):
        ms_ssim(small, small)
    with pytest.raises(
        UserError, match=r"^MS-SSIM: found images of 1 x 1 x 40 x 27 x 40 and 1 x 1 x 27 x 40 x 40, "
    ):
        ms_ssim(small, torch.zeros(1, 1, 27, 40, 40))


def test_the_interval_holds_the_mean_as_often_as_it_says(random: np.random.Generator) -> None:
    """Of 40 volumes, in each of which 25 samples are alike; samples drawn one by one would be too sure."""
    volumes, by_volume, by_sample = np.repeat(np.arange(40), 9), [], []
    for _ in range(150):
        values = random.normal(size=40).repeat(9) + 0.1 * random.normal(size=360)
        low, high = bootstrap_interval(values, volumes)
        by_volume.append(low < 0 < high)
    for _ in range(20):
        values = random.normal(size=40).repeat(9) + 0.1 * random.normal(size=360)
        low, high = bootstrap_interval(values, np.arange(360))
        by_sample.append(low < 0 < high)
    assert 0.88 < np.mean(by_volume) < 0.99
    assert np.mean(by_sample) < 0.7


def test_the_interval_of_a_ratio(random: np.random.Generator) -> None:
    volumes = np.repeat([f"scan {number}" for number in range(30)], 4)
    below = random.uniform(1, 2, size=120)
    assert bootstrap_interval(3 * below, volumes, below) == pytest.approx((3, 3))
    low, high = bootstrap_interval(3 * below + random.normal(size=120), volumes, below)
    assert 2.5 < low < 3 < high < 3.5


def test_the_interval_is_reproducible(random: np.random.Generator) -> None:
    values, volumes = random.normal(size=60), np.arange(60) // 3
    first, again, other = (bootstrap_interval(values, volumes, seed=seed) for seed in (1, 1, 2))
    assert first == again != other


def test_the_interval_of_one_volume_and_of_one_sample() -> None:
    assert bootstrap_interval(np.array([1.0, 2, 6]), np.array(["a", "a", "a"])) == (3, 3)
    with pytest.raises(UserError, match=r"^bootstrap: found 1 sample, expected 2 or more$"):
        bootstrap_interval(np.array([1.0]), np.array(["a"]))
