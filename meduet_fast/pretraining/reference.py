"""The plain method, every pass done as published: what :mod:`.losses` is held to. Slow, and readable.

Tokens are compacted by source, each pass is done alone, predicted volumes are put together and cut into
patches again; nothing is shared and nothing fused. Weights are held by :class:`meduet_fast.models.MeDUET`,
whose names are the published ones; of its code only the transformer blocks are used. Source: MeDUET sections
"Mixing and demixing" and "Losses".
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from meduet_fast.kernels import at_least_float32, unpatchify_3d
from meduet_fast.kernels.contrast import IDENTITIES, quadruplet_contrast_reference
from meduet_fast.kernels.reconstruction import dual_reconstruction_loss_reference
from meduet_fast.models import MeDUET
from meduet_fast.models.meduet import reverse_gradient

from .losses import ObjectiveConfig

Pair = tuple[Tensor, Tensor]


class Mixed(NamedTuple):
    """A demixed encoding: CLS (B, 1, D), content and style of source 1 and of source 2, (B, L/2, D or Ds)."""

    cls: Tensor
    content: Pair
    style: Pair


def compact(tokens: Tensor, mask: Tensor) -> Tensor:
    """Take the tokens (B, L, D) where the mask is set, in their order: (B, L/2, D). Waits for the device."""
    return tokens.masked_select(mask.unsqueeze(-1)).view(len(tokens), -1, tokens.shape[-1])


def _embed(model: MeDUET, latents: Tensor) -> Tensor:
    proj = model.embed_layer.proj
    tokens = F.conv3d(latents, proj.weight, proj.bias, stride=model.config.patch_size)  # (B, D, g, g, g)
    return tokens.flatten(2).transpose(1, 2) + model.pos_embed[:, 1:]  # (B, L, D)


def _encode(model: MeDUET, tokens: Tensor) -> Tensor:
    cls = (model.cls_token + model.pos_embed[:, :1]).expand(len(tokens), -1, -1)
    return model.encode(torch.cat([cls.to(tokens.dtype), tokens], 1))


def _factorize(model: MeDUET, tokens: Tensor) -> Pair:
    """Compute content and style of a sequence of tokens."""
    parts, channels_first = model.disentangled_factorizer, tokens.transpose(1, 2)
    content, style = parts.proj_c(channels_first), parts.smooth(parts.proj_s(channels_first))
    return content.transpose(1, 2), style.transpose(1, 2)


def encode_mixed(model: MeDUET, latents: Tensor, mask: Tensor) -> Mixed:
    """Mix by the mask, encode, take the sources apart and factorize each."""
    tokens = _embed(model, latents)  # (B, L, D)
    encoded = _encode(model, torch.where(mask.unsqueeze(-1), tokens.flip(0), tokens))  # (B, 1+L, D)
    content_1, style_1 = _factorize(model, compact(encoded[:, 1:], ~mask))  # (B, L/2, D or Ds)
    content_2, style_2 = _factorize(model, compact(encoded[:, 1:], mask))  # (B, L/2, D or Ds)
    return Mixed(encoded[:, :1], (content_1, content_2), (style_1, style_2))


def encode_full(model: MeDUET, latents: Tensor) -> Pair:
    """Compute content and style of unmixed crops."""
    return _factorize(model, _encode(model, _embed(model, latents))[:, 1:])


def reconstruct(model: MeDUET, cls: Tensor, content: Pair, style: Pair, mask: Tensor) -> Tensor:
    """Reconstruct both sources, each alone: (2B, L, p^3*C), source 1 first."""
    fuse, parts = model.latent_entanglement.proj, zip(content, style, strict=True)
    fused = [fuse(torch.cat(part, -1).transpose(1, 2)).transpose(1, 2) for part in parts]
    second = mask.unsqueeze(-1)
    tokens = fused[0].new_zeros(*mask.shape, fused[0].shape[-1])  # (B, L, D)
    tokens = tokens.masked_scatter(~second, fused[0]).masked_scatter(second, fused[1])
    embedded = model.decoder_embed(torch.cat([cls.to(tokens.dtype), tokens], 1))  # (B, 1+L, Dd)
    hidden = model.mask_token.to(embedded.dtype)
    first_stream = torch.where(second, hidden, embedded[:, 1:])
    second_stream = torch.where(second, embedded[:, 1:], hidden)
    x = torch.cat([torch.cat([embedded[:, :1], stream], 1) for stream in (first_stream, second_stream)])
    x = x + model.decoder_pos_embed  # (2B, 1+L, Dd)
    for block in model.decoder_blocks:
        x = block(x)
    return model.decoder_pred(model.decoder_norm(x))[:, 1:]


def reconstruct_whole(model: MeDUET, latents: Tensor) -> Tensor:
    """Encode unmixed crops and put them together again, with nothing hidden."""
    encoded = _encode(model, _embed(model, latents))  # (B, 1+L, D)
    factors = torch.cat(_factorize(model, encoded[:, 1:]), -1)  # (B, L, D+Ds)
    fused = model.latent_entanglement.proj(factors.transpose(1, 2)).transpose(1, 2)  # (B, L, D)
    x = model.decoder_embed(torch.cat([encoded[:, :1], fused], 1)) + model.decoder_pos_embed
    for block in model.decoder_blocks:
        x = block(x)
    return _volume(model, model.decoder_pred(model.decoder_norm(x))[:, 1:])


def _volume(model: MeDUET, tokens: Tensor) -> Tensor:
    edge = model.config.latent_size // model.config.patch_size
    return unpatchify_3d(tokens, model.config.patch_size, (edge, edge, edge))


def _pool(x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:]).mean(1)


def _quadruplet(model: MeDUET, mixed: Mixed, mask: Tensor) -> Pair:
    """Compute the rows of the contrast for content and style, (4B, D) and (4B, Ds)."""
    swapped = reconstruct(model, mixed.cls, mixed.content, (mixed.style[1], mixed.style[0]), mask)
    content, style = encode_full(model, _volume(model, swapped))
    return (
        torch.cat([_pool(mixed.content[0]), _pool(mixed.content[1]), _pool(content)]),
        torch.cat([_pool(mixed.style[0]), _pool(mixed.style[1]), _pool(style)]),
    )


def _distillation(student: Tensor, teacher: Tensor, flipped: Tensor, mask: Tensor) -> Tensor:
    """Compute the mean squared difference where a stream had to fill in, both streams added."""
    total = student.new_zeros((), dtype=torch.float32)
    for half, target, hidden in zip(student.chunk(2), (teacher, flipped), (mask, ~mask), strict=True):
        error = (at_least_float32(half) - at_least_float32(target)).square().mean(-1)
        total = total + (error * hidden).sum() / hidden.sum()
    return total


def reference_losses(
    student: MeDUET,
    teacher: MeDUET,
    latents: Tensor,
    domain: Tensor,
    mask: Tensor,
    config: ObjectiveConfig,
) -> dict[str, Tensor]:
    """Compute all losses of one batch; arguments and result are those of :func:`.losses.pretraining_losses`.

    The published code's losses are those of ``ObjectiveConfig(pairing="reference")``.
    """
    mixed = encode_mixed(student, latents, mask)
    straight = reconstruct(student, mixed.cls, mixed.content, mixed.style, mask)  # (2B, L, p^3 C)
    patch = student.config.patch_size
    losses = {
        "reconstruction": dual_reconstruction_loss_reference(straight, latents, mask, patch, config.pairing)
    }
    if config.lambda_whole:
        losses["whole"] = F.mse_loss(reconstruct_whole(student, latents), latents)
    heads, domains = student.domain_classifier, (domain, domain.flip(0))
    for name, pooled, head in (
        ("content", [reverse_gradient(half.mean(1)) for half in mixed.content], heads.domain_classifier_c),
        ("style", [half.mean(1) for half in mixed.style], heads.domain_classifier_s),
    ):
        terms = [F.cross_entropy(head(x), label) for x, label in zip(pooled, domains, strict=True)]
        losses[f"domain_{name}"] = (terms[0] + terms[1]) / 2

    losses["mftd"] = losses["reconstruction"].new_zeros(())
    if config.mftd:
        again = reconstruct(student, mixed.cls, mixed.content, mixed.style, mask)
        factors = encode_full(student, _volume(student, again))
        with torch.no_grad():
            targets, flipped = encode_full(teacher, latents), encode_full(teacher, latents.flip(0))
        content, style = (
            _distillation(*items, mask) for items in zip(factors, targets, flipped, strict=True)
        )
        losses["mftd"] = config.lambda_content * content + style

    queries = _quadruplet(student, mixed, mask)
    with torch.no_grad():
        keys = _quadruplet(teacher, encode_mixed(teacher, latents, ~mask), ~mask)
    content, style = (
        quadruplet_contrast_reference(query, key, scale, identity)
        for query, key, scale, identity in zip(queries, keys, student.siqc_log_scale, IDENTITIES, strict=True)
    )
    losses["siqc"] = content + style
    losses["total"] = (
        losses["reconstruction"]
        + config.lambda_domain * (losses["domain_content"] + losses["domain_style"])
        + config.lambda_mftd * losses["mftd"]
        + config.lambda_siqc * losses["siqc"]
    )
    if config.lambda_whole:
        losses["total"] = losses["total"] + config.lambda_whole * losses["whole"]
    return losses
