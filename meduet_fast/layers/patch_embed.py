"""Embed patches of a volume as tokens; MeDUET's own embedding is this one."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from meduet_fast.kernels import patch_embed_3d, patch_embed_tokens, patch_grid
from meduet_fast.kernels.patchify import Triple, triple

from .positions import sincos_positions_3d

Position = Literal["none", "learnable", "sincos"]


class PatchEmbed3d(nn.Module):
    """Patches of a volume as tokens: a Conv3d with kernel = stride = patch, run as a matrix product.

    ``weight`` and ``bias`` have the names, shapes and first values of ``nn.Conv3d``: its checkpoints load.

    Args:
        in_channels: C.
        hidden_size: D.
        patch_size: patch edge, or one for each axis.
        img_size: edge of the volume, or one for each axis. Positions need it, and refuse other sizes.
        position: "none"; "learnable", a parameter ``position`` (L, D); "sincos", fixed and in no checkpoint.
        bias: False leaves ``bias`` out.
        num_prefix_tokens: zero rows in front of the tokens, for the caller to fill (CLS).

    Raises:
        ValueError: for an unknown position, positions without img_size, or sizes that do not fit.
    """

    def __init__(
        self,
        in_channels: int,
        hidden_size: int,
        patch_size: int | Triple,
        img_size: int | Triple | None = None,
        position: Position = "none",
        bias: bool = True,
        num_prefix_tokens: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if position not in ("none", "learnable", "sincos"):
            raise ValueError(f"position is {position!r}, expected 'none', 'learnable' or 'sincos'")
        self.patch_size = triple(patch_size)
        self.num_prefix_tokens = num_prefix_tokens
        conv = nn.Conv3d(
            in_channels, hidden_size, self.patch_size, self.patch_size, bias=bias, device=device, dtype=dtype
        )
        self.weight, self.bias = conv.weight, conv.bias
        if position == "none":
            self.register_buffer("position", None)
            return
        if img_size is None:
            raise ValueError(f"img_size is None, expected the volume's size for position {position!r}")
        grid = patch_grid(triple(img_size), self.patch_size)
        if position == "sincos":
            table = sincos_positions_3d(hidden_size, grid).to(
                device=device, dtype=self.weight.dtype
            )  # (L, D)
            self.register_buffer("position", table, persistent=False)
        else:
            table = torch.empty(grid[0] * grid[1] * grid[2], hidden_size, device=device, dtype=dtype)
            self.position = nn.Parameter(nn.init.trunc_normal_(table, std=0.02))

    def forward(self, x: Tensor, source_mask: Tensor | None = None, position: Tensor | None = None) -> Tensor:
        """Embed a volume.

        Args:
            x: (B, C, X, Y, Z).
            source_mask: (B, L), 1 where the token is to be the partner's, see :func:`patch_embed_3d`.
            position: (L, D) in place of the layer's own, for models that keep positions themselves.

        Returns:
            (B, P+L, D), P prefix rows first.
        """
        position = self.position if position is None else position  # (L, D)
        return patch_embed_3d(
            x, self.weight, self.bias, position, source_mask, num_prefix_tokens=self.num_prefix_tokens
        )  # (B, P+L, D)

    def embed_patches(self, patches: Tensor, position: Tensor | None = None) -> Tensor:
        """Embed patches (B, L, p*q*r*C) that are cut already: (B, P+L, D), as of their volume."""
        position = self.position if position is None else position  # (L, D)
        return patch_embed_tokens(
            patches, self.weight, self.bias, position, num_prefix_tokens=self.num_prefix_tokens
        )  # (B, P+L, D)

    def extra_repr(self) -> str:
        """Return the sizes, for ``print(module)``."""
        hidden_size, in_channels = self.weight.shape[:2]
        return f"{in_channels}, {hidden_size}, patch_size={self.patch_size}"
