"""Extract content and style of crops for probes and plots. Source: downstream section "Factors"."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from meduet_fast.data.crops import sample_crops
from meduet_fast.data.store import LatentStore
from meduet_fast.kernels import token_mean
from meduet_fast.models import MeDUET
from meduet_fast.progress import ProgressBar

from .crops import ProbeCrops


@torch.inference_mode()
def extract_factors(
    model: MeDUET,
    store: LatentStore,
    volume_index: int,
    starts: Sequence[tuple[int, int, int]],
    batch_size: int = 16,
) -> tuple[np.ndarray, np.ndarray]:
    """Encode unmixed crops of one volume and average content and style over their tokens.

    Args:
        model: works on its own device.
        store: where the latents are.
        volume_index: position in ``store.entries``.
        starts: N first corners (x, y, z) in latent voxels.
        batch_size: crops that are encoded at once.

    Returns:
        Content (N, D) and style (N, Ds), float32.

    Raises:
        ValueError: a crop leaves its volume.
        UserError: a latent file is missing, damaged or not the one that the index describes.
    """
    device = model.cls_token.device
    content = np.empty((len(starts), model.config.embed_dim), np.float32)  # (N, D)
    style = np.empty((len(starts), model.config.style_dim), np.float32)  # (N, Ds)
    for first in range(0, len(starts), batch_size):
        rows = slice(first, first + batch_size)
        latents = sample_crops(store, volume_index, list(starts[rows]), model.config.latent_size)
        factors = model(latents.to(device).float())  # (B, L, D) and (B, L, Ds) of (B, C, S, S, S)
        content[rows] = token_mean(factors.content)[0].cpu().numpy()  # (B, D)
        style[rows] = token_mean(factors.style)[0].cpu().numpy()  # (B, Ds)
    return content, style


@dataclass(frozen=True)
class FactorTable:
    """Factors of N crops, one row each.

    Attributes:
        content: (N, D) float32.
        style: (N, Ds) float32.
        domain: (N,) position in ``store.domains``.
        volume: (N,) position in ``store.entries``.
        position: (N,) number of the crop within its volume and region; equal numbers of volumes of one group
            are the same place.
        held_out: (N,) bool, whether the crop is one that training never sees.
    """

    content: np.ndarray
    style: np.ndarray
    domain: np.ndarray
    volume: np.ndarray
    position: np.ndarray
    held_out: np.ndarray

    def rows(self, chosen: np.ndarray) -> FactorTable:
        """Return the table of some rows."""
        return FactorTable(**{name: values[chosen] for name, values in vars(self).items()})


def factor_table(
    model: MeDUET, store: LatentStore, crops: ProbeCrops, bar: ProgressBar | None = None
) -> FactorTable:
    """Extract the factors of all crops; ``bar`` counts them."""
    parts: list[FactorTable] = []
    for volume in crops.volumes:
        for held_out, starts in ((False, crops.fitted.get(volume)), (True, crops.tested.get(volume))):
            if starts is None:
                continue
            content, style = extract_factors(model, store, volume, starts)
            count, domain = len(starts), store.domain_id(volume)
            table = FactorTable(
                content, style, domain=np.full(count, domain), volume=np.full(count, volume),
                position=np.arange(count), held_out=np.full(count, held_out),
            )  # fmt: skip
            parts.append(table)
            if bar is not None:
                bar.update(count, store.entries[volume].name)
    columns = FactorTable.__dataclass_fields__
    return FactorTable(*(np.concatenate([getattr(part, name) for part in parts]) for name in columns))
