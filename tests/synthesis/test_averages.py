"""Averages of weights whose profile is a power of the step."""

from __future__ import annotations

import itertools

import pytest

from meduet_fast.errors import UserError
from meduet_fast.synthesis.averages import power_exponent, power_momentum


@pytest.mark.parametrize(
    ("deviation", "exponent"), [(0.05, 16.972198602), (0.10, 6.937203938), (0.20, 1.826213780)]
)
def test_exponents(deviation: float, exponent: float) -> None:
    assert power_exponent(deviation) == pytest.approx(exponent, rel=1e-8)


def test_momenta() -> None:
    momenta = [power_momentum(step, power_exponent(0.10)) for step in (0, 1, 9, 99, 999)]
    assert momenta == pytest.approx([0, 0.00408003166, 0.433324721, 0.923327242, 0.992090273], rel=1e-6)


def test_the_average_is_the_mean_with_these_weights() -> None:
    """After T steps the weights of step t have the share (t^(g+1) - (t-1)^(g+1)) / T^(g+1)."""
    exponent, values = power_exponent(0.10), [3.0, -1.0, 4.0, 1.0, -5.0, 9.0, 2.0]
    average = float("nan")
    for step, value in enumerate(values):
        momentum = power_momentum(step, exponent)
        average = value if momentum == 0 else momentum * average + (1 - momentum) * value
    powers = [t ** (exponent + 1) for t in range(len(values) + 1)]
    shares = [(after - before) / powers[-1] for before, after in itertools.pairwise(powers)]
    assert sum(shares) == pytest.approx(1)
    assert average == pytest.approx(sum(share * value for share, value in zip(shares, values, strict=True)))


@pytest.mark.parametrize("deviation", [0.05, 0.10])
def test_the_profile_is_as_wide_as_asked(deviation: float) -> None:
    exponent, steps = power_exponent(deviation), 4000
    places = [(t + 0.5) / steps for t in range(steps)]
    weights = [place**exponent for place in places]
    mean = sum(weight * place for weight, place in zip(weights, places, strict=True)) / sum(weights)
    square = sum(weight * place**2 for weight, place in zip(weights, places, strict=True)) / sum(weights)
    assert (square - mean**2) ** 0.5 == pytest.approx(deviation, rel=1e-3)


@pytest.mark.parametrize("deviation", [0, -0.1, 0.3, float("nan")])
def test_deviations_that_no_profile_has(deviation: float) -> None:
    with pytest.raises(UserError, match=r"^deviation: found .*, expected 0 < value <= 0\.288"):
        power_exponent(deviation)
