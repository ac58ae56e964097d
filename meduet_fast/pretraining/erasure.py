"""Linear erasure of the domain from content: an alternative to the adversary of the published method."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

MOMENTUM = 0.98  # of the running means: about 50 steps
# Steps watched before anything is erased: directions that are noise would only wear content down.
FIRST = 50


class DomainMeans(nn.Module):
    """Running means of every domain's pooled encodings, and the projection that makes content blind to them.

    No linear probe can tell domains from content whose domain means are equal. Content is linear in the
    encoding, so equal means take one orthogonal projection of its weight after every step, while an adversary
    that is trained beside the encoder has to keep up with it. The encoder itself is left alone: style needs
    what content must not have. Means are kept of mixed and of whole crops, whose encodings differ: training
    sees the former, everybody else the latter. Source: ours; the criterion is that of linear guardedness
    (Belrose et al. 2023, "LEACE").

    Args:
        num_domains: N.
        width: D of the encoding.
    """

    sums: Tensor
    shares: Tensor
    seen: Tensor

    def __init__(self, num_domains: int, width: int) -> None:
        super().__init__()
        self.register_buffer("sums", torch.zeros(2, num_domains, width))
        self.register_buffer("shares", torch.zeros(2, num_domains))
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))
        self._watched: list[Tensor] = []  # sums and shares of the batches since the last step

    @torch.no_grad()
    def watch(self, mixed: tuple[Tensor, Tensor], whole: tuple[Tensor, Tensor]) -> None:
        """Look at a batch: of mixed and of whole crops, pooled encodings (M, D) and domains (M,) int64."""
        found = []
        for pooled, domain in (mixed, whole):
            # In float64 they hardly depend on how a step's batches are shared out among processes.
            weights = nn.functional.one_hot(domain, self.shares.shape[1]).double() / len(domain)  # (M, N)
            sums = weights.T @ pooled.double()  # (N, D)
            found.append(torch.cat([sums, weights.sum(0)[:, None]], 1))  # (N, D+1)
        self._watched.append(torch.stack(found))

    @torch.no_grad()
    def step(self, *weights: Tensor) -> None:
        """Take in the batches that all processes watched, and erase, once a step.

        Args:
            weights: of content's projection (D, D, 1), whole or sharded by rows. Changed in place: all
                domains seen have the same mean content.
        """
        self._take_in()
        if self.seen < FIRST:
            return
        differences = []
        for sums, shares in zip(self.sums.double(), self.shares, strict=True):
            means = sums[shares > 0] / shares[shares > 0][:, None]  # (domains seen, D)
            differences.append(means[1:] - means[:1])
        directions = torch.linalg.qr(torch.cat(differences).T).Q  # (D, 2 domains - 2), orthonormal columns
        for weight in weights:
            # Rows are projected one by one: each process does its own.
            rows = weight.to_local() if isinstance(weight, DTensor) else weight
            flat = rows.flatten(1)
            flat -= (flat.double() @ directions) @ directions.T

    def _take_in(self) -> None:
        new = torch.stack(self._watched).mean(0)
        self._watched.clear()
        if dist.is_initialized():
            dist.all_reduce(new)
            new /= dist.get_world_size()
        self.seen += 1
        # A plain mean at first, so that the start does not count for more than its share.
        share = torch.clamp(1 / self.seen, min=1 - MOMENTUM)
        self.sums.lerp_(new[..., :-1].float(), share)
        self.shares.lerp_(new[..., -1].float(), share)
