"""Slices: the same ones of an image and of latents, at one scale, whatever is beside them."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from meduet_fast.autoencoder import Tokenizer
from meduet_fast.plotting import middle_slices
from meduet_fast.report.pictures import Column, decode_slices, draw_columns, root_mean_square


class Repeating(Tokenizer):
    """Decodes a voxel of the first channel into a cube of itself: it needs no surroundings."""

    channels, compression = 4, 4

    def __init__(self) -> None:
        pass

    def decode(self, latents: Tensor) -> Tensor:
        return F.interpolate(latents[:, :1], scale_factor=4)


def test_slices_of_latents_are_those_of_the_whole_image() -> None:
    for shape in ((3, 9, 14), (8, 8, 8), (19, 5, 6)):
        latents = torch.rand(4, *shape, generator=torch.Generator().manual_seed(0))
        whole = middle_slices(Repeating().decode(latents[None])[0, 0])
        for plane, expected in zip(decode_slices(Repeating(), latents), whole, strict=True):
            np.testing.assert_array_equal(plane, expected)


def test_superior_is_up_and_the_right_side_right() -> None:
    image = torch.zeros(4, 6, 8)
    image[3, 3, 7] = 1  # right, in the middle slices' reach: superior
    axial, coronal, sagittal = middle_slices(image)
    assert (axial.shape, coronal.shape, sagittal.shape) == ((6, 4), (8, 4), (8, 6))
    assert coronal[0, 3] == 1
    assert axial.sum() == sagittal.sum() == 0


def test_differences_count_every_pixel() -> None:
    zeros = (np.zeros((2, 2)), np.zeros((2, 4)), np.zeros((2, 2)))
    ones = (np.ones((2, 2)), np.zeros((2, 4)), np.ones((2, 2)))
    assert root_mean_square(zeros, ones) == np.sqrt(8 / 16)


def test_columns_have_one_scale_and_a_bar_of_50_mm() -> None:
    one = middle_slices(torch.rand(20, 40, 50))
    small = middle_slices(torch.rand(10, 12, 14))
    figure = draw_columns([Column("one", one), Column("other", small), Column("gone", None)], mm=2.0)
    axes = np.array(figure.axes).reshape(3, 3)
    assert [ax.get_title() for ax in axes[0]] == ["one", "other", "gone"]
    for row, (plane, other) in enumerate(zip(one, small, strict=True)):
        limits = {(ax.get_xlim(), ax.get_ylim()) for ax in axes[row]}
        assert len(limits) == 1  # and so one scale
        for ax, pixels in ((axes[row, 0], plane), (axes[row, 1], other)):
            left, right, bottom, top = ax.images[0].get_extent()
            assert (right - left, bottom - top) == (pixels.shape[1], pixels.shape[0])
        (bar,) = axes[row, 0].lines
        assert np.ptp(bar.get_xdata()) == 25  # pixels of 2 mm
        assert not axes[row, 2].images
        assert "source not found" in axes[row, 2].texts[0].get_text()
