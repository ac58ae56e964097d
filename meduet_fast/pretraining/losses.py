"""MeDUET's pretraining losses, each pass done once. Source: MeDUET sections "Losses" and 6."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from meduet_fast.kernels import (
    MixIndex,
    at_least_float32,
    build_mix_index,
    check_mask,
    dual_reconstruction_loss,
    pooled_layer_norm,
    quadruplet_contrast,
)
from meduet_fast.kernels.reconstruction import Pairing
from meduet_fast.models import Factors, MeDUET

from .erasure import DomainMeans
from .gather_keys import gather_keys


@dataclass(frozen=True)
class ObjectiveConfig:
    """Weights and variants of the losses; the defaults are the published ones, but for the pairing.

    Attributes:
        lambda_domain: weight of both domain classification losses.
        lambda_mftd: weight of the mixed-factor token distillation.
        lambda_siqc: weight of the quadruplet contrast.
        lambda_content: weight of content against style within MFTD.
        mftd: whether MFTD is on; without it two encoder passes are saved.
        siqc: whether SiQC is on; without it no style is exchanged, which saves half of all decoding and
            re-encoding, and the teacher's passes on mixed crops.
        pairing: "source" supervises each reconstructed stream where it was hidden; "reference" reproduces
            the published code, see :func:`meduet_fast.kernels.dual_reconstruction_loss`.
        learn_siqc_scale: train the contrast's two scales; otherwise they stay as they are.
        global_negatives: contrast with the crops of all processes and not only (as published) with those of
            the same one.
        content_adversary: "reversal" is the published one, a classifier behind a gradient reversal. "erasure"
            projects the domain out of content instead, see :class:`~meduet_fast.pretraining.DomainMeans`; the
            classifier is then an onlooker. It is for short runs, in which the classifier cannot keep up with
            the encoder.
    """

    lambda_domain: float = 0.2
    lambda_mftd: float = 0.5
    lambda_siqc: float = 0.3
    lambda_content: float = 0.5
    mftd: bool = True
    siqc: bool = True
    pairing: Pairing = "source"
    learn_siqc_scale: bool = True
    global_negatives: bool = False
    content_adversary: Literal["reversal", "erasure"] = "reversal"


def random_mix_mask(
    batch: int, num_tokens: int, generator: torch.Generator | None = None, device: torch.device | str = "cpu"
) -> Tensor:
    """Random mixing masks: (B, L) bool with exactly L/2 ones in each row, made without a host sync.

    Raises:
        ValueError: for an odd number of tokens.
    """
    if num_tokens % 2:
        raise ValueError(f"num_tokens is {num_tokens}, expected an even number: half of the tokens are mixed")
    noise = torch.rand(batch, num_tokens, generator=generator, device=device)
    return noise.argsort(1).argsort(1) < num_tokens // 2


def _check_inputs(latents: Tensor, domain: Tensor, mask: Tensor, model: MeDUET, check_values: bool) -> None:
    batch = latents.shape[0]
    if batch == 0 or batch % 2:
        raise ValueError(f"batch is {batch}, expected a positive even number: sample i is paired with B-1-i")
    if mask.shape != (batch, model.config.num_tokens):
        raise ValueError(f"mask has shape {tuple(mask.shape)}, expected {(batch, model.config.num_tokens)}")
    if domain.shape != (batch,) or domain.dtype != torch.int64:
        raise ValueError(f"domain is {domain.dtype} {tuple(domain.shape)}, expected torch.int64 {(batch,)}")
    check_mask(mask, check_values)
    if check_values:
        low, high = int(domain.min()), int(domain.max())
        if low < 0 or high >= model.config.num_domains:
            raise ValueError(
                f"domain has ids from {low} to {high}, expected 0 to {model.config.num_domains - 1}"
            )


def _pool(x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Pooled LayerNorm and plain token mean, rows of source 1, then of source 2: (S*B, W)."""
    normed, mean = pooled_layer_norm(x, mask)
    return normed.flatten(0, 1), mean.flatten(0, 1)


class _Keys(NamedTuple):
    content: Tensor  # (4B, D)
    style: Tensor  # (4B, Ds)


@torch.no_grad()
def _teach(
    teacher: MeDUET, latents: Tensor, tables: MixIndex, config: ObjectiveConfig
) -> tuple[_Keys | None, Factors | None]:
    """The teacher: contrast keys from the complementary mask; factors of whole crops, MFTD's targets."""
    tables = tables.complement()
    batch = latents.shape[0]
    tokens = [teacher.embed(latents, tables.mask)] if config.siqc else []
    if config.mftd:
        tokens.append(teacher.embed(latents))
    if not tokens:
        return None, None
    encoded = teacher.encode(torch.cat(tokens))
    full = teacher.factorize(encoded[-batch:]) if config.mftd else None
    if not config.siqc:
        return None, full
    mixed = teacher.factorize(encoded[:batch], tables)
    swapped = teacher.decode(mixed, tables, straight=False)
    again = teacher.factorize(teacher.encode(teacher.embed_predicted(swapped)))
    content = torch.cat([_pool(mixed.content, tables.mask)[0], _pool(again.content)[0]])
    style = torch.cat([_pool(mixed.style, tables.mask)[0], _pool(again.style)[0]])
    return _Keys(content, style), full


