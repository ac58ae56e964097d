"""The held-out slab starts where every user of it expects."""

from __future__ import annotations

import pytest

from meduet_fast.data.held_out import held_out_start
from meduet_fast.errors import UserError


@pytest.mark.parametrize(
    ("size", "fraction", "crop", "multiple", "start"),
    [
        (240, 0.25, 24, 1, 180),
        (60, 0.1, 24, 1, 36),  # the slab is at least one crop wide
        (30, 0.1, 3, 1, 27),  # 0.1 * 30 is a hair above 3
        (61, 0.25, 12, 1, 45),
        (61, 0.25, 12, 4, 44),
        (60, 0.0, 24, 4, 60),
        (24, 0.0, 24, 1, 24),
        (48, 0.5, 24, 1, 24),
    ],
)
def test_the_held_out_slab(size: int, fraction: float, crop: int, multiple: int, start: int) -> None:
    assert held_out_start(size, fraction, crop, multiple) == start


@pytest.mark.parametrize(
    ("size", "fraction", "crop", "reason"),
    [
        (47, 0.1, 24, "cannot hold a training crop and a held-out crop of 24"),
        (60, 0.8, 24, "cannot hold a training crop"),
        (23, 0.0, 24, "axis of 23 cannot hold a crop of 24"),
        (60, 1.0, 24, "found 1.0, expected 0 <= fraction < 1"),
        (60, -0.1, 24, "found -0.1"),
        (60, float("nan"), 24, "found nan"),
    ],
)
def test_a_volume_that_cannot_be_split_is_refused(size: int, fraction: float, crop: int, reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        held_out_start(size, fraction, crop)
