"""Choose the crops to probe: volumes that show one anatomy, places that show something."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from meduet_fast.data.crops import EVALUATION, random_stream, sample_crops
from meduet_fast.data.held_out import HeldOut
from meduet_fast.data.same_anatomy import same_anatomy_groups
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
        volumes: all volumes looked at, in ascending order.
        groups: those that everything is measured on, if they show the same anatomy on one grid, see
            :func:`~meduet_fast.data.same_anatomy.same_anatomy_groups`; empty if none that are held out do,
            then they are of all domains.
        fitted: corners in the training region, by volume: what probes are fitted on. Anywhere in it, because
            what is held out may be plainer than the most structured places elsewhere.
        tested: corners in what is held out, by volume: what everything is measured on, those with the most
            structure first. Volumes of one group have the same corners.
        crop_size: edge of a crop in latent voxels.
        held_out: what is held out: of every volume looked at a slab, or some of them whole.
        unseen: whether pretraining kept away from it.
    """

    volumes: list[int]
    groups: list[list[int]]
    fitted: dict[int, list[Start]]
    tested: dict[int, list[Start]]
    crop_size: int
    held_out: HeldOut
    unseen: bool

    @property
    def num_crops(self) -> int:
        """Count the crops of all volumes."""
        return sum(len(starts) for starts in (*self.fitted.values(), *self.tested.values()))


def choose_crops(
    store: LatentStore,
    crop_size: int,
    held_out: HeldOut,
    positions: int = POSITIONS,
    seed: int = 0,
) -> ProbeCrops:
    """Choose volumes and places; for the places see :func:`structured_starts`.

    Args:
        store: an open store.
        crop_size: edge of a crop in latent voxels.
        held_out: by the run; if that is nothing, a third of every volume is set apart for testing, which the
            run has seen.
        positions: held-out places of each volume.
        seed: chooses the places.

    Raises:
        UserError: if no two domains have crops of both kinds.
    """
    unseen = held_out.fraction > 0
    if not unseen:
        held_out = HeldOut(store.entries, FALLBACK_FRACTION)

    def with_room(indices: Iterable[int], tested: bool) -> list[int]:
        return [index for index in indices if has_room(held_out, index, crop_size, tested=tested)]

    def some_of_each_domain(indices: Iterable[int]) -> list[int]:
        """Take the same number of every domain, where there are as many."""
        by_domain: defaultdict[str, list[int]] = defaultdict(list)
        for index in indices:
            by_domain[store.entries[index].domain].append(index)
        share = max(1, MAX_VOLUMES // len(store.domains))
        return [index for found in by_domain.values() for index in found[:share]]

    trained = with_room(range(len(store.entries)), tested=False)
    domains = {store.entries[index].domain for index in trained}
    usable = [
        index
        for index in with_room(range(len(store.entries)), tested=True)
        if store.entries[index].domain in domains
    ]
    groups = [group for group in same_anatomy_groups(store) if set(group) <= set(usable)]
    ends = np.cumsum([len(group) for group in groups])
    groups = [group for group, end in zip(groups, ends, strict=True) if end <= MAX_VOLUMES] or groups[:1]
    together = groups or [[index] for index in some_of_each_domain(usable)]
    chosen = [index for group in together for index in group]
    domains = {store.entries[index].domain for index in chosen}
    if len(domains) < 2:
        where = (
            f"on both sides of a held-out border at {held_out.fraction:.2g} of their first axis"
            if held_out.kind == "slab"
            else "that are held out whole, and others to fit probes on"
        )
        raise UserError(
            f"{store.path}: separation needs two domains with volumes that can hold a crop of {crop_size} "
            f"{where}"
        )
    # Volumes that are held out whole have no other side; others of their domains stand in for it.
    others = [index for index in trained if store.entries[index].domain in domains]
    fitted_on = with_room(chosen, tested=False) or some_of_each_domain(others)
    many = FITTED_PER_TESTED * positions
    fitted = {
        index: evaluation_starts(held_out, index, crop_size, many, seed, tested=False) for index in fitted_on
    }
    tested: dict[int, list[Start]] = {}
    for group in together:
        structured = structured_starts(store, held_out, group, crop_size, positions, seed)
        tested.update(dict.fromkeys(group, structured))
    volumes = sorted({*fitted, *tested})
    return ProbeCrops(volumes, groups, fitted, tested, crop_size, held_out, unseen)


def evaluation_starts(
    held_out: HeldOut, index: int, crop_size: int, count: int, seed: int, *, tested: bool
) -> list[Start]:
    """Draw distinct crop corners of a volume, in what is held out or in the rest; the same on equal grids.

    Args:
        held_out: what is held out.
        index: position of the volume in ``store.entries``.
        crop_size: edge of the crop in latent voxels.
        count: how many corners; fewer come back where the region has fewer.
        seed: chooses the corners.
        tested: which of the two regions: what is held out, or the rest.

    Raises:
        UserError: the region cannot hold such a crop.
    """
    first, size = _region(held_out, index, crop_size, tested)
    if min(size) < crop_size:
        where = "held-out part" if tested else "training region"
        raise UserError(
            f"{held_out.entries[index].name}: its {where} of {size} cannot hold a crop of {crop_size}"
        )
    choices = tuple(edge - crop_size + 1 for edge in size)
    total = int(np.prod(choices))
    chosen = random_stream(seed, EVALUATION).choice(total, size=min(count, total), replace=False)
    x, y, z = (axis.tolist() for axis in np.unravel_index(chosen, choices))
    return [(first + x[i], y[i], z[i]) for i in range(len(chosen))]


def has_room(held_out: HeldOut, index: int, crop_size: int, *, tested: bool) -> bool:
    """Tell whether a region of a volume has room for a crop; see :func:`evaluation_starts`."""
    try:
        return min(_region(held_out, index, crop_size, tested)[1]) >= crop_size
    except UserError:
        return False


def _region(held_out: HeldOut, index: int, crop_size: int, tested: bool) -> tuple[int, tuple[int, int, int]]:
    """Return where along axis 0 a region begins, and its size."""
    x, y, z = held_out.entries[index].grid
    border = held_out.border(index, crop_size)
    return (border, (x - border, y, z)) if tested else (0, (border, y, z))


def structured_starts(
    store: LatentStore,
    held_out: HeldOut,
    volumes: Sequence[int],
    crop_size: int,
    count: int,
    seed: int = 0,
) -> list[Start]:
    """Choose corners of held-out crops that show something: in empty air is neither content nor style.

    Of twice as many random places the half with more structure is kept: variance of the latents within the
    crop, mean over the volumes.

    Args:
        store: an open store.
        held_out: what is held out.
        volumes: volumes on one grid.
        crop_size, count, seed: see :func:`evaluation_starts`.

    Returns:
        Corners, those with the most structure first.
    """
    starts = evaluation_starts(held_out, volumes[0], crop_size, 2 * count, seed, tested=True)
    structure = np.zeros(len(starts))
    for index in volumes:
        latents = sample_crops(store, index, starts, crop_size).float()  # (N, C, S, S, S)
        structure += latents.flatten(2).var(2).mean(1).numpy()  # (N,)
    order = np.argsort(-structure, kind="stable")
    return [starts[i] for i in order[: (len(starts) + 1) // 2]]
