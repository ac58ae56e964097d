"""A network whose content and style are known exactly, and a tokenizer that needs no weights."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from meduet_fast.autoencoder import Tokenizer
from meduet_fast.kernels import patchify_3d, unpatchify_3d
from meduet_fast.models import MeDUET, MeDUETConfig
from meduet_fast.models.meduet import Factors

CROP, PATCH = 4, 2


class KnownFactors(MeDUET):
    """Style is the mean of each channel within a patch, content what is left of the patch."""

    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.config = MeDUETConfig(
            latent_size=CROP, patch_size=PATCH, in_channels=4, embed_dim=36, depth=1, num_heads=2,
            decoder_embed_dim=12, decoder_depth=1, decoder_num_heads=2, num_domains=3,
        )  # fmt: skip
        self.cls_token = nn.Parameter(torch.zeros(1, 1, 36))

    def forward(self, latents: Tensor) -> Factors:
        patches = patchify_3d(latents, PATCH).unflatten(-1, (-1, 4))  # (B, L, p^3, C)
        style = patches.mean(2)  # (B, L, C)
        content = (patches - style[:, :, None]).flatten(2)  # (B, L, p^3 C)
        return Factors(self.cls_token.expand(len(latents), -1, -1), content, style)

    def reconstruct(self, factors: Factors) -> Tensor:
        patches = factors.content.unflatten(-1, (-1, 4)) + factors.style[:, :, None]  # (B, L, p^3, C)
        return unpatchify_3d(patches.flatten(2), PATCH, (CROP // PATCH,) * 3)  # (B, C, S, S, S)


class Repeating(Tokenizer):
    """Decode a voxel of the first channel into a cube of itself."""

    channels, compression = 4, 8

    def __init__(self) -> None:
        pass

    def decode(self, latents: Tensor) -> Tensor:
        return F.interpolate(torch.sigmoid(latents[:, :1].float()), scale_factor=8)  # (B, 1, X, Y, Z)
