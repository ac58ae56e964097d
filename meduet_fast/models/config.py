"""Hold the sizes of the network, and check that they fit together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from meduet_fast.settings import POSITIVE, check_numbers


@dataclass(frozen=True)
class MeDUETConfig:
    """Sizes of the network; the defaults are the published ViT-B (MeDUET section "Network").

    Attributes:
        latent_size: edge of the cubic latent crop, in latent voxels.
        patch_size: edge of a cubic patch, in latent voxels.
        in_channels: channels of the latent.
        embed_dim: width of the encoder and of the content factor.
        depth: encoder blocks.
        num_heads: attention heads of the encoder.
        decoder_embed_dim: width of the decoder.
        decoder_depth: decoder blocks.
        decoder_num_heads: attention heads of the decoder.
        mlp_ratio: hidden width of an MLP over the block's width.
        num_domains: data sets that the domain classifiers tell apart.
        style_ratio: width of the style factor over embed_dim.
        layer_norm_eps: epsilon of every LayerNorm with weights.
    """

    latent_size: int = 24
    patch_size: int = 4
    in_channels: int = 4
    embed_dim: int = 768
    depth: int = 12
    num_heads: int = 12
    decoder_embed_dim: int = 384
    decoder_depth: int = 8
    decoder_num_heads: int = 12
    mlp_ratio: float = 4.0
    num_domains: int = 10
    style_ratio: float = 0.25
    layer_norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        check_numbers(self, POSITIVE, *vars(self))
        if self.latent_size % self.patch_size:
            raise ValueError(
                f"latent_size {self.latent_size} is not a multiple of patch_size {self.patch_size}"
            )
        if self.num_tokens % 2:
            raise ValueError(
                f"latent_size {self.latent_size} and patch_size {self.patch_size} give "
                f"{self.num_tokens} tokens, expected an even number: half of them are mixed"
            )
        for prefix in ("", "decoder_"):
            width, heads = getattr(self, f"{prefix}embed_dim"), getattr(self, f"{prefix}num_heads")
            if width % heads:
                raise ValueError(f"{prefix}embed_dim {width} is not a multiple of {prefix}num_heads {heads}")
            if width % 6:
                raise ValueError(
                    f"{prefix}embed_dim {width} is not a multiple of 6, as 3D sine-cosine positions need"
                )
        if self.style_dim < 1:
            raise ValueError(f"style_ratio {self.style_ratio} of embed_dim {self.embed_dim} leaves no style")

    @property
    def num_tokens(self) -> int:
        """Return the tokens of a crop, without CLS."""
        return (self.latent_size // self.patch_size) ** 3

    @property
    def style_dim(self) -> int:
        """Return the width of the style factor."""
        return int(self.embed_dim * self.style_ratio)

    @property
    def token_dim(self) -> int:
        """Return the values in a patch: patch_size^3 * in_channels."""
        return self.patch_size**3 * self.in_channels

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Tensor]) -> MeDUETConfig:
        """Read the sizes off a state dict with the published names.

        Numbers of heads leave no trace in the weights: the published 12 and 12 are taken.

        Raises:
            ValueError: naming the first missing key, or sizes that do not fit together.
        """

        def count(prefix: str) -> int:
            indices = {int(key.split(".")[1]) for key in state if key.startswith(prefix + ".")}
            if indices != set(range(len(indices))) or not indices:
                raise ValueError(f"not a MeDUET state dict: {prefix}.N found for N in {sorted(indices)}")
            return len(indices)

        try:
            embed_dim, in_channels, patch_size = state["embed_layer.proj.weight"].shape[:3]
            num_tokens = state["pos_embed"].shape[1] - 1
            grid = round(num_tokens ** (1 / 3))
            if grid**3 != num_tokens:
                raise ValueError(f"pos_embed has {num_tokens} positions after CLS, expected a cubic number")
            return cls(
                latent_size=grid * patch_size,
                patch_size=patch_size,
                in_channels=in_channels,
                embed_dim=embed_dim,
                depth=count("blocks"),
                decoder_embed_dim=state["decoder_embed.weight"].shape[0],
                decoder_depth=count("decoder_blocks"),
                mlp_ratio=state["blocks.0.mlp.fc1.weight"].shape[0] / embed_dim,
                num_domains=state["domain_classifier.domain_classifier_c.4.bias"].shape[0],
                style_ratio=state["disentangled_factorizer.proj_s.weight"].shape[0] / embed_dim,
            )
        except KeyError as error:
            raise ValueError(f"not a MeDUET state dict: {error} is missing") from error
