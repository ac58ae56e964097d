"""Choose what an evaluation asks for: held-out places, styles for them, and what a real scan shows there."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from torch import Tensor

from meduet_fast.data.crops import EVALUATION, random_stream
from meduet_fast.data.held_out import HeldOut
from meduet_fast.data.same_anatomy import same_anatomy_groups
from meduet_fast.data.store import LatentStore
from meduet_fast.errors import UserError

from .crops import held_out_windows, training_windows
from .factors import FactorTable

PLACES = 8  # held-out places of a volume: one is asked for, all are candidates when it is looked for
FITTED = 48  # training crops of each domain that the probe for the style is fitted on
MAX_VOLUMES = 64  # volumes that are looked at; a large store has many that tell the same
FALLBACK_FRACTION = 1 / 3  # of axis 0, for runs that held nothing out


class Condition(NamedTuple):
    """One crop to make: content of a window, style of another; rows of the table.

    Attributes:
        content: row whose place is asked for.
        style: row of the domain that is asked for, at another place.
        truth: row of a real scan that shows this place in this style; None if there is none.
    """

    content: int
    style: int
    truth: int | None


@dataclass(frozen=True)
class Windows:
    """The windows of a table that an evaluation looks at; its numbers are rows of the table.

    Attributes:
        table: the table.
        store: where their latents are.
        places: held-out windows of each volume (position in ``store.entries``), those with the most to see
            and far from each other; volumes of one group have them at the same places.
        fitted: windows of each domain (position in ``store.domains``) in the training region.
        trained: all windows of the training region.
        groups: volumes that show one anatomy, of those in ``places``.
        unseen: whether training kept away from ``places``.
    """

    table: FactorTable
    store: LatentStore
    places: dict[int, list[int]]
    fitted: dict[int, list[int]]
    trained: list[int]
    groups: list[list[int]]
    unseen: bool

    @property
    def domains(self) -> list[int]:
        """Return the domains that have held-out windows, positions in ``store.domains``."""
        return sorted({self.store.domain_id(volume) for volume in self.places})

    @property
    def tested(self) -> list[int]:
        """Return all held-out windows that are looked at."""
        return [row for rows in self.places.values() for row in rows]

    def volume(self, row: int) -> int:
        """Return the volume of a window, a position in ``store.entries``."""
        return int(self.table.volume[row])

    def domain(self, row: int) -> int:
        """Return the domain of a window, a position in ``store.domains``."""
        return self.store.domain_id(self.volume(row))

    def latents(self, rows: Sequence[int]) -> Tensor:
        """Read windows, (N, C, x, y, z) float32."""
        starts = [self.table.start[row].tolist() for row in rows]
        return self.store.read_crops([self.volume(row) for row in rows], starts, self.table.window).float()

    def twin(self, row: int, domain: int) -> int | None:
        """Return the window that shows a held-out place as a domain images it; None if no scan does."""
        own = self.volume(row)
        if self.store.domain_id(own) == domain:
            return row
        number = self.places[own].index(row)
        for group in self.groups:
            if own in group:
                for other in group:
                    if self.store.domain_id(other) == domain:
                        return self.places[other][number]
        return None

    def conditions(self, count: int) -> list[Condition]:
        """Pair places and styles: every domain is asked for as often as any other, give or take one.

        Round r asks every domain for place r of another volume, so that after as many rounds as there are
        places every place was asked for as often as any other, where volumes and domains are as many.
        """
        volumes, domains = list(self.places), self.domains
        of_domain = {d: [v for v in volumes if self.store.domain_id(v) == d] for d in domains}
        found = []
        for number in range(count):
            turn, lane = divmod(number, len(domains))
            rows = self.places[volumes[(lane + turn + turn // PLACES) % len(volumes)]]
            content = rows[turn % len(rows)]
            donors = self.places[of_domain[domains[lane]][turn % len(of_domain[domains[lane]])]]
            style = donors[(turn + 1 + len(donors) // 2) % len(donors)]
            found.append(Condition(content, style, self.twin(content, domains[lane])))
        return found

    def grid(self, rows: int, columns: int) -> tuple[list[int], list[int]]:
        """Return windows for contents, of as many anatomies as possible, and for styles, one a domain."""
        apart = [[volume] for volume in self.places if not any(volume in group for group in self.groups)]
        anatomies = [*self.groups, *apart]
        contents = [
            (members[turn % len(members)], turn) for turn in range(rows) for members in anatomies
        ]  # all first places, then all second ones
        first = [self.places[volume][turn % len(self.places[volume])] for volume, turn in contents[:rows]]
        styles = {self.store.domain_id(volume): volume for volume in reversed(self.places)}
        return first, [self.places[styles[domain]][-1] for domain in self.domains[:columns]]


def choose_windows(table: FactorTable, store: LatentStore, held_out: HeldOut, seed: int = 0) -> Windows:
    """Choose held-out places and training windows of a table.

    Args:
        table: factors of windows of the store, see :func:`~.crops.check_table`.
        store: an open store.
        held_out: by the run; if that is nothing, a third of every volume is set apart, which it has seen.
        seed: chooses the training windows that the probe is fitted on.

    Raises:
        UserError: no volume with two held-out windows, no training windows, or as
            :func:`~.crops.held_out_windows`.
    """
    unseen = held_out.fraction > 0
    if not unseen:
        held_out = HeldOut(store.entries, FALLBACK_FRACTION)
    volumes = table.volume.tolist()
    by_volume: defaultdict[int, list[int]] = defaultdict(list)  # held-out rows
    for row in held_out_windows(table, held_out).tolist():
        by_volume[volumes[row]].append(row)
    trained = training_windows(table, held_out).tolist()
    if not trained:
        raise UserError(f"{table.path}: no window lies in the training region")
    of_domain: defaultdict[int, list[int]] = defaultdict(list)
    for row in trained:
        of_domain[store.domain_id(volumes[row])].append(row)
    usable = [
        volume
        for volume in by_volume
        if len(by_volume[volume]) > 1 and store.domain_id(volume) in of_domain  # styles that can be known
    ]
    groups = [
        members
        for group in same_anatomy_groups(store)
        if len(members := [volume for volume in group if volume in usable]) > 1
    ]
    chosen = _some_of_each_domain(store, groups, usable)
    places: dict[int, list[int]] = {}
    for members in [*groups, *([volume] for volume in usable)]:
        if members[0] in chosen and members[0] not in places:
            places.update(_spread_places(table, store, {volume: by_volume[volume] for volume in members}))
    if not places:
        raise UserError(
            f"{table.path}: no volume has two windows of {table.window} in what is held out "
            f"({held_out.describe()}); make the table with a smaller window or stride"
        )
    rng = random_stream(seed, EVALUATION, number=1)
    fitted = {
        domain: sorted(rng.permutation(rows)[:FITTED].tolist()) for domain, rows in sorted(of_domain.items())
    }
    groups = [group for group in groups if group[0] in places and _same_starts(table, places, group)]
    return Windows(table, store, dict(sorted(places.items())), fitted, trained, groups, unseen)


def _same_starts(table: FactorTable, places: Mapping[int, Sequence[int]], group: Sequence[int]) -> bool:
    """Tell whether volumes have their windows at the same places: a table's windows may lie differently."""
    first, *others = (table.start[places[volume]].tolist() for volume in group)
    return all(starts == first for starts in others)


