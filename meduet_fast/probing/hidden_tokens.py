"""Fill in hidden tokens, by the network and by smooth interpolation: what has it learnt beyond smoothness?"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from scipy.sparse import csr_array
from scipy.sparse.linalg import splu
from torch import Tensor

from meduet_fast.data.crops import sample_crops
from meduet_fast.data.store import LatentStore
from meduet_fast.kernels import MixIndex, build_mix_index, random_mix_mask, unpatchify_3d
from meduet_fast.models import Factors, MeDUET, MeDUETConfig

from .crops import ProbeCrops, has_room, structured_starts

CROPS = 32  # of each volume


def hiding_masks(config: MeDUETConfig, count: int, seed: int) -> Tensor:
    """Draw masks (count, L), bool: what the first of two passes hides; the second hides the rest."""
    return random_mix_mask(count, config.num_tokens, torch.Generator().manual_seed(seed))


@torch.inference_mode()
def fill_hidden(model: MeDUET, crops: Tensor, partners: Tensor, masks: Tensor) -> Tensor:
    """Reconstruct every token of crops while it is hidden.

    Each crop is mixed with its partner twice, by a mask and by its complement, and taken apart again. The
    decoder gets one half of the crop's tokens and fills in the other, which is what is returned.

    Args:
        model: works on its own device.
        crops, partners: latents (N, C, S, S, S).
        masks: (N, L) bool.

    Returns:
        (N, C, S, S, S) float32, on the CPU.
    """
    mixed, index = mix_twice(model, crops, partners, masks)
    return hidden_crops(model, model.decode(mixed, index, swapped=False).straight, index)


def mix_twice(model: MeDUET, crops: Tensor, partners: Tensor, masks: Tensor) -> tuple[Factors, MixIndex]:
    """Mix crops (N, C, S, S, S) with their partners, by masks (N, L) and by their complements, and encode.

    Returns:
        Factors and index of 2N rows. A crop's own tokens are those of source 1 in the first N rows; in the
        others, which are in reverse order, those of source 2.
    """
    # The partner of row i is row 2N-1-i. With the same mask it shows this row's sources swapped.
    device = model.cls_token.device
    latents = torch.cat([crops, partners.flip(0)]).to(device, torch.float32)  # (2N, C, S, S, S)
    index = build_mix_index(torch.cat([masks, masks.flip(0)]).to(device))  # of (2N, L)
    return model.factorize(model.encode(model.embed(latents, index.mask)), index), index


def hidden_crops(model: MeDUET, streams: Tensor, index: MixIndex) -> Tensor:
    """Put the crops of :func:`mix_twice` together from the tokens that were hidden in one of the two passes.

    Args:
        model: whose they are.
        streams: sources 1 and 2, each alone, (4N, L, K).
        index: of the two passes.

    Returns:
        (N, C, S, S, S) float32, on the CPU.
    """
    source_1, source_2 = streams.chunk(2)  # (2N, L, K) each
    tokens = torch.where(index.mask.unsqueeze(-1), source_1, source_2.flip(0))  # (2N, L, K)
    patch = model.config.patch_size
    side = model.config.latent_size // patch
    return unpatchify_3d(tokens[: len(tokens) // 2], patch, (side, side, side)).float().cpu()


def interpolate_hidden(crops: Tensor, masks: Tensor, patch_size: int) -> Tensor:
    """Fill in the same tokens without any network: harmonically, each voxel the mean of its neighbours.

    The smoothest continuation of what is visible (Laplace's equation, values given at visible voxels, no flow
    through the crop's faces), solved exactly.

    Args:
        crops: latents (N, C, S, S, S).
        masks: (N, L) bool, see :func:`fill_hidden`.
        patch_size: edge of a token in latent voxels.

    Returns:
        (N, C, S, S, S) float32.
    """
    size, channels = crops.shape[-1], crops.shape[1]
    laplacian = _laplacian(size)
    side = size // patch_size
    values = crops.float().flatten(2).numpy()  # (N, C, S^3)
    filled = np.empty_like(values)
    for crop, mask, result in zip(values, masks, filled, strict=True):
        grid = mask.view(side, side, side)
        for axis in range(3):
            grid = grid.repeat_interleave(patch_size, axis)
        first = grid.flatten().numpy()  # (S^3,)
        for hidden in (first, ~first):
            rows = laplacian[hidden]
            known = -(rows[:, ~hidden] @ crop[:, ~hidden].T)  # (hidden, C)
            result[:, hidden] = splu(rows[:, hidden].tocsc()).solve(np.ascontiguousarray(known)).T
    return torch.from_numpy(filled).view(-1, channels, size, size, size)


def _laplacian(size: int) -> csr_array:
    """Build the graph Laplacian of a cubic grid, (size^3, size^3)."""
    numbers = np.arange(size**3).reshape(size, size, size)
    pairs = [
        (np.moveaxis(numbers, axis, 0)[:-1].ravel(), np.moveaxis(numbers, axis, 0)[1:].ravel())
        for axis in range(3)
    ]
    one, other = (np.concatenate([pair[end] for pair in pairs]) for end in (0, 1))
    rows, columns = np.concatenate([one, other]), np.concatenate([other, one])
    degree = np.bincount(rows, minlength=size**3)
    entries = np.concatenate([-np.ones(len(rows)), degree])
    diagonal = np.arange(size**3)
    places = (np.concatenate([rows, diagonal]), np.concatenate([columns, diagonal]))
    return csr_array((entries, places), shape=(size**3, size**3))


@dataclass(frozen=True)
class FillErrors:
    """Mean squared errors of hidden tokens' latents on held-out crops of one volume.

    Attributes:
        domain: of the volume.
        network: of the network.
        interpolation: of smooth interpolation of the same visible tokens.
        variance: of the crops' latents, each channel about its mean: the error of knowing nothing.
    """

    domain: str
    network: float
    interpolation: float
    variance: float


def fill_errors(model: MeDUET, store: LatentStore, crops: ProbeCrops, seed: int = 0) -> list[FillErrors]:
    """Measure how well hidden tokens are filled in, on held-out crops of the volumes looked at.

    Of a domain that has none there, its first volume with room for a crop is taken as well. Crops are mixed
    with held-out crops of the next volume of another domain, of another anatomy if there is one: the other
    acquisition of a place would show what is hidden.
    """
    config, places, found = model.config, dict(crops.tested), []
    known = {store.entries[index].domain for index in places}
    for index, entry in enumerate(store.entries):
        if entry.domain not in known and has_room(crops.held_out, index, config.latent_size, tested=True):
            known.add(entry.domain)
            places[index] = structured_starts(store, crops.held_out, [index], config.latent_size, CROPS, seed)
    volumes = sorted(places)
    for position, index in enumerate(volumes):
        others = [*volumes[position + 1 :], *volumes[:position]]
        own_group = next((group for group in crops.groups if index in group), [index])
        other_domains = [i for i in others if store.entries[i].domain != store.entries[index].domain]
        partner = min(other_domains, key=lambda i: i in own_group)  # the first of the least
        starts = places[index][:CROPS]
        again = [places[partner][-1 - i % len(places[partner])] for i in range(len(starts))]
        own = sample_crops(store, index, starts, config.latent_size).float()  # (N, C, S, S, S)
        masks = hiding_masks(config, len(starts), seed)  # (N, L)
        by_network = fill_hidden(model, own, sample_crops(store, partner, again, config.latent_size), masks)
        smooth = interpolate_hidden(own, masks, config.patch_size)
        mean = own.mean((0, 2, 3, 4), keepdim=True)  # (1, C, 1, 1, 1)
        errors = [float((guess - own).square().mean()) for guess in (by_network, smooth, mean)]
        found.append(FillErrors(store.entries[index].domain, *errors))
    return found
