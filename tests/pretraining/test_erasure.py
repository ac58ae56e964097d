"""Erasure: content's domain means become equal, nothing else is taken away."""

from __future__ import annotations

import torch

from meduet_fast.pretraining import DomainMeans
from meduet_fast.pretraining.erasure import FIRST


def _watched(steps: int) -> tuple[DomainMeans, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(3, 2, 12, generator=generator)  # of mixed and of whole crops
    means = DomainMeans(5, 12)  # two of the five domains never appear
    domain = torch.arange(30) % 3
    for number in range(steps):
        if number:
            means.step()
        noise = torch.randn(10, 12, generator=generator).repeat_interleave(3, 0)  # the same for all domains
        means.watch((centres[domain, 0] + noise, domain), (centres[domain, 1] + noise, domain))
    return means, centres


def test_all_domains_seen_get_the_same_content() -> None:
    means, centres = _watched(FIRST)
    weight = torch.randn(12, 12, 1, generator=torch.Generator().manual_seed(1))
    before = weight.clone()
    means.step(weight)
    content = centres @ weight.squeeze(-1).T
    torch.testing.assert_close(content, content[:1].expand(3, -1, -1), atol=1e-4, rtol=0)
    # Two directions of each kind went, all that is orthogonal to them stays as it was.
    assert torch.linalg.matrix_rank((before - weight).squeeze(-1), rtol=1e-4) == 4
    other = torch.linalg.svd((centres[1:] - centres[:1]).flatten(0, 1)).Vh[4:]
    torch.testing.assert_close(other @ weight.squeeze(-1).T, other @ before.squeeze(-1).T, atol=1e-4, rtol=0)


def test_nothing_is_erased_before_the_means_are_known() -> None:
    means, _ = _watched(FIRST - 1)
    weight = torch.randn(12, 12, 1)
    before = weight.clone()
    means.step(weight)
    assert torch.equal(weight, before)


def test_batches_of_a_step_count_as_one() -> None:
    """A step in two batches, or in two processes, is that of both together."""
    generator = torch.Generator().manual_seed(0)
    whole, parts = DomainMeans(3, 12), DomainMeans(3, 12)
    for _ in range(3):
        pooled, domain = (
            torch.randn(2, 8, 12, generator=generator) + 1000,
            torch.randint(3, (8,), generator=generator),
        )
        whole.watch((pooled[0], domain), (pooled[1], domain))
        for part in (slice(4), slice(4, 8)):
            parts.watch((pooled[0, part], domain[part]), (pooled[1, part], domain[part]))
        whole.step()
        parts.step()
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(parts.state_dict()[name], value, rtol=1.2e-7, atol=0)  # a rounding


def test_old_batches_fade() -> None:
    means, centres = _watched(FIRST)
    moved = centres + 10
    domain = torch.arange(30) % 3
    for _ in range(400):
        means.watch((moved[domain, 0], domain), (moved[domain, 1], domain))
        means.step()
    found = means.sums[:, :3] / means.shares[:, :3, None]
    torch.testing.assert_close(found, moved.transpose(0, 1), atol=0.05, rtol=0)


def test_autocast_does_not_round_the_means() -> None:
    """Differences of domains, which are erased, may be small beside what all of them share."""
    plain, _ = _watched(3)
    with torch.autocast("cpu", torch.bfloat16):
        narrow, _ = _watched(3)
    assert torch.equal(narrow.sums, plain.sums)
