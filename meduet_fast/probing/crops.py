"""Choose the crops to probe: volumes that show one anatomy, places that show something."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from meduet_fast.data.crops import EVALUATION, random_stream, sample_crops
from meduet_fast.data.held_out import held_out_start
from meduet_fast.data.store import LatentStore
from meduet_fast.data.windows import Start
from meduet_fast.errors import UserError

POSITIONS = 64  # held-out crops of each volume
FITTED_PER_TESTED = 4  # crops of each volume that probes are fitted on, for each one they are tested on
MAX_VOLUMES = 64  # volumes that are looked at; a large store has many that tell the same
FALLBACK_FRACTION = 1 / 3  # of axis 0, for runs that held nothing out


@dataclass(frozen=True)
class ProbeCrops:
    """The crops that factors are probed on. Volumes are positions in ``store.entries``.

    Attributes:
        volumes: all volumes looked at.
        groups: those of them that show the same anatomy on one grid, see :func:`same_anatomy_groups`; empty
            if the store has none, then ``volumes`` are of all domains.
        fitted: corners in the training region, by volume: what probes are fitted on. Anywhere in it, because
            the held-out slab may be plainer than the most structured places elsewhere.
        tested: corners in the held-out slab, by volume: what everything is measured on, those with the most
            structure first.
            In both, volumes of one group have the same corners.
        crop_size: edge of a crop in latent voxels.
        fraction: held-out part of axis 0.
        unseen: whether pretraining kept away from the held-out slab.
    """

    volumes: list[int]
    groups: list[list[int]]
    fitted: dict[int, list[Start]]
    tested: dict[int, list[Start]]
    crop_size: int
    fraction: float
    unseen: bool

    @property
    def num_crops(self) -> int:
        """Count the crops of all volumes."""
        return sum(len(self.fitted[volume]) + len(self.tested[volume]) for volume in self.volumes)


def same_anatomy_groups(store: LatentStore) -> list[list[int]]:
    """Find volumes that show the same anatomy in several acquisitions: the ground truth of separation.

    Taken to be those of one body part on one grid: equal shape, and an affine that differs by less than half
    a voxel of the prepared image everywhere. A group has at least two domains. A volume whose corner lies
    at exactly 0, 0, 0 is taken to have no known position (imported caches) and is in no group. Different
    people registered to one template would be taken for one person.

    Returns:
        Lists of positions in ``store.entries``, in ascending order.
    """
    by_shape: defaultdict[tuple[str, tuple[int, ...]], list[int]] = defaultdict(list)
    for index, entry in enumerate(store.entries):
        by_shape[entry.body_part, entry.shape].append(index)
    groups: list[list[int]] = []
    for candidates in by_shape.values():
        found: list[tuple[np.ndarray, list[int]]] = []  # corners and members of this shape's groups
        for index in candidates if len(candidates) > 1 else ():
            own = _corners(store, index)
            if not own[0].any():
                continue
            tolerance = min(store.entries[index].spacing) / 2
            for corners, members in found:
                if np.abs(own - corners).max() < tolerance:
                    members.append(index)
                    break
            else:
                found.append((own, [index]))
        groups += [
            members for _, members in found if len({store.entries[index].domain for index in members}) > 1
        ]
    return sorted(groups)


def _corners(store: LatentStore, index: int) -> np.ndarray:
    """Compute the positions in mm of the eight corners of a volume's image, (8, 3)."""
    affine = np.array(json.loads(store.metadata(index)["affine"]))
    size = np.array(store.entries[index].grid) * store.index.compression
    ends = np.array(np.meshgrid(*[(0, n - 1) for n in size], indexing="ij")).reshape(3, -1)  # (3, 8)
    return (affine[:3, :3] @ ends + affine[:3, 3:]).T


