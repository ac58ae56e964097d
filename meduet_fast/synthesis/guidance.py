"""Guide a network by two factors, each with a scale of its own.

With n, C, S, J for what the network says without factors, with content, with style and with both, and scales
wc and ws::

    additive    n + wc (C - n) + ws (S - n), the published way; at (1, 1) it is C + S - n and not J
    joint       additive + min(wc, 1) min(ws, 1) (J - C - S + n), which is n, C, S and J at its four corners
    chained     n + ws (S - n) + wc (J - S); at (1, 0) it is not C
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from meduet_fast.settings import FROM_0, Range, SettingError, check_numbers

GuidanceMode = Literal["joint", "additive", "chained"]


class Branch(NamedTuple):
    """Name what the network is told in one branch."""

    content: bool
    style: bool


NONE, CONTENT, STYLE, BOTH = (
    Branch(False, False),
    Branch(True, False),
    Branch(False, True),
    Branch(True, True),
)


@dataclass(frozen=True)
class Guidance:
    """Say how strongly each factor is followed.

    Attributes:
        content_scale: 0 leaves content out, 1 is as trained, more exaggerates.
        style_scale: the same for style.
        mode: how the branches are put together, see the head of this file.
        interval: noise levels (sigma, from 0 to 1, both ends included) where the scales hold; elsewhere the
            network gets both factors, once.

    Raises:
        SettingError: for numbers out of their ranges, an interval that is none, or an unknown mode.
    """

    content_scale: float
    style_scale: float
    mode: GuidanceMode = "joint"
    interval: tuple[float, float] = (0.0, 1.0)

    def __post_init__(self) -> None:
        check_numbers(self, FROM_0, "content_scale", "style_scale")
        check_numbers(self, Range(0, 1), "interval")
        if len(self.interval) != 2 or self.interval[0] > self.interval[1]:
            raise SettingError("interval", f"found {self.interval}, expected its lower and its upper end")
        if self.mode not in get_args(GuidanceMode):
            known = ", ".join(get_args(GuidanceMode))
            raise SettingError("mode", f"found {self.mode}, expected one of {known}")

    def branches(self, sigma: float) -> dict[Branch, float]:
        """Return the weights, other than 0, of the branches at a noise level; they add up to 1."""
        if not self.interval[0] <= sigma <= self.interval[1]:
            return {BOTH: 1.0}
        content, style = self.content_scale, self.style_scale
        if self.mode == "additive":
            weights = {NONE: 1 - (content + style), CONTENT: content, STYLE: style}
        elif self.mode == "chained":
            weights = {NONE: 1 - style, STYLE: style - content, BOTH: content}
        else:
            a, b = min(content, 1), min(style, 1)
            more_content, more_style = content - a, style - b
            weights = {  # the formula of the head, ordered so that what is 0 comes out as 0
                NONE: (1 - a) * (1 - b) - more_content - more_style,
                CONTENT: a * (1 - b) + more_content,
                STYLE: (1 - a) * b + more_style,
                BOTH: a * b,
            }
        return {branch: weight for branch, weight in weights.items() if weight}


def guided(
    network: Callable[..., Tensor],
    sample: Tensor,
    timestep: Tensor,
    content: Tensor,
    style: Tensor,
    weights: Mapping[Branch, float],
) -> Tensor:
    """Compute the weighted sum of some branches of a network, all of them as one batch.

    Args:
        network: called as ``network(sample, timestep, content, style, content_dropped, style_dropped)``.
        sample: (B, C, X, Y, Z), noisy.
        timestep: (B,) float, the network's time.
        content, style: factors, B rows of each.
        weights: of the branches to be computed, see :meth:`Guidance.branches`. One alone, of weight 1, is
            returned bit by bit.

    Returns:
        (B, C, X, Y, Z), of the dtype of ``sample``.
    """
    count, rows = len(weights), len(sample)
    content_dropped = torch.tensor([not branch.content for branch in weights], device=sample.device)  # (K,)
    style_dropped = torch.tensor([not branch.style for branch in weights], device=sample.device)  # (K,)
    outputs = network(
        torch.cat([sample] * count),  # (K B, C, X, Y, Z)
        torch.cat([timestep] * count),  # (K B,)
        torch.cat([content] * count),
        torch.cat([style] * count),
        content_dropped.repeat_interleave(rows),  # (K B,)
        style_dropped.repeat_interleave(rows),  # (K B,)
    ).to(sample.dtype)  # (K B, C, X, Y, Z)
    first, *rest = (
        weight * output for weight, output in zip(weights.values(), outputs.chunk(count), strict=True)
    )
    return sum(rest, start=first)  # (B, C, X, Y, Z)
