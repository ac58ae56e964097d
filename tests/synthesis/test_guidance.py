"""Guidance by two scales: its corners, its formulas, and what is computed for them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from meduet_fast.errors import UserError
from meduet_fast.synthesis.guidance import Branch, Guidance, GuidanceMode, guided

NONE, CONTENT, STYLE, BOTH = (
    Branch(False, False),
    Branch(True, False),
    Branch(False, True),
    Branch(True, True),
)
ROWS = 3


class Network(nn.Module):
    """Mix a sample with factors or null vectors, place by place and not linearly; count rows."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Conv3d(4, 4, 3, padding=1)
        self.factors, self.nulls = nn.Linear(6, 4), nn.Parameter(torch.randn(2, 3))
        self.rows: list[int] = []

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor,
        content: Tensor,
        style: Tensor,
        no_content: Tensor,
        no_style: Tensor,
    ) -> Tensor:
        self.rows.append(len(sample))
        content = content.where(~no_content[:, None], self.nulls[0])  # (B, 3)
        style = style.where(~no_style[:, None], self.nulls[1])  # (B, 3)
        factors = self.factors(torch.cat([content, style], 1)) + timestep[:, None] / 1000  # (B, 4)
        return self.mix(sample + factors[:, :, None, None, None]).tanh() * factors[:, :, None, None, None]


@pytest.fixture
def inputs(one_thread: None) -> tuple[Any, ...]:
    torch.manual_seed(0)
    sample, timestep = torch.randn(ROWS, 4, 3, 5, 4), torch.tensor([10.0, 500, 990])
    return Network(), sample, timestep, torch.randn(ROWS, 3), torch.randn(ROWS, 3)


def branch(inputs: tuple[Any, ...], of: Branch) -> Tensor:
    """The network called by itself."""
    network, *arguments = inputs
    return network(*arguments, torch.full((ROWS,), not of.content), torch.full((ROWS,), not of.style))


def weighted(
    inputs: tuple[Any, ...], content: float, style: float, mode: GuidanceMode, sigma: float = 0.5
) -> Tensor:
    return guided(*inputs, Guidance(content, style, mode).branches(sigma))


@pytest.mark.parametrize(
    ("scales", "corner"), [((0, 0), NONE), ((1, 0), CONTENT), ((0, 1), STYLE), ((1, 1), BOTH)], ids=str
)
def test_the_corners_of_joint_are_the_branches(
    inputs: tuple[Any, ...], scales: tuple[float, float], corner: Branch
) -> None:
    found = weighted(inputs, *scales, "joint")
    assert inputs[0].rows == [ROWS]
    assert found.equal(branch(inputs, corner))


@pytest.mark.parametrize("mode", ["additive", "joint", "chained"])
@pytest.mark.parametrize(
    "scales", [(2, 2), (2, 0.5), (0.5, 0.25), (3, 0), (0, 1.5), (1, 1), (1, 0), (0.3, 0.7)], ids=str
)
def test_the_formulas(inputs: tuple[Any, ...], scales: tuple[float, float], mode: GuidanceMode) -> None:
    """As the papers have them, and from separate calls."""
    wc, ws = scales
    n, c, s, j = (branch(inputs, of) for of in (NONE, CONTENT, STYLE, BOTH))
    expected = {
        "additive": n + wc * (c - n) + ws * (s - n),
        "joint": n + wc * (c - n) + ws * (s - n) + min(wc, 1) * min(ws, 1) * (j - c - s + n),
        "chained": n + ws * (s - n) + wc * (j - s),
    }[mode]
    inputs[0].rows.clear()
    torch.testing.assert_close(weighted(inputs, wc, ws, mode), expected, rtol=0, atol=1e-6)
    assert len(inputs[0].rows) == 1


@pytest.mark.parametrize(
    ("mode", "scales", "weights"),
    [
        ("joint", (2, 2), {NONE: -2, CONTENT: 1, STYLE: 1, BOTH: 1}),
        ("joint", (2, 1), {NONE: -1, CONTENT: 1, BOTH: 1}),
        ("joint", (0.5, 0.25), {NONE: 0.375, CONTENT: 0.375, STYLE: 0.125, BOTH: 0.125}),
        ("joint", (3, 0), {NONE: -2, CONTENT: 3}),
        ("joint", (0.7, 1), {STYLE: 0.3, BOTH: 0.7}),
        ("additive", (2, 2), {NONE: -3, CONTENT: 2, STYLE: 2}),
        ("additive", (1, 1), {NONE: -1, CONTENT: 1, STYLE: 1}),
        ("additive", (0.3, 0.7), {CONTENT: 0.3, STYLE: 0.7}),
        ("chained", (2, 2), {NONE: -1, BOTH: 2}),
        ("chained", (1, 0), {NONE: 1, STYLE: -1, BOTH: 1}),
        ("chained", (2, 0.5), {NONE: 0.5, STYLE: -1.5, BOTH: 2}),
    ],
    ids=str,
)
def test_weights_and_only_those_that_count(
    inputs: tuple[Any, ...], mode: GuidanceMode, scales: tuple[float, float], weights: dict[Branch, float]
) -> None:
    found = Guidance(*scales, mode).branches(0.5)
    assert found == pytest.approx(weights)
    guided(*inputs, found)
    assert inputs[0].rows == [ROWS * len(weights)]


def test_one_batch_is_separate_calls(inputs: tuple[Any, ...]) -> None:
    weights = Guidance(2, 1.5).branches(0.5)
    apart = sum(weight * branch(inputs, of) for of, weight in weights.items())
    torch.testing.assert_close(guided(*inputs, weights), apart, rtol=0, atol=1e-5)


def test_scales_hold_within_the_interval(inputs: tuple[Any, ...]) -> None:
    guidance = Guidance(0, 3, interval=(0.2, 0.8))
    assert {sigma: guidance.branches(sigma) for sigma in (0.19, 0.81)} == {0.19: {BOTH: 1}, 0.81: {BOTH: 1}}
    for sigma in (0.2, 0.5, 0.8):
        assert guidance.branches(sigma) == {NONE: -2, STYLE: 3}
    assert guided(*inputs, guidance.branches(0.9)).equal(branch(inputs, BOTH))


def test_a_network_of_less_precision_is_added_up_as_the_sample(inputs: tuple[Any, ...]) -> None:
    """In bfloat16 the difference of two branches would keep one or two digits."""
    network, *arguments = inputs
    weights = Guidance(5, 5).branches(0.5)

    def rounded(*of: Tensor) -> Tensor:
        return network(*of).bfloat16()

    found = guided(rounded, *arguments, weights)
    expected = sum(weight * branch(inputs, of).bfloat16().float() for of, weight in weights.items())
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("scale", [-1, -0.001, float("inf"), float("nan")])
def test_scales_that_are_none(scale: float) -> None:
    with pytest.raises(UserError, match=r"^content_scale: found .*, expected 0 or more$"):
        Guidance(scale, 1)
    with pytest.raises(UserError, match=r"^style_scale: found .*, expected 0 or more$"):
        Guidance(1, scale)


@pytest.mark.parametrize("interval", [(0.5, 0.4), (-0.1, 1), (0, 1.1), (0.5,), (0, float("nan"))])
def test_intervals_that_are_none(interval: Any) -> None:
    with pytest.raises(UserError, match=r"^interval: found .*, expected "):
        Guidance(1, 1, interval=interval)


def test_a_mode_that_is_none() -> None:
    with pytest.raises(UserError, match=r"^mode: found sum, expected one of joint, additive, chained$"):
        Guidance(1, 1, "sum")  # type: ignore[arg-type]