def _distillation(student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    """Mean squared difference over the tokens that each stream had to fill in, both streams added.

    Args:
        student: (2B, L, W), stream 1 rows first.
        teacher: (B, L, W); stream 2 of row i shows sample B-1-i.
        mask: (B, L) bool.
    """
    target = at_least_float32(torch.cat([teacher, teacher.flip(0)]))
    error = (at_least_float32(student) - target).square().mean(-1)
    hidden = torch.cat([mask, ~mask]).to(error.dtype)
    first, second = (error * hidden).chunk(2)
    return (first.sum() + second.sum()) / (mask.shape[0] * mask.shape[1] // 2)


def pretraining_losses(
    student: MeDUET,
    teacher: MeDUET,
    latents: Tensor,
    domain: Tensor,
    mask: Tensor,
    config: ObjectiveConfig | None = None,
    check_values: bool = True,
    domain_means: DomainMeans | None = None,
) -> dict[str, Tensor]:
    """All losses of one batch.

    Args:
        student: gets gradients.
        teacher: the exponential moving average of the student; gets none.
        latents: (B, C, S, S, S) float, B even; sample i is mixed with sample B-1-i.
        domain: (B,) int64, data set of each sample.
        mask: (B, L) of 0 and 1, exactly L/2 ones a row; 1 = the partner's token.
        config: weights and variants.
        check_values: look at the values of mask and domain too, which waits for the device; shapes are
            always checked.
        domain_means: takes in this batch, if given, at the price of one more encoding without gradient.

    Returns:
        Scalars ``reconstruction, domain_content, domain_style, mftd, siqc, total``; only ``total`` is
        meant for backward. ``mftd`` and ``siqc`` are zero while they are off.

    Raises:
        ValueError: naming the argument that does not fit.
    """
    config = config or ObjectiveConfig()
    _check_inputs(latents, domain, mask, student, check_values)
    batch = latents.shape[0]
    tables = build_mix_index(mask)

    encoded = student.encode(student.embed(latents, tables.mask))
    mixed = student.factorize(encoded, tables)
    predicted = student.decode(mixed, tables, swapped=config.siqc)
    losses = {
        "reconstruction": dual_reconstruction_loss(
            predicted[: 2 * batch], latents, tables.mask, student.config.patch_size, config.pairing
        )
    }
    content, content_mean = _pool(mixed.content, tables.mask)
    style, style_mean = _pool(mixed.style, tables.mask)
    both_domains = torch.cat([domain, domain.flip(0)])
    if domain_means is not None:
        with torch.no_grad():
            whole = student.encode(student.embed(latents))
            mixed_means = _pool(encoded[:, 1:], tables.mask)[1]
            whole_means = _pool(whole[:, 1:])[1]
        domain_means.watch((mixed_means, both_domains), (whole_means, domain))
    if config.content_adversary == "erasure":
        content_mean = content_mean.detach()
    logits_content, logits_style = student.domain_classifier(content_mean, style_mean)
    losses["domain_content"] = F.cross_entropy(at_least_float32(logits_content), both_domains)
    losses["domain_style"] = F.cross_entropy(at_least_float32(logits_style), both_domains)

    keys, targets = _teach(teacher, latents, tables, config)
    losses["mftd"] = losses["siqc"] = losses["reconstruction"].new_zeros(())
    if config.mftd or config.siqc:
        looked_at = predicted if config.mftd else predicted[2 * batch :]
        again = student.factorize(student.encode(student.embed_predicted(looked_at)))
    if targets is not None:
        losses["mftd"] = config.lambda_content * _distillation(
            again.content[: 2 * batch], targets.content, tables.mask
        ) + _distillation(again.style[: 2 * batch], targets.style, tables.mask)
    if keys is not None:
        log_scale = student.siqc_log_scale if config.learn_siqc_scale else student.siqc_log_scale.detach()
        content = torch.cat([content, _pool(again.content[-2 * batch :])[0]])
        style = torch.cat([style, _pool(again.style[-2 * batch :])[0]])
        gather = gather_keys if config.global_negatives else lambda own: (own, 0)
        (content_keys, offset), (style_keys, _) = gather(keys.content), gather(keys.style)
        losses["siqc"] = quadruplet_contrast(
            content, content_keys, log_scale[0], "content", offset
        ) + quadruplet_contrast(style, style_keys, log_scale[1], "style", offset)

    losses["total"] = (
        losses["reconstruction"]
        + config.lambda_domain * (losses["domain_content"] + losses["domain_style"])
        + config.lambda_mftd * losses["mftd"]
        + config.lambda_siqc * losses["siqc"]
    )
    return losses
