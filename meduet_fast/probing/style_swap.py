"""Reconstruct crops with swapped styles, and measure the error where the truth is known."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from meduet_fast.data.crops import sample_crops
from meduet_fast.data.store import LatentStore
from meduet_fast.kernels import build_mix_index, random_mix_mask, unpatchify_3d
from meduet_fast.models import MeDUET

from .crops import ProbeCrops, Start

PLACES = 16  # pairs of crops that errors are averaged over


class StyleSwap(NamedTuple):
    """Predicted latents, each (N, C, S, S, S): crops of two kinds, as they are and with swapped styles."""

    first: Tensor
    second: Tensor
    first_in_second_style: Tensor
    second_in_first_style: Tensor


@torch.inference_mode()
def swap_styles(model: MeDUET, first: Tensor, second: Tensor, seed: int = 0) -> StyleSwap:
    """Mix pairs of crops, take them apart again and reconstruct each with its own and the other's style.

    A pair is mixed twice, with a random mask and with the sources swapped, so that each token of each crop
    is hidden from the decoder in one of the two passes; that prediction is the one returned. No token that is
    returned was visible to the decoder at its place.

    Args:
        model: works on its own device.
        first, second: latents (N, C, S, S, S); ``first[i]`` is mixed with ``second[i]``.
        seed: of the masks.
    """
    config, count = model.config, len(first)
    edge = config.latent_size // config.patch_size
    mask = random_mix_mask(count, config.num_tokens, torch.Generator().manual_seed(seed))  # (N, L)
    # The partner of row i is row 2N-1-i. With the same mask it shows this row's sources swapped.
    latents = torch.cat([first, second.flip(0)]).to(model.cls_token.device).float()  # (2N, C, S, S, S)
    index = build_mix_index(torch.cat([mask, mask.flip(0)]).to(latents.device))  # of (2N, L)
    mixed = model.factorize(model.encode(model.embed(latents, index.mask)), index)
    straight_1, straight_2, swapped_1, swapped_2 = model.decode(mixed, index).tokens.chunk(
        4
    )  # (2N, L, K) each
    volumes: list[Tensor] = []
    for source_1, source_2 in ((straight_1, straight_2), (swapped_1, swapped_2)):
        tokens = torch.where(index.mask.unsqueeze(-1), source_1, source_2.flip(0))  # (2N, L, K)
        pairs = unpatchify_3d(tokens, config.patch_size, (edge, edge, edge)).cpu()  # (2N, C, S, S, S)
        volumes += [pairs[:count], pairs[count:].flip(0)]
    return StyleSwap(*volumes)


@dataclass(frozen=True)
class SwapErrors:
    """Mean squared errors of latents (about unit variance), over both directions of a swap.

    Attributes:
        swapped: a place with the style of the other volume, against that volume's own crop of the place.
        kept: the same place with its own style against the same crop: what leaving the style alone gives.
        own: the place with its own style against its own crop: how well this network reconstructs at all.
        places: pairs of crops averaged over.
    """

    swapped: float
    kept: float
    own: float
    places: int


def far_start(start: Start, others: Sequence[Start]) -> Start:
    """Return the one of ``others`` that is farthest away."""
    return max(others, key=lambda other: sum((a - b) ** 2 for a, b in zip(start, other, strict=True)))


def swap_errors(model: MeDUET, store: LatentStore, crops: ProbeCrops, first: int, second: int) -> SwapErrors:
    """Measure the errors of swapping styles between two volumes of one group, on held-out crops.

    The style comes from the farthest of the crops, lest the encoder see the truth.

    Args:
        first, second: positions in ``store.entries``.
    """
    places = crops.tested[first][:PLACES]
    far = [far_start(place, crops.tested[first]) for place in places]
    size = model.config.latent_size
    own = sample_crops(store, first, places, size), sample_crops(store, second, far, size)
    truth = sample_crops(store, second, places, size), sample_crops(store, first, far, size)
    result = swap_styles(model, *own)

    def error(predictions: Sequence[Tensor], targets: Sequence[Tensor]) -> float:
        squares = [(a - b.float()).square().mean() for a, b in zip(predictions, targets, strict=True)]
        return float(np.mean(squares))

    straight = (result.first, result.second)
    swapped = (result.first_in_second_style, result.second_in_first_style)
    return SwapErrors(error(swapped, truth), error(straight, truth), error(straight, own), len(places))
