"""Reconstruction with exchanged styles, and its error where the truth is known."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from meduet_fast.data.crops import sample_crops
from meduet_fast.data.store import LatentStore
from meduet_fast.kernels import mix_tables, unpatchify_3d
from meduet_fast.models import MeDUET
from meduet_fast.pretraining.losses import random_mix_mask

from .crops import EvaluationPlan, Start

PLACES = 16  # pairs of crops that errors are averaged over


class Exchange(NamedTuple):
    """Predicted latents, each (N, C, S, S, S): crops of two kinds, as they are and with exchanged styles."""

    first: Tensor
    second: Tensor
    first_in_second_style: Tensor
    second_in_first_style: Tensor


@torch.inference_mode()
def exchange_styles(model: MeDUET, first: Tensor, second: Tensor, seed: int = 0) -> Exchange:
    """Mix pairs of crops, take them apart again and reconstruct each with its own and the other's style.

    A pair is mixed twice, with a random mask and with the sources exchanged, so that each token of each crop
    is hidden from the decoder in one of the two passes; that prediction is the one returned. No token that is
    returned was visible to the decoder at its place.

    Args:
        model: works on its own device.
        first, second: latents (N, C, S, S, S); ``first[i]`` is mixed with ``second[i]``.
        seed: of the masks.
    """
    config = model.config
    generator = torch.Generator().manual_seed(seed)
    mask = random_mix_mask(len(first), config.num_tokens, generator)
    # The partner of row i is row 2N-1-i. With the same mask it shows this row's sources exchanged.
    latents = torch.cat([first, second.flip(0)]).to(model.cls_token.device).float()
    tables = mix_tables(torch.cat([mask, mask.flip(0)]).to(latents.device))
    mixed = model.factorize(model.encode(model.embed(latents, tables.mask)), tables)
    own_1, own_2, swapped_1, swapped_2 = model.decode(mixed, tables).tokens.chunk(4)
    edge = config.latent_size // config.patch_size

    def put_together(stream_1: Tensor, stream_2: Tensor) -> tuple[Tensor, Tensor]:
        tokens = torch.where(tables.mask.unsqueeze(-1), stream_1, stream_2.flip(0))
        volumes = unpatchify_3d(tokens, config.patch_size, (edge, edge, edge)).cpu()
        return volumes[: len(first)], volumes[len(first) :].flip(0)

    return Exchange(*put_together(own_1, own_2), *put_together(swapped_1, swapped_2))


@dataclass(frozen=True)
class ExchangeErrors:
    """Mean squared errors of latents (about unit variance), over both directions of an exchange.

    Attributes:
        exchanged: a place with the style of the other volume, against that volume's own crop of the place.
        kept: the same place with its own style against the same crop: what leaving the style alone gives.
        own: the place with its own style against its own crop: how well this network reconstructs at all.
        places: pairs of crops averaged over.
    """

    exchanged: float
    kept: float
    own: float
    places: int


def far_start(start: Start, others: Sequence[Start]) -> Start:
    """The one of ``others`` that is farthest away."""
    return max(others, key=lambda other: sum((a - b) ** 2 for a, b in zip(start, other, strict=True)))


def exchange_errors(
    model: MeDUET, store: LatentStore, plan: EvaluationPlan, first: int, second: int
) -> ExchangeErrors:
    """Errors of exchanging styles between two volumes of one group, on held-out crops.

    The style comes from the farthest place of the plan, lest the encoder see the truth.

    Args:
        first, second: positions in ``store.entries``.
    """
    places = plan.tested[first][:PLACES]
    far = [far_start(place, plan.tested[first]) for place in places]
    size = model.config.latent_size
    own = sample_crops(store, first, places, size), sample_crops(store, second, far, size)
    truth = sample_crops(store, second, places, size), sample_crops(store, first, far, size)
    result = exchange_styles(model, *own)

    def error(predictions: Sequence[Tensor], targets: Sequence[Tensor]) -> float:
        squares = [(a - b.float()).square().mean() for a, b in zip(predictions, targets, strict=True)]
        return float(np.mean(squares))

    straight = (result.first, result.second)
    swapped = (result.first_in_second_style, result.second_in_first_style)
    return ExchangeErrors(error(swapped, truth), error(straight, truth), error(straight, own), len(places))
