"""The MeDUET network. Parameter names and shapes are those of the published checkpoints.

Source: MeDUET sections "Network" and "Mixing and demixing". Passes are split so that the objective can batch
passes of equal weights and decode nothing twice.

Shapes: B crops of C x S x S x S latents; L tokens, each a cubic patch of K = p^3 * C values; D the width of
encoder and content, Ds of style, E of the decoder.
"""

from __future__ import annotations

import json
import math
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from meduet_fast.errors import UserError
from meduet_fast.files import atomic_path
from meduet_fast.kernels import MixIndex, assemble_streams, style_convolution, unpatchify_3d
from meduet_fast.layers import PatchEmbed3d
from meduet_fast.weight_files import METADATA, Weights, misfit, plain_name, read_file, weight_file

from .blocks import Block, residual_stream, sincos_positions
from .config import MeDUETConfig, read_sizes, stated
from .published import find_published, read_published

PUBLISHED_TEMPERATURE = 0.07


class Factors(NamedTuple):
    """An encoding: CLS (B, 1, D), content (B, L, D) and style (B, L, Ds) of every token."""

    cls: Tensor
    content: Tensor
    style: Tensor

    def split(self, rows: int) -> tuple[Factors, Factors]:
        """Return the first ``rows`` sequences and the others."""
        return Factors(*(x[:rows] for x in self)), Factors(*(x[rows:] for x in self))


class Streams(NamedTuple):
    """Reconstructed sources, each alone, (n*B, L, p^3*C), in (px, py, pz, c) order.

    Attributes:
        tokens: all of them: straight source 1 and 2, then swapped source 1 and 2, as far as asked for.
        straight: those with their own styles, (2B, L, p^3*C); empty if not asked for.
        swapped: those with exchanged styles, (2B, L, p^3*C); empty if not asked for.
    """

    tokens: Tensor
    straight: Tensor
    swapped: Tensor


def reverse_gradient(x: Tensor) -> Tensor:
    """Return x; its gradient has the opposite sign (lambda 1)."""
    return 2 * x.detach() - x


class PatchEmbedding(nn.Module):
    """Hold the patch embedding under its published name; checkpoints have its positions in the model."""

    def __init__(self, config: MeDUETConfig) -> None:
        super().__init__()
        self.proj = PatchEmbed3d(config.in_channels, config.embed_dim, config.patch_size, num_prefix_tokens=1)


class Factorizer(nn.Module):
    """Project tokens on content and style, without bias; smooth style along its own source's sequence."""

    def __init__(self, config: MeDUETConfig) -> None:
        super().__init__()
        self.proj_c = nn.Conv1d(config.embed_dim, config.embed_dim, 1, bias=False)
        self.proj_s = nn.Conv1d(config.embed_dim, config.style_dim, 1, bias=False)
        self.smooth = nn.Conv1d(
            config.style_dim, config.style_dim, 3, padding=1, groups=config.style_dim, bias=False
        )

    def forward(self, tokens: Tensor, index: MixIndex | None) -> tuple[Tensor, Tensor]:
        content = F.linear(tokens, self.proj_c.weight.squeeze(-1))  # (B, L, D)
        style = F.linear(tokens, self.proj_s.weight.squeeze(-1))  # (B, L, Ds)
        style = style_convolution(style, self.smooth.weight, index)  # (B, L, Ds)
        return content, style


class Fusion(nn.Module):
    """Hold the map from [content | style] to a token; applied in :meth:`MeDUET.decode`."""

    def __init__(self, config: MeDUETConfig) -> None:
        super().__init__()
        self.proj = nn.Conv1d(config.embed_dim + config.style_dim, config.embed_dim, 1)


class DomainClassifiers(nn.Module):
    """Classify which data set a pooled factor comes from; content is behind a gradient reversal."""

    def __init__(self, config: MeDUETConfig) -> None:
        super().__init__()
        self.domain_classifier_c = self._head(config.embed_dim, config.num_domains)
        self.domain_classifier_s = self._head(config.style_dim, config.num_domains)

    @staticmethod
    def _head(dim: int, num_domains: int) -> nn.Sequential:
        return nn.Sequential(
            nn.Linear(dim, 2 * dim), nn.ReLU(), nn.Linear(2 * dim, 2 * dim), nn.ReLU(),
            nn.Linear(2 * dim, num_domains),
        )  # fmt: skip

    def forward(self, content: Tensor, style: Tensor) -> tuple[Tensor, Tensor]:
        logits_content = self.domain_classifier_c(reverse_gradient(content))  # (N, D) -> (N, domains)
        logits_style = self.domain_classifier_s(style)  # (N, Ds) -> (N, domains)
        return logits_content, logits_style


