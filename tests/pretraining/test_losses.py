"""The objective beyond parity: the right pairing, FLOPs, refusals, a slow and literal re-statement."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from meduet_fast.models import MeDUET, MeDUETConfig
from meduet_fast.pretraining import ObjectiveConfig, pretraining_losses, random_mix_mask, reference
from meduet_fast.pretraining.reference import reference_losses

SMALL = MeDUETConfig(
    latent_size=8, patch_size=2, embed_dim=24, depth=1, num_heads=2, decoder_embed_dim=12, decoder_depth=1,
    decoder_num_heads=2, num_domains=3,
)  # fmt: skip


@pytest.fixture
def batch() -> tuple[MeDUET, MeDUET, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    student, teacher = MeDUET(SMALL).double(), MeDUET(SMALL).double()
    latents = torch.randn(4, 4, 8, 8, 8, generator=generator, dtype=torch.float64)
    return student, teacher, latents, torch.tensor([0, 1, 2, 0]), random_mix_mask(4, 64, generator)


def test_equals_the_method_read_aloud(batch: tuple[MeDUET, MeDUET, Tensor, Tensor, Tensor]) -> None:
    """fp64, source pairing: every loss, and the gradient of everything but the reversed content head's."""
    student = batch[0]
    config = ObjectiveConfig(lambda_whole=0.7)
    losses, literal = pretraining_losses(*batch, config), reference_losses(*batch, config)
    assert losses.keys() == literal.keys()
    for name, loss in losses.items():
        assert loss.item() == pytest.approx(literal[name].item(), rel=1e-10), name
    names = [name for name, _ in student.named_parameters()]
    for term in ("reconstruction", "whole", "domain_style", "mftd", "siqc"):
        ours = torch.autograd.grad(
            losses[term], list(student.parameters()), retain_graph=True, allow_unused=True
        )
        theirs = torch.autograd.grad(
            literal[term], list(student.parameters()), retain_graph=True, allow_unused=True
        )
        for name, a, b in zip(names, ours, theirs, strict=True):
            a, b = (torch.zeros(()) if item is None else item for item in (a, b))
            assert torch.allclose(a, b, rtol=1e-7, atol=1e-9), (term, name)


