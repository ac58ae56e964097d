"""Linear erasure of the domain from content: an alternative to the adversary of the published method."""

from __future__ import annotations

import torch
from torch import Tensor, nn

MOMENTUM = 0.98  # of the running means: about 50 batches
# Batches watched before anything is erased: directions that are noise would only wear content down.
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

    @torch.no_grad()
    def watch(self, mixed: tuple[Tensor, Tensor], whole: tuple[Tensor, Tensor]) -> None:
        """Take in a batch: of mixed and of whole crops, pooled encodings (M, D) and domains (M,) int64."""
        self.seen += 1
        # A plain mean at first, so that the start does not count for more than its share.
        new = torch.clamp(1 / self.seen, min=1 - MOMENTUM)
        for sums, shares, (pooled, domain) in zip(self.sums, self.shares, (mixed, whole), strict=True):
            weights = nn.functional.one_hot(domain, len(shares)).to(sums.dtype) / len(domain)
            sums.lerp_(weights.T @ pooled.to(sums.dtype), new)
            shares.lerp_(weights.sum(0), new)

    @torch.no_grad()
    def erase_from(self, *weights: Tensor) -> None:
        """Project content's weights (D, D, 1) in place: then all domains seen have the same mean content."""
        if self.seen < FIRST:
            return
        differences = []
        for sums, shares in zip(self.sums, self.shares, strict=True):
            means = sums[shares > 0] / shares[shares > 0][:, None]
            differences.append(means[1:] - means[:1])
        directions = torch.linalg.qr(torch.cat(differences).T).Q  # orthonormal columns
        for weight in weights:
            flat = weight.flatten(1)
            flat -= (flat @ directions) @ directions.T