def choose_crops(
    store: LatentStore,
    crop_size: int,
    held_out_fraction: float,
    positions: int = POSITIONS,
    seed: int = 0,
) -> ProbeCrops:
    """Choose volumes and places; for the places see :func:`structured_starts`.

    Args:
        store: an open store.
        crop_size: edge of a crop in latent voxels.
        held_out_fraction: that of the run; if it is 0, a third is set apart for testing, which the run has
            seen.
        positions: held-out places of each volume.
        seed: chooses the places.

    Raises:
        UserError: if no two domains have volumes that hold a crop on both sides of the border.
    """
    fraction = held_out_fraction or FALLBACK_FRACTION
    groups = [
        group for group in same_anatomy_groups(store) if holds_both(store, group[0], crop_size, fraction)
    ]
    ends = np.cumsum([len(group) for group in groups])
    groups = [group for group, end in zip(groups, ends, strict=True) if end <= MAX_VOLUMES] or groups[:1]
    together = groups
    if not groups:  # volumes of every domain, the same number of each where there are as many
        by_domain: defaultdict[str, list[int]] = defaultdict(list)
        share = max(1, MAX_VOLUMES // len(store.domains))
        for index, entry in enumerate(store.entries):
            if len(by_domain[entry.domain]) < share and holds_both(store, index, crop_size, fraction):
                by_domain[entry.domain].append(index)
        together = [[index] for indices in by_domain.values() for index in indices]
    volumes = sorted(index for group in together for index in group)
    if len({store.entries[index].domain for index in volumes}) < 2:
        raise UserError(
            f"{store.path}: separation needs two domains with volumes that can hold a crop of {crop_size} "
            f"on both sides of a held-out border at {fraction:.2g} of their first axis"
        )
    fitted: dict[int, list[Start]] = {}
    tested: dict[int, list[Start]] = {}
    for group in together:
        grid, many = store.entries[group[0]].grid, FITTED_PER_TESTED * positions
        anywhere = evaluation_starts(grid, crop_size, fraction, many, seed, held_out=False)
        fitted.update(dict.fromkeys(group, anywhere))
        structured = structured_starts(store, group, crop_size, fraction, positions, seed)
        tested.update(dict.fromkeys(group, structured))
    return ProbeCrops(volumes, groups, fitted, tested, crop_size, fraction, unseen=held_out_fraction > 0)


def evaluation_starts(
    grid: tuple[int, int, int], crop_size: int, fraction: float, count: int, seed: int, *, held_out: bool
) -> list[Start]:
    """Draw distinct crop corners in the held-out slab, or in the training region; the same on equal grids.

    Args:
        grid: spatial shape (X, Y, Z) in latent voxels.
        crop_size: edge of the crop in latent voxels.
        fraction: held-out part of axis 0.
        count: how many corners; fewer come back where the region has fewer.
        seed: chooses the corners.
        held_out: which of the two regions.

    Raises:
        UserError: the grid cannot hold such a crop, or nothing is held out.
    """
    if min(grid) < crop_size:
        raise UserError(f"grid {grid} cannot hold a crop of {crop_size}")
    if held_out and fraction == 0:
        raise UserError("held-out fraction is 0: there are no held-out crops")
    boundary = held_out_start(grid[0], fraction, crop_size)
    first, end = (boundary, grid[0]) if held_out else (0, boundary)
    choices = (end - first - crop_size + 1, grid[1] - crop_size + 1, grid[2] - crop_size + 1)
    total = int(np.prod(choices))
    chosen = random_stream(seed, EVALUATION).choice(total, size=min(count, total), replace=False)
    x, y, z = (axis.tolist() for axis in np.unravel_index(chosen, choices))
    return [(first + x[i], y[i], z[i]) for i in range(len(chosen))]


def structured_starts(
    store: LatentStore, volumes: Sequence[int], crop_size: int, fraction: float, count: int, seed: int = 0
) -> list[Start]:
    """Choose corners of held-out crops that show something: in empty air is neither content nor style.

    Of twice as many random places the half with more structure is kept: variance of the latents within the
    crop, mean over the volumes.

    Args:
        volumes: volumes on one grid.
        crop_size, fraction, count, seed: see :func:`evaluation_starts`.

    Returns:
        Corners, those with the most structure first.
    """
    grid = store.entries[volumes[0]].grid
    starts = evaluation_starts(grid, crop_size, fraction, 2 * count, seed, held_out=True)
    structure = np.zeros(len(starts))
    for index in volumes:
        latents = sample_crops(store, index, starts, crop_size).float()  # (N, C, S, S, S)
        structure += latents.flatten(2).var(2).mean(1).numpy()  # (N,)
    order = np.argsort(-structure, kind="stable")
    return [starts[i] for i in order[: (len(starts) + 1) // 2]]


def holds_both(store: LatentStore, index: int, crop_size: int, fraction: float) -> bool:
    """Tell whether a volume has room for a crop on both sides of the border."""
    try:
        evaluation_starts(store.entries[index].grid, crop_size, fraction, 1, 0, held_out=True)
    except UserError:
        return False
    return True