def test_content_domain_gradient_is_reversed_before_the_head(
    batch: tuple[MeDUET, MeDUET, Tensor, Tensor, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reference, "reverse_gradient", lambda x: x)
    student = batch[0]
    ours, literal = pretraining_losses(*batch), reference_losses(*batch, ObjectiveConfig())
    head = student.domain_classifier.domain_classifier_c[0].weight
    body = student.disentangled_factorizer.proj_c.weight
    for parameter, sign in ((head, 1), (body, -1)):
        (a,) = torch.autograd.grad(ours["domain_content"], parameter, retain_graph=True)
        (b,) = torch.autograd.grad(literal["domain_content"], parameter, retain_graph=True)
        assert torch.allclose(a, sign * b, rtol=1e-7, atol=1e-12)


def test_source_pairing_supervises_exactly_the_hidden_tokens(
    batch: tuple[MeDUET, MeDUET, Tensor, Tensor, Tensor],
) -> None:
    from meduet_fast.kernels import dual_reconstruction_loss

    mask = batch[4]
    latents = batch[2]
    prediction = torch.zeros(8, 64, 32, dtype=torch.float64, requires_grad=True)
    dual_reconstruction_loss(prediction, latents, mask, 2).backward()
    assert prediction.grad is not None
    supervised = prediction.grad.abs().sum(-1) > 0
    assert torch.equal(supervised, torch.cat([mask, ~mask]))


@pytest.mark.parametrize("off", [("mftd",), ("siqc",), ("mftd", "siqc")])
def test_a_term_that_is_off_changes_no_other(
    batch: tuple[MeDUET, MeDUET, Tensor, Tensor, Tensor], off: tuple[str, ...]
) -> None:
    every = pretraining_losses(*batch)
    config = replace(ObjectiveConfig(), **dict.fromkeys(off, False))
    with FlopCounterMode(display=False) as counter:
        some = pretraining_losses(*batch, config)
    for name in ("reconstruction", "domain_content", "domain_style", "mftd", "siqc"):
        expected = 0 if name in off else every[name].item()
        assert some[name].item() == pytest.approx(expected, rel=1e-12), name
    some["total"].backward()
    with FlopCounterMode(display=False) as whole:
        pretraining_losses(*batch)
    assert counter.get_total_flops() < whole.get_total_flops()


def test_fixed_scale_gets_no_gradient(batch: tuple[MeDUET, MeDUET, Tensor, Tensor, Tensor]) -> None:
    student = batch[0]
    pretraining_losses(*batch, ObjectiveConfig(learn_siqc_scale=False))["total"].backward()
    assert student.siqc_log_scale.grad is None


@pytest.mark.parametrize(("mftd", "limit"), [(True, 797.2e9), (False, 536.2e9)])
def test_flops_per_sample_at_vit_base(mftd: bool, limit: float) -> None:
    """Linear layers only (mm, addmm, convolution), forward and backward, counted on shapes alone."""
    batch = 2
    with torch.device("meta"):
        student, teacher = MeDUET(), MeDUET()
        latents = torch.empty(batch, 4, 24, 24, 24)
        domain = torch.empty(batch, dtype=torch.int64)
        mask = torch.empty(batch, 216, dtype=torch.bool)
    with FlopCounterMode(display=False) as counter:
        losses = pretraining_losses(
            student, teacher, latents, domain, mask, ObjectiveConfig(mftd=mftd), check_values=False
        )
        losses["total"].backward()
    counts = {str(name): value for name, value in counter.get_flop_counts()["Global"].items()}
    linear = sum(value for name, value in counts.items() if any(key in name for key in ("mm", "convolution")))
    linear -= counts.get("aten.bmm", 0)  # attention's products on the meta device
    per_sample = linear / batch
    assert 0.9 * limit < per_sample <= limit
    assert per_sample == pytest.approx({True: 796.4e9, False: 535.5e9}[mftd], rel=1e-3)


def test_masks_are_exact_halves_and_reproducible() -> None:
    first, second = (random_mix_mask(6, 216, torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(first, second)
    assert first.dtype == torch.bool
    assert (first.sum(1) == 108).all()
    assert len({tuple(row.tolist()) for row in first}) == 6
    with pytest.raises(ValueError, match="num_tokens is 27"):
        random_mix_mask(2, 27)


def test_bad_input_is_refused_by_name(batch: tuple[MeDUET, MeDUET, Tensor, Tensor, Tensor]) -> None:
    student, teacher, latents, domain, mask = batch

    def losses(latents: Tensor = latents, domain: Tensor = domain, mask: Tensor = mask) -> None:
        pretraining_losses(student, teacher, latents, domain, mask)

    with pytest.raises(ValueError, match="batch is 3, expected a positive even number"):
        losses(latents[:3], domain[:3], mask[:3])
    with pytest.raises(ValueError, match="batch is 0"):
        losses(latents[:0], domain[:0], mask[:0])
    uneven = mask.clone()
    uneven[2] = False
    with pytest.raises(ValueError, match="mask row 2 has 0 ones of 64, expected exactly half"):
        losses(mask=uneven)
    with pytest.raises(ValueError, match="mask has values other than 0 and 1"):
        losses(mask=mask * 0.5)
    with pytest.raises(ValueError, match=r"mask has shape \(4, 63\), expected \(4, 64\)"):
        losses(mask=mask[:, :63])
    with pytest.raises(ValueError, match="domain has ids from 0 to 3, expected 0 to 2"):
        losses(domain=domain + torch.tensor([0, 0, 1, 0]))
    with pytest.raises(ValueError, match="domain has ids from -1 to"):
        losses(domain=domain - 1)
    with pytest.raises(ValueError, match=r"domain is torch\.float32 \(4,\), expected torch\.int64"):
        losses(domain=domain.float())
    with pytest.raises(ValueError, match=r"latents has shape \(4, 4, 8, 8, 6\)"):
        losses(latents[..., :6])
    with pytest.raises(ValueError, match="give 27 tokens, expected an even number"):
        replace(SMALL, latent_size=6)
