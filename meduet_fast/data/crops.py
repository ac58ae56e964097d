"""Draw batches of crops: a pure function of seed and number, so resume is exact with any processes."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, from_numpy
from torch.utils.data import Dataset

from meduet_fast.errors import UserError

from .held_out import HeldOut
from .store import LatentStore

# Streams of the counter-based generator; two uses of one seed never share numbers.
TRAINING, EVALUATION, DONORS = 1, 2, 3


def random_stream(seed: int, stream: int, number: int = 0, lane: int = 0) -> np.random.Generator:
    """Return the random numbers of one use of a seed: ``TRAINING`` or another, a batch, a lane."""
    # The counter's low words count the numbers drawn; number and lane, in the high words, keep streams apart.
    key = np.array([seed, stream], dtype=np.uint64)  # of mixed plain integers numpy would make floats
    counter = np.array([0, 0, number, lane], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=counter))


def balanced_domains(count: int, size: int, seed: int, number: int) -> tuple[np.ndarray, np.random.Generator]:
    """Draw the domain of each row of a training batch: each as often as any other, give or take one.

    Returns:
        (size,) int64, of ``count`` domains, and the numbers that the rest of the batch is drawn with.
    """
    order = random_stream(seed, TRAINING, number, 0).permutation(count)  # (domains,)
    rng = random_stream(seed, TRAINING, number, 1)
    return rng.permutation(order[np.arange(size) % count]), rng


class CropBatches(Dataset[dict[str, Tensor]]):
    """Read batches, as a map-style data set: item ``number`` is a batch of one endless stream.

    An item is a dict: ``latents`` bfloat16 (B, C, s, s, s); ``domain`` int64 (B,), positions in
    ``store.domains``; ``volume`` int64 (B,), positions in ``store.entries``; ``start`` int64 (B, 3), first
    corners in latent voxels.

    Every batch holds every domain as often as any other, give or take one; volumes are uniform in a domain,
    corners uniform within a volume's training region. Rows i and B-1-i come from different volumes.

    Args:
        store: an open store.
        crop_size: edge of the cubic crop in latent voxels (published: 24).
        batch_size: crops of a batch; even, because the method mixes row i with row B-1-i.
        seed: seed of the whole order of crops.
        held_out: what training never sees; None holds nothing out.

    Raises:
        UserError: odd batch, a single volume, volumes that cannot hold a crop (all are named), bad arguments.
    """

    def __init__(
        self,
        store: LatentStore,
        crop_size: int = 24,
        batch_size: int = 64,
        seed: int = 0,
        held_out: HeldOut | None = None,
    ) -> None:
        if batch_size < 2 or batch_size % 2:
            raise UserError(
                f"batch_size: found {batch_size}, expected an even number of at least 2 "
                "(row i is mixed with row B-1-i)"
            )
        if not 0 <= seed < 2**64:
            raise UserError(f"seed: found {seed}, expected 0 <= seed < 2**64")
        held_out = held_out or HeldOut(store.entries)
        trained = [index for index in range(len(store.entries)) if index not in held_out.volumes]
        if len(trained) < 2:
            raise UserError(
                f"{store.path}: {len(trained)} volume(s) to train on, {len(held_out.volumes)} held out, "
                "expected at least 2 to train on: a sample is never mixed with itself"
            )
        if crop_size < 1:
            raise UserError(f"crop_size: found {crop_size}, expected at least 1")
        self.store, self.crop_size, self.batch_size, self.seed = store, crop_size, batch_size, seed
        refused = []
        # Possible first corners along each axis; none in volumes that are held out whole.
        self._choices = np.zeros((len(store.entries), 3), np.int64)  # (volumes, 3)
        for index in trained:
            entry = store.entries[index]
            if min(entry.grid) < crop_size:
                refused.append(f"{entry.name} {entry.grid} is smaller than a crop of {crop_size}")
                continue
            try:
                end = held_out.border(index, crop_size)
            except UserError as error:
                refused.append(f"{entry.name}: {error}")
                continue
            self._choices[index] = [size - crop_size + 1 for size in (end, *entry.grid[1:])]
        if refused:
            raise UserError(f"{store.path}: volumes that cannot hold a training crop: " + "; ".join(refused))
        domain = np.array([store.domain_id(index) for index in trained])  # (trained,)
        self._by_domain = np.array(trained)[np.argsort(domain, kind="stable")]  # (trained,), by domain
        self._count = np.bincount(domain)  # (domains,)
        self._first = np.cumsum(self._count) - self._count  # (domains,), places in _by_domain

    def layout(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Return the shape and dtype of every entry of a batch."""
        size, channels = self.batch_size, self.store.index.channels
        return {
            "latents": ((size, channels, *(self.crop_size,) * 3), torch.bfloat16),
            "domain": ((size,), torch.int64),
            "volume": ((size,), torch.int64),
            "start": ((size, 3), torch.int64),
        }

    def plan(self, number: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Draw a batch without reading it: domain (B,), volume (B,), start (B, 3), all int64.

        Raises:
            IndexError: the number is negative.
        """
        if number < 0:
            raise IndexError(f"batch {number}: the number is negative")
        size, seed = self.batch_size, self.seed
        domain, rng = balanced_domains(len(self._count), size, seed, number)  # (B,)
        own, partner = domain[: size // 2], domain[: size // 2 - 1 : -1]  # (B/2,), views: rows i and B-1-i
        # No pair may have both its rows in a domain of one volume. Of two or more domains none fills more
        # than half the rows, so for such a pair there is always another pair without that domain; a swap with
        # it mends one pair and harms none.
        for pair in np.flatnonzero((own == partner) & (self._count[own] == 1)):
            single = own[pair]
            if partner[pair] != single:
                continue  # an earlier swap took one of its rows
            other = rng.choice(np.flatnonzero((own != single) & (partner != single)))
            partner[pair], own[other] = own[other], single

        rank_in_domain = (rng.random(size) * self._count[domain]).astype(np.int64)  # (B,)
        first, second = rank_in_domain[: size // 2], rank_in_domain[: size // 2 - 1 : -1]  # (B/2,), views
        same = own == partner  # (B/2,)
        # Within one domain the partner is drawn from the others: one choice less, and skip the own volume.
        others = (rng.random(size // 2) * (self._count[partner] - 1)).astype(np.int64)  # (B/2,)
        second[same] = (others + (others >= first))[same]

        volume = self._by_domain[self._first[domain] + rank_in_domain]  # (B,)
        start = (rng.random((size, 3)) * self._choices[volume]).astype(np.int64)  # (B, 3)
        return domain, volume, start

    def volumes(self, number: int) -> np.ndarray:
        """Draw the volumes (B,) of a batch without reading it."""
        return self.plan(number)[1]

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        domain, volume, start = self.plan(number)
        return {
            "latents": self.store.read_crops(volume.tolist(), start.tolist(), (self.crop_size,) * 3),
            "domain": from_numpy(domain),
            "volume": from_numpy(volume),
            "start": from_numpy(start),
        }


def sample_crops(
    store: LatentStore, index: int, starts: list[tuple[int, int, int]], crop_size: int
) -> Tensor:
    """Read crops of one volume at given corners: bfloat16 (len(starts), C, s, s, s)."""
    return store.read_crops([index] * len(starts), starts, (crop_size,) * 3)