class MeDUET(nn.Module):
    """MeDUET's ViT: encoder, factors of content and style, decoder. Student and teacher are one each.

    ``model(latents)`` encodes unmixed crops: what downstream users need. The other methods are the passes of
    pretraining, see :func:`meduet_fast.pretraining.pretraining_losses`.
    """

    pos_embed: Tensor
    decoder_pos_embed: Tensor

    def __init__(self, config: MeDUETConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or MeDUETConfig()
        self.num_tokens = config.num_tokens
        dim, decoder_dim = config.embed_dim, config.decoder_embed_dim
        self.embed_layer = PatchEmbedding(config)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.register_buffer("pos_embed", torch.empty(1, 1 + self.num_tokens, dim))  # (1, 1+L, D)
        self.blocks = nn.ModuleList(
            Block(dim, config.num_heads, config.mlp_ratio, config.layer_norm_eps) for _ in range(config.depth)
        )
        self.norm = nn.LayerNorm(dim, eps=config.layer_norm_eps)
        self.disentangled_factorizer = Factorizer(config)
        self.latent_entanglement = Fusion(config)
        self.domain_classifier = DomainClassifiers(config)
        self.decoder_embed = nn.Linear(dim, decoder_dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, decoder_dim))
        self.register_buffer(
            "decoder_pos_embed", torch.empty(1, 1 + self.num_tokens, decoder_dim)
        )  # (1, 1+L, E)
        self.decoder_blocks = nn.ModuleList(
            Block(decoder_dim, config.decoder_num_heads, config.mlp_ratio, config.layer_norm_eps)
            for _ in range(config.decoder_depth)
        )
        self.decoder_norm = nn.LayerNorm(decoder_dim, eps=config.layer_norm_eps)
        self.decoder_pred = nn.Linear(decoder_dim, config.token_dim)
        # Log of the contrast's scale for content and style. The published loss module owned them and its
        # optimiser never saw them, so they are no part of a published checkpoint.
        self.siqc_log_scale = nn.Parameter(torch.empty(2))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw first values of all parameters, and compute positions; for memory that ``to_empty`` gave."""
        grid = self.config.latent_size // self.config.patch_size
        for table in (self.pos_embed, self.decoder_pos_embed):
            with torch.device("cpu"):  # whatever the default: "meta" would make no values
                table.copy_(sincos_positions(table.shape[2], grid))  # (1, 1+L, D or E)
        nn.init.constant_(self.siqc_log_scale, math.log(1 / PUBLISHED_TEMPERATURE))
        for module in self.modules():
            if isinstance(module, nn.LayerNorm):
                module.reset_parameters()
            if isinstance(module, nn.Linear | nn.Conv1d):
                nn.init.xavier_uniform_(module.weight.flatten(1))
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.embed_layer.proj.weight.flatten(1))
        nn.init.zeros_(self.embed_layer.proj.bias)  # type: ignore[arg-type]
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        nn.init.trunc_normal_(self.mask_token, std=0.02)

    def _with_cls(self, tokens: Tensor) -> Tensor:
        """Fill the row that the patch embedding left free, in place."""
        tokens[:, :1] = (self.cls_token + self.pos_embed[:, :1]).to(tokens.dtype)  # (1, 1, D)
        return tokens

    def embed(self, latents: Tensor, source_mask: Tensor | None = None) -> Tensor:
        """Embed crops (B, C, S, S, S) as tokens (B, 1+L, D), the partner's where the mask (B, L) is 1.

        Raises:
            ValueError: if the crop is not the configured size.
        """
        config = self.config
        if latents.dim() != 5 or latents.shape[1:] != (config.in_channels, *[config.latent_size] * 3):
            raise ValueError(
                f"latents has shape {tuple(latents.shape)}, "
                f"expected (B, {config.in_channels}, {', '.join([str(config.latent_size)] * 3)})"
            )
        tokens = self.embed_layer.proj(latents, source_mask, self.pos_embed[0, 1:])  # (B, 1+L, D)
        return self._with_cls(tokens)

    def embed_predicted(self, patches: Tensor) -> Tensor:
        """Embed predicted patches (B, L, K) as tokens (B, 1+L, D), as if their crop had been put together."""
        tokens = self.embed_layer.proj.embed_patches(patches, self.pos_embed[0, 1:])  # (B, 1+L, D)
        return self._with_cls(tokens)

    def encode(self, tokens: Tensor) -> Tensor:
        """Encode tokens (B, 1+L, D): blocks and the final LayerNorm."""
        x = residual_stream(tokens)  # (B, 1+L, D)
        for block in self.blocks:
            x = block(x)  # (B, 1+L, D)
        return self.norm(x)  # (B, 1+L, D)

    def factorize(self, encoded: Tensor, index: MixIndex | None = None) -> Factors:
        """Split an encoding (B, 1+L, D); ``index`` of the mask if it is a mixed one."""
        content, style = self.disentangled_factorizer(encoded[:, 1:], index)  # (B, L, D), (B, L, Ds)
        return Factors(encoded[:, :1], content, style)

    def decode(
        self, factors: Factors, index: MixIndex, straight: bool = True, swapped: bool = True
    ) -> Streams:
        """Reconstruct both sources of a mixed encoding, each alone, with own or exchanged styles."""
        content, style, cls = self._decoder_inputs(factors)
        x = assemble_streams(
            content, style, cls,
            self.mask_token.flatten(),  # (E,)
            self.decoder_pos_embed[0],  # (1+L, E)
            index, straight, swapped,
        )  # (n*B, 1+L, E)  # fmt: skip
        tokens = self._predict(x)  # (n*B, L, p^3*C)
        own = 2 * len(factors.cls) * straight
        return Streams(tokens, tokens[:own], tokens[own:])

    def reconstruct(self, factors: Factors) -> Tensor:
        """Put crops together from factors of all their tokens, with nothing hidden.

        The published losses train the decoder to fill in hidden tokens; a run with
        ``objective.lambda_whole`` trains it for this, too. Another style in ``factors`` changes the style
        of the crops.

        Args:
            factors: what :meth:`forward` returns, or content and style of different origins.

        Returns:
            Latents (B, C, S, S, S).
        """
        content, style, cls = self._decoder_inputs(factors)
        x = torch.cat([cls, content + style], 1) + self.decoder_pos_embed  # (B, 1+L, E)
        patch = self.config.patch_size
        edge = self.config.latent_size // patch
        return unpatchify_3d(self._predict(x), patch, (edge, edge, edge))  # (B, C, S, S, S)

    def _decoder_inputs(self, factors: Factors) -> tuple[Tensor, Tensor, Tensor]:
        """Return what content and style add to a decoder token, (B, L, E) each, and CLS (B, 1, E)."""
        # Fusion and decoder_embed are both linear: their product acts on each factor once, and a swap is a
        # choice between style parts.
        fusion, embed = self.latent_entanglement.proj, self.decoder_embed
        assert fusion.bias is not None
        weight = embed.weight @ fusion.weight.squeeze(-1)  # (E, D+Ds)
        bias = F.linear(fusion.bias, embed.weight, embed.bias)  # (E,)
        dim = self.config.embed_dim
        return (
            F.linear(factors.content, weight[:, :dim], bias),  # (B, L, E)
            F.linear(factors.style, weight[:, dim:]),  # (B, L, E)
            embed(factors.cls),  # (B, 1, E)
        )

    def _predict(self, x: Tensor) -> Tensor:
        """Run the decoder on sequences (N, 1+L, E): tokens (N, L, p^3*C)."""
        x = residual_stream(x)
        for block in self.decoder_blocks:
            x = block(x)  # (N, 1+L, E)
        return self.decoder_pred(self.decoder_norm(x)[:, 1:])

    def transformer_blocks(self) -> list[nn.Module]:
        """Return the blocks of encoder and decoder: nearly all of a pass's work."""
        return [*self.blocks, *self.decoder_blocks]

    def forward(self, latents: Tensor) -> Factors:
        """Encode unmixed crops (B, C, S, S, S): CLS, content and style of every token."""
        tokens = self.embed(latents)  # (B, 1+L, D)
        return self.factorize(self.encode(tokens))

    @classmethod
    def from_reference(
        cls,
        source: Mapping[str, Any] | Path | str,
        config: MeDUETConfig | None = None,
        *,
        num_heads: int | None = None,
        decoder_num_heads: int | None = None,
    ) -> MeDUET:
        """Load a published checkpoint, or anything else with the published names.

        Args:
            source: a state dict, perhaps wrapped as training programs do, see
                :func:`~meduet_fast.weight_files.find_weights`; or the path of a file with one, see
                :func:`~meduet_fast.weight_files.read_file`; or a folder's with it as ``model.safetensors``.
            config: sizes; read off the weights if None. What leaves no trace there, heads and the LayerNorms'
                epsilon, is taken from what stands beside them (an entry such as ``config`` or ``args``,
                metadata of safetensors, ``config.json`` beside the file); if nothing does, blocks of the
                published widths 768 and 384 have the published 12 heads.
            num_heads: of the encoder, where nothing says; no ``config`` beside it.
            decoder_num_heads: of the decoder, where nothing says; no ``config`` beside it.

        Raises:
            ValueError: naming missing, unexpected, wrongly shaped or non-finite weights, or heads that are
                not certain or contradict each other; if both ``config`` and heads are given.
            UserError: the same of a file, named.
        """
        if config is not None and (num_heads, decoder_num_heads) != (None, None):
            raise ValueError("config says the heads: expected no num_heads= or decoder_num_heads= beside it")
        if isinstance(source, Mapping):
            return cls._from_weights(find_published(source), config, num_heads, decoder_num_heads)
        file, weights = read_published(Path(source))
        try:
            return cls._from_weights(weights, config, num_heads, decoder_num_heads)
        except ValueError as error:
            raise UserError(f"{file}: {error}") from error

    @classmethod
    def _from_weights(
        cls,
        weights: Weights,
        config: MeDUETConfig | None,
        num_heads: int | None,
        decoder_num_heads: int | None,
    ) -> MeDUET:
        try:
            if config is None:
                config = MeDUETConfig.from_state_dict(
                    weights.tensors, weights.beside, num_heads, decoder_num_heads
                )
            else:
                config.check_stated(stated(weights.beside, read_sizes(weights.tensors)))
            model = cls(config)
            state = {"siqc_log_scale": model.siqc_log_scale.detach(), **weights.tensors}
            if problems := misfit(state, model.state_dict()):
                raise ValueError(f"not this model's reference state dict: {problems}")
        except ValueError as error:
            raise ValueError(f"{error}{weights.described()}") from error
        model.load_state_dict(state)
        return model

    def to_reference(self) -> dict[str, Tensor]:
        """Return the state dict with the published names, shapes and values.

        The sizes, heads among them, are where PyTorch's state dicts have their modules' versions: they go
        along through ``torch.save``, and nobody else is bothered by them.
        """
        own: Any = self.state_dict()
        state: Any = OrderedDict((plain_name(key), value) for key, value in own.items())
        del state["siqc_log_scale"]
        state._metadata = own._metadata
        state._metadata[""]["meduet_config"] = asdict(self.config)
        return state

    def save_pretrained(self, path: Path | str) -> None:
        """Write one safetensors file: weights, and the sizes in its metadata. Atomic.

        Raises:
            OSError: if it cannot be written.
        """
        from safetensors.torch import save_file  # here, so that a network needs torch alone

        metadata = {"format": "pt", "meduet_config": json.dumps(asdict(self.config))}
        tensors = {
            plain_name(key): value.detach().cpu().contiguous() for key, value in self.state_dict().items()
        }
        with atomic_path(path) as temporary:
            save_file(tensors, temporary, metadata)

    @classmethod
    def from_pretrained(cls, path: Path | str) -> MeDUET:
        """Load what :meth:`save_pretrained` wrote, onto the CPU.

        Args:
            path: the file, or a folder with it as ``model.safetensors``.

        Raises:
            UserError: naming the file, if it is absent, damaged or not a MeDUET model.
        """
        file = weight_file(Path(path))
        content = dict(read_file(file))
        metadata = content.pop(METADATA, None)
        sizes = metadata.get("meduet_config") if isinstance(metadata, Mapping) else None
        if not isinstance(sizes, dict):
            raise UserError(
                f"{file}: not a MeDUET model: no 'meduet_config' in its metadata; weights with the published "
                "names are read by MeDUET.from_reference"
            )
        try:
            model, tensors = cls(MeDUETConfig(**sizes)), find_published(content).tensors
            if problems := misfit(tensors, model.state_dict()):
                raise ValueError(problems)
        except (ValueError, TypeError, RuntimeError) as error:
            raise UserError(f"{file}: not a readable MeDUET model: {error}") from error
        model.load_state_dict(tensors)
        return model
