"""MeDUET's pretraining losses, each pass done once. Source: MeDUET sections "Losses" and 6.

:func:`pretraining_losses` reads in the paper's order; below it stands one function per loss. The plain
method, every pass as published, is ``reference.py``. Shapes: B crops of C x S x S x S latents, L tokens of
width D (content) and Ds (style), patches of p; rows of source 1 come first, then those of source 2.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from meduet_fast.kernels import (
    MixIndex,
    at_least_float32,
    build_mix_index,
    dual_reconstruction_loss,
    pooled_layer_norm,
    quadruplet_contrast,
)
from meduet_fast.kernels.reconstruction import Pairing
from meduet_fast.models import Factors, MeDUET
from meduet_fast.settings import FROM_0, check_numbers

from .erasure import DomainMeans
from .gather_keys import gather_keys

LOSSES = ("reconstruction", "domain_content", "domain_style", "mftd", "siqc", "total")


@dataclass(frozen=True)
class ObjectiveConfig:
    """Weights and variants of the losses; the defaults are the published ones, but for the pairing.

    Attributes:
        lambda_whole: weight of reconstructing whole crops, unmixed and with nothing hidden, from their own
            factors: what :meth:`~meduet_fast.models.MeDUET.reconstruct` needs, and with it a change of style.
            The published losses have no such term (0); it costs an encoding and half a decoding.
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

    lambda_whole: float = 0.0
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

    def __post_init__(self) -> None:
        check_numbers(
            self, FROM_0, "lambda_whole", "lambda_domain", "lambda_mftd", "lambda_siqc", "lambda_content"
        )


PUBLISHED = ObjectiveConfig()  # made here: torch.compile can't trace the checks of a configuration


def _check_inputs(latents: Tensor, domain: Tensor, mask: Tensor, model: MeDUET, check_values: bool) -> None:
    batch = latents.shape[0]
    if batch == 0 or batch % 2:
        raise ValueError(f"batch is {batch}, expected a positive even number: sample i is paired with B-1-i")
    if mask.shape != (batch, model.num_tokens):
        raise ValueError(f"mask has shape {tuple(mask.shape)}, expected {(batch, model.num_tokens)}")
    if domain.shape != (batch,) or domain.dtype != torch.int64:
        raise ValueError(f"domain is {domain.dtype} {tuple(domain.shape)}, expected torch.int64 {(batch,)}")
    if check_values:
        low, high = int(domain.min()), int(domain.max())
        if low < 0 or high >= model.config.num_domains:
            raise ValueError(
                f"domain has ids from {low} to {high}, expected 0 to {model.config.num_domains - 1}"
            )


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
    """Compute all losses of one batch.

    Args:
        student: gets gradients.
        teacher: the exponential moving average of the student; gets none.
        latents: (B, C, S, S, S) float, B even; sample i is mixed with sample B-1-i.
        domain: (B,) int64, data set of each sample.
        mask: (B, L) of 0 and 1, exactly L/2 ones a row; 1 = the partner's token.
        config: weights and variants.
        check_values: look at the values of mask and domain too, which waits for the device; shapes are
            always checked.
        domain_means: takes in this batch, if given, at the price of one more encoding without gradient, which
            ``whole`` does anyway.

    Returns:
        Scalars by name, in the order of :data:`LOSSES`; only ``total`` is meant for backward. ``mftd`` and
        ``siqc`` are zero while they are off. If it has a weight, ``whole`` stands behind ``reconstruction``.

    Raises:
        ValueError: naming the argument that does not fit.
    """
    config = config or PUBLISHED
    _check_inputs(latents, domain, mask, student, check_values)
    index = build_mix_index(mask, check_values)
    domains = torch.cat([domain, domain.flip(0)])  # (2B,)

    encoded = student.encode(student.embed(latents, index.mask))  # (B, 1+L, D)
    mixed = student.factorize(encoded, index)  # content (B, L, D), style (B, L, Ds)
    predicted = student.decode(mixed, index, swapped=config.siqc)  # straight and swapped (2B, L, p^3 C)
    content, content_mean = pool(mixed.content, index.mask)  # (2B, D), (2B, D)
    style, style_mean = pool(mixed.style, index.mask)  # (2B, Ds), (2B, Ds)
    if config.lambda_whole or domain_means is not None:
        with torch.set_grad_enabled(config.lambda_whole > 0 and torch.is_grad_enabled()):
            encoded_whole = student.encode(student.embed(latents))  # (B, 1+L, D)
    if domain_means is not None:
        watch_domains(domain_means, encoded, encoded_whole, domain, index)

    losses = {
        "reconstruction": dual_reconstruction_loss(
            predicted.straight, latents, index.mask, student.config.patch_size, config.pairing
        )
    }
    if config.lambda_whole:
        losses["whole"] = whole_loss(student, student.factorize(encoded_whole), latents)
    if config.content_adversary == "erasure":
        content_mean = content_mean.detach()
    logits_content, logits_style = student.domain_classifier(content_mean, style_mean)  # (2B, domains)
    losses["domain_content"] = domain_loss(logits_content, domains)
    losses["domain_style"] = domain_loss(logits_style, domains)
    losses["mftd"] = losses["siqc"] = losses["reconstruction"].new_zeros(())

    keys, targets = teach(teacher, latents, index, config)
    if keys is not None or targets is not None:
        tokens = predicted.tokens if config.mftd else predicted.swapped  # (4B or 2B, L, p^3 C)
        again = student.factorize(student.encode(student.embed_predicted(tokens)))  # of every stream
        straight, swapped = again.split(2 * len(latents) * config.mftd)
    if targets is not None:
        losses["mftd"] = mftd_loss(straight, targets, index.mask, config.lambda_content)
    if keys is not None:
        queries = (
            torch.cat([content, pool(swapped.content)[0]]),  # (4B, D)
            torch.cat([style, pool(swapped.style)[0]]),  # (4B, Ds)
        )
        log_scale = student.siqc_log_scale if config.learn_siqc_scale else student.siqc_log_scale.detach()
        losses["siqc"] = siqc_loss(queries, keys, log_scale, config.global_negatives)

    losses["total"] = (
        losses["reconstruction"]
        + config.lambda_domain * (losses["domain_content"] + losses["domain_style"])
        + config.lambda_mftd * losses["mftd"]
        + config.lambda_siqc * losses["siqc"]
    )
    if config.lambda_whole:
        losses["total"] = losses["total"] + config.lambda_whole * losses["whole"]
    return losses


