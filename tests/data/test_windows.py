"""Overlapping windows cover every voxel, and put together they are the volume again."""

from __future__ import annotations

import pytest
import torch

from meduet_fast.data.windows import blend, cut, window_starts


@pytest.mark.parametrize(
    ("shape", "size", "stride"),
    [((8, 8, 8), 8, 4), ((19, 9, 13), 8, 4), ((17, 8, 24), 8, 8), ((5, 6, 7), 4, 1)],
)
def test_windows_put_together_are_the_volume(shape: tuple[int, int, int], size: int, stride: int) -> None:
    volume = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
    starts = window_starts(shape, size, stride)
    assert len(set(starts)) == len(starts)
    assert min(min(start) for start in starts) == 0
    assert tuple(max(axis) + size for axis in zip(*starts, strict=True)) == shape
    torch.testing.assert_close(blend(cut(volume, starts, size), starts, shape), volume)


def test_a_window_counts_less_towards_its_faces() -> None:
    """Two windows of 0 and of 1 that overlap by half: the blend rises from one to the other."""
    starts = window_starts((4, 4, 6), 4, 2)
    windows = torch.stack([torch.zeros(1, 4, 4, 4), torch.ones(1, 4, 4, 4)])
    line = blend(windows, starts, (4, 4, 6))[0, 1, 1]
    torch.testing.assert_close(line, torch.tensor([0, 0, 1 / 3, 2 / 3, 1, 1]))