def _some_of_each_domain(
    store: LatentStore, groups: Sequence[Sequence[int]], usable: Iterable[int]
) -> set[int]:
    """Choose at most MAX_VOLUMES volumes: whole groups, then those of the domains that have the fewest."""
    chosen: set[int] = set()
    for group in groups:
        if len(chosen) + len(group) <= MAX_VOLUMES or not chosen:
            chosen.update(group)
    counts: defaultdict[int, int] = defaultdict(int)
    for volume in chosen:
        counts[store.domain_id(volume)] += 1
    waiting = [volume for volume in usable if not any(volume in group for group in groups)]
    while waiting and len(chosen) < MAX_VOLUMES:
        volume = min(waiting, key=lambda index: counts[store.domain_id(index)])
        waiting.remove(volume)
        counts[store.domain_id(volume)] += 1
        chosen.add(volume)
    return chosen


def _spread_places(
    table: FactorTable, store: LatentStore, rows: Mapping[int, Sequence[int]]
) -> dict[int, list[int]]:
    """Choose the same places of volumes of one anatomy: of the half with more structure, far from each other.

    Args:
        rows: held-out windows of each volume.
    """
    at = {volume: {tuple(table.start[row].tolist()): row for row in own} for volume, own in rows.items()}
    starts = sorted(set.intersection(*(set(own) for own in at.values())))
    if len(starts) < 2:  # no common grid: each volume for itself
        return {
            volume: place
            for volume, own in rows.items()
            for place in _spread_places(table, store, {volume: own}).values()
        }
    structure = np.zeros(len(starts))
    for volume in at:
        for number, start in enumerate(starts):
            crop = store.read_crops([volume], [start], table.window).float()  # (1, C, x, y, z)
            structure[number] += float(crop.flatten(2).var(2).mean())
    order = np.argsort(-structure, kind="stable")[: max(PLACES, (len(starts) + 1) // 2)]
    corners = np.array(starts)[order].astype(float)  # (M, 3)
    kept = [0]
    while len(kept) < min(PLACES, len(corners)):
        away = np.linalg.norm(corners[:, None] - corners[kept], axis=2).min(1)  # (M,) to the nearest kept
        kept.append(int(away.argmax()))
    return {volume: [own[starts[order[number]]] for number in kept] for volume, own in at.items()}
