"""Define "held out": a slab at the right end of every volume's left-right axis, or some volumes whole."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Literal

from meduet_fast.errors import UserError

from .same_anatomy import same_anatomy_sets
from .store import LatentStore
from .store_index import StoreEntry

HeldOutKind = Literal["slab", "volumes"]
MOST_NAMES = 20  # of volumes in a line of text
HELD_OUT_VOLUMES = "held_out_volumes"  # in a run's record: names of the volumes that are held out whole


@dataclass(frozen=True)
class HeldOut:
    """Say what training never sees: of every volume, what lies along axis 0 from :meth:`border` on.

    Attributes:
        entries: the store's volumes.
        fraction: part of axis 0 of every volume, or part of every domain's volumes; 0 holds nothing out.
        kind: "slab" or "volumes".
        volumes: positions in ``entries`` of the volumes that are held out whole; none for "slab".
    """

    entries: Sequence[StoreEntry]
    fraction: float = 0.0
    kind: HeldOutKind = "slab"
    volumes: frozenset[int] = frozenset()

    @classmethod
    def choose(cls, store: LatentStore, kind: HeldOutKind, fraction: float, seed: int) -> HeldOut:
        """Choose what a run holds out; see :func:`choose_volumes`.

        Raises:
            UserError: no volume can be held out whole.
        """
        volumes = choose_volumes(store, fraction, seed) if kind == "volumes" else frozenset[int]()
        return cls(store.entries, fraction, kind, volumes)

    @classmethod
    def of_run(cls, store: LatentStore, fraction: float, names: Sequence[str] | None) -> HeldOut:
        """Return what a run held out, whatever its store has got or lost since.

        Args:
            store: the run's.
            fraction: as its settings say.
            names: of the volumes that it held out whole; None if it held out slabs.
        """
        if names is None:
            return cls(store.entries, fraction)
        held = set(names)
        volumes = frozenset(index for index, entry in enumerate(store.entries) if entry.name in held)
        return cls(store.entries, fraction, "volumes", volumes)

    def border(self, index: int, crop: int, multiple: int = 1) -> int:
        """Return a volume's first held-out index along axis 0: 0 if it is held out whole, its size if not.

        Args:
            index: position in ``entries``.
            crop: edge of a crop along axis 0 in latent voxels, the least that a slab is wide.
            multiple: of what a slab's border is one; that is the patch size where crops lie on its grid.

        Raises:
            UserError: the volume cannot be divided; see :func:`held_out_start`.
        """
        size = self.entries[index].grid[0]
        if self.kind == "slab":
            return held_out_start(size, self.fraction, crop, multiple)
        return 0 if index in self.volumes else size

    def names(self) -> list[str]:
        """Return the names of the volumes that are held out whole."""
        return [self.entries[index].name for index in sorted(self.volumes)]

    def describe(self) -> str:
        """Say what is held out."""
        if self.kind == "slab":
            return f"{100 * self.fraction:.0f} % of every volume's left-right axis"
        names = self.names()
        more = f" and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else ""
        return f"{len(names)} of {len(self.entries)} volumes, whole: {', '.join(names[:MOST_NAMES])}{more}"

    def doubts(self, crop: int) -> list[str]:
        """Say what of it is allowed and hardly meant, a line each.

        Args:
            crop: edge of a crop in latent voxels.
        """
        if self.kind == "slab":
            return []
        held = [self.entries[index] for index in sorted(self.volumes)]
        found = []
        without = sorted({entry.domain for entry in self.entries} - {entry.domain for entry in held})
        if without:
            found.append(
                f"no volume is held out of {', '.join(without)}: a domain keeps one to train on, and volumes "
                "that show one anatomy stay together"
            )
        small = [f"{entry.name} {entry.grid}" for entry in held if min(entry.grid) < crop]
        if small:
            found.append(f"held-out volumes that cannot hold a crop of {crop}: {', '.join(small)}")
        return found


def choose_volumes(store: LatentStore, fraction: float, seed: int) -> frozenset[int]:
    """Choose the volumes that are held out whole, by a hash of their names.

    Volumes that show one anatomy (:func:`.same_anatomy.same_anatomy_sets`) are held out together. They go in
    the order of the hash, as long as no domain gives more than its part; then once more for the domains that
    have given none. Every domain keeps a volume to train on. More volumes in a store change the choice
    little: those there keep their order.

    Args:
        store: an open store.
        fraction: part of every domain's volumes, rounded, but at least one.
        seed: of the hash.

    Returns:
        Positions in ``store.entries``.

    Raises:
        UserError: no domain can spare a volume.
    """
    order = [sha256(f"{seed} {entry.name}".encode()).digest() for entry in store.entries]
    sets = sorted(same_anatomy_sets(store), key=lambda members: min(order[index] for index in members))
    total = Counter(entry.domain for entry in store.entries)
    part = {domain: max(1, round(fraction * count)) for domain, count in total.items()}
    chosen: set[int] = set()
    given: Counter[str] = Counter()
    for needed in (False, True):
        for members in sets:
            own = Counter(store.entries[index].domain for index in members)
            if needed and all(given[domain] for domain in own):
                continue
            if all(
                given[domain] + count < total[domain] and (needed or given[domain] + count <= part[domain])
                for domain, count in own.items()
            ):
                chosen |= set(members)
                given += own
    if not chosen:
        reason = (
            "found one volume in every domain, expected a domain with two"
            if max(total.values()) == 1
            else "whole domains show one anatomy, which is held out together or not at all; volumes on one "
            "grid are taken to show it, also people registered to a template"
        )
        raise UserError(f"{store.path}: no volume can be held out: {reason}; hold out slabs (held_out: slab)")
    return frozenset(chosen)


def held_out_start(size: int, fraction: float, crop: int, multiple: int = 1) -> int:
    """Return the first index, along axis 0, of the held-out slab of one volume.

    Training crops lie wholly before it (``start + crop <= held_out_start``), held-out crops wholly at or
    after it. The slab is the last ``fraction`` of the axis, never narrower than one crop; it is widened,
    never narrowed, so that it starts at a multiple of ``multiple``.

    Args:
        size: length of axis 0 (voxels or latent voxels; ``crop`` and ``multiple`` are in the same unit).
        fraction: part of the axis to hold out, 0 <= fraction < 1.
        crop: edge of a crop.
        multiple: alignment of the first held-out index.

    Returns:
        The index; ``size`` when ``fraction`` is 0 (nothing is held out).

    Raises:
        UserError: if the fraction is out of range, or one of the two sides cannot hold a crop.
    """
    if not 0 <= fraction < 1:
        raise UserError(f"held-out fraction: found {fraction}, expected 0 <= fraction < 1")
    if crop > size:
        raise UserError(f"axis of {size} cannot hold a crop of {crop}")
    if fraction == 0:
        return size
    # The subtraction of a hair keeps 0.1 * 30 = 3.0000000000000004 from counting as 4.
    held_out = max(math.ceil(fraction * size - 1e-9), crop)
    start = (size - held_out) // multiple * multiple
    if start < crop:
        raise UserError(
            f"axis of {size} cannot hold a training crop and a held-out crop of {crop} "
            f"with a held-out fraction of {fraction} (training side: {max(start, 0)})"
        )
    return start