def pool(x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return means of tokens' LayerNorm and of tokens (B, L, W): (2B, W) by source, (B, W) without a mask."""
    normed, mean = pooled_layer_norm(x, mask)  # (1 or 2, B, W)
    return normed.flatten(0, 1), mean.flatten(0, 1)


@torch.no_grad()
def watch_domains(
    means: DomainMeans, encoded: Tensor, encoded_whole: Tensor, domain: Tensor, index: MixIndex
) -> None:
    """Show encodings (B, 1+L, D) of mixed and of whole crops, with their domains, to the erasure."""
    of_mixed = pool(encoded[:, 1:], index.mask)[1]  # (2B, D)
    of_whole = pool(encoded_whole[:, 1:])[1]  # (B, D)
    means.watch((of_mixed, torch.cat([domain, domain.flip(0)])), (of_whole, domain))


@torch.no_grad()
def teach(
    teacher: MeDUET, latents: Tensor, index: MixIndex, config: ObjectiveConfig
) -> tuple[tuple[Tensor, Tensor] | None, Factors | None]:
    """Run the teacher, on the complementary mask.

    Returns:
        SiQC's keys, content (4B, D) and style (4B, Ds); MFTD's targets, the factors of whole crops. None for
        a loss that is off.
    """
    if not (config.mftd or config.siqc):
        return None, None
    index, batch = index.complement(), len(latents)
    tokens = [teacher.embed(latents, index.mask)] if config.siqc else []  # (B, 1+L, D)
    if config.mftd:
        tokens.append(teacher.embed(latents))  # (B, 1+L, D)
    encoded = teacher.encode(torch.cat(tokens))  # one pass of both: (2B, 1+L, D)
    targets = teacher.factorize(encoded[-batch:]) if config.mftd else None
    if not config.siqc:
        return None, targets
    mixed = teacher.factorize(encoded[:batch], index)
    swapped = teacher.decode(mixed, index, straight=False).swapped  # (2B, L, p^3 C)
    again = teacher.factorize(teacher.encode(teacher.embed_predicted(swapped)))  # (2B, L, D or Ds)
    content = torch.cat([pool(mixed.content, index.mask)[0], pool(again.content)[0]])  # (4B, D)
    style = torch.cat([pool(mixed.style, index.mask)[0], pool(again.style)[0]])  # (4B, Ds)
    return (content, style), targets


def whole_loss(student: MeDUET, factors: Factors, latents: Tensor) -> Tensor:
    """Compute the mean squared error of crops (B, C, S, S, S) put together from all their factors."""
    return F.mse_loss(at_least_float32(student.reconstruct(factors)), at_least_float32(latents))


def domain_loss(logits: Tensor, domains: Tensor) -> Tensor:
    """Compute the cross entropy of the domains (2B,) given logits (2B, domains)."""
    return F.cross_entropy(at_least_float32(logits), domains)


def mftd_loss(student: Factors, teacher: Factors, mask: Tensor, lambda_content: float) -> Tensor:
    """Compute the mixed-factor token distillation: lambda_c * d(content) + d(style).

    d is the squared difference of a token's factor, mean over its width and over the tokens that a stream had
    to fill in, both streams added.

    Args:
        student: factors of the straight streams, (2B, L, W).
        teacher: factors of whole crops, (B, L, W); stream 2 of row i shows sample B-1-i.
        mask: (B, L) bool, hidden in stream 1; stream 2 lacks the others.
        lambda_content: weight of content against style.
    """
    hidden = torch.cat([mask, ~mask])  # (2B, L)

    def distance(found: Tensor, whole: Tensor) -> Tensor:
        target = at_least_float32(torch.cat([whole, whole.flip(0)]))  # (2B, L, W)
        error = (at_least_float32(found) - target).square().mean(-1)  # (2B, L)
        first, second = (error * hidden.to(error.dtype)).chunk(2)  # (B, L) each
        return (first.sum() + second.sum()) / (mask.shape[0] * mask.shape[1] // 2)

    return lambda_content * distance(student.content, teacher.content) + distance(
        student.style, teacher.style
    )


def siqc_loss(
    queries: tuple[Tensor, Tensor], keys: tuple[Tensor, Tensor], log_scale: Tensor, global_negatives: bool
) -> Tensor:
    """Compute the quadruplet contrast of content and of style, added.

    Args:
        queries: of the student, content (4B, D) and style (4B, Ds): mixed sources 1 and 2, swapped 1 and 2.
        keys: of the teacher, alike, without gradient.
        log_scale: (2,), of content and of style.
        global_negatives: contrast with the keys of all processes.
    """
    gather = gather_keys if global_negatives else lambda own: (own, 0)
    (content_keys, offset), (style_keys, _) = gather(keys[0]), gather(keys[1])
    content = quadruplet_contrast(queries[0], content_keys, log_scale[0], "content", offset)
    return content + quadruplet_contrast(queries[1], style_keys, log_scale[1], "style", offset)
