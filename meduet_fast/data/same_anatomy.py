"""Find volumes that show the same anatomy."""

from __future__ import annotations

import json
from collections import defaultdict

import numpy as np

from .store import LatentStore


def same_anatomy_groups(store: LatentStore, least_domains: int = 2) -> list[list[int]]:
    """Find volumes that show the same anatomy in several acquisitions: the ground truth of separation.

    Taken to be those of one body part on one grid: equal shape, and an affine that differs by less than half
    a voxel of the prepared image everywhere. A volume whose corner lies at exactly 0, 0, 0 is taken to have
    no known position (imported caches) and is in no group. Different people registered to one template would
    be taken for one person.

    Args:
        store: an open store.
        least_domains: that a group has.

    Returns:
        Lists of positions in ``store.entries``, in ascending order.
    """
    by_shape: defaultdict[tuple[str, tuple[int, ...]], list[int]] = defaultdict(list)
    for index, entry in enumerate(store.entries):
        by_shape[entry.body_part, entry.shape].append(index)
    groups: list[list[int]] = []
    for candidates in by_shape.values():
        found: list[list[int]] = []  # members of this shape's groups
        firsts = np.empty((len(candidates), 8, 3))  # corners of their first members
        for index in candidates if len(candidates) > 1 else ():
            own = _corners(store, index)
            if not own[0].any():
                continue
            tolerance = min(store.entries[index].spacing) / 2
            # One coordinate rules out nearly all.
            near = np.flatnonzero(np.abs(own[0, 0] - firsts[: len(found), 0, 0]) < tolerance)  # (near,)
            same = near[(np.abs(own - firsts[near]) < tolerance).all((1, 2))]  # (same,)
            if same.size:
                found[same[0]].append(index)
            else:
                firsts[len(found)] = own
                found.append([index])
        groups += [
            members
            for members in found
            if len({store.entries[index].domain for index in members}) >= least_domains
        ]
    return sorted(groups)


def same_anatomy_sets(store: LatentStore) -> list[list[int]]:
    """Divide all volumes so that no anatomy is in two parts: a group or source in one, the others alone.

    A source is a file, whose channels are volumes of their own; see :func:`same_anatomy_groups` for groups.

    Returns:
        Lists of positions in ``store.entries``.
    """
    part_of = [{index} for index in range(len(store.entries))]
    by_source: defaultdict[str, list[int]] = defaultdict(list)
    for index, entry in enumerate(store.entries):
        by_source[entry.source].append(index)
    for first, *others in (*same_anatomy_groups(store, least_domains=1), *by_source.values()):
        for other in others:
            if part_of[other] is not part_of[first]:
                part_of[first] |= part_of[other]
                for member in part_of[other]:
                    part_of[member] = part_of[first]
    return [sorted(part) for index, part in enumerate(part_of) if index == min(part)]


def _corners(store: LatentStore, index: int) -> np.ndarray:
    """Compute the positions in mm of the eight corners of a volume's image, (8, 3)."""
    affine = np.array(json.loads(store.metadata(index)["affine"]))
    size = np.array(store.entries[index].grid) * store.index.compression
    ends = np.array(np.meshgrid(*[(0, n - 1) for n in size], indexing="ij")).reshape(3, -1)  # (3, 8)
    return (affine[:3, :3] @ ends + affine[:3, 3:]).T
