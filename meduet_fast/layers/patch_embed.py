"""Embed patches of a volume as tokens; MeDUET's own embedding is this one."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

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
        position: "none"; "learnable", a parameter ``position`` (L, D); "sincos", fixed and in no checkpoint:
            computed here, in ``load_state_dict``, and when ``to_empty`` takes the module off the meta device.
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
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        self.weight = nn.Parameter(torch.empty(hidden_size, in_channels, *self.patch_size, **options))
        self.bias = nn.Parameter(torch.empty(hidden_size, **options)) if bias else None
        self.register_buffer("position", None, persistent=False)
        self._fixed_grid: Triple | None = None  # of positions that are computed
        if position != "none":
            if img_size is None:
                raise ValueError(f"img_size is None, expected the volume's size for position {position!r}")
            grid = patch_grid(triple(img_size), self.patch_size)
            table = torch.empty(math.prod(grid), hidden_size, **options)  # (L, D)
            if position == "sincos":
                self.position, self._fixed_grid = table, grid
            else:
                del self.position
                self.position = nn.Parameter(table)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw first values as ``nn.Conv3d`` does, and positions; for memory that ``to_empty`` gave."""
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        if self.bias is not None:
            bound = self.weight[0].numel() ** -0.5
            nn.init.uniform_(self.bias, -bound, bound)
        if isinstance(self.position, nn.Parameter):
            nn.init.trunc_normal_(self.position, std=0.02)
        self._fill_positions()

    def _fill_positions(self) -> None:
        """Compute fixed positions on the device where the weight is."""
        if self._fixed_grid is None:
            return
        with torch.device("cpu"):  # whatever the default: "meta" would make no values
            table = sincos_positions_3d(self.weight.shape[0], self._fixed_grid)  # (L, D)
        self.position = table.to(self.weight.device, self.position.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PatchEmbed3d:
        """Move or convert like any module; ``to_empty`` off the meta device gets its fixed positions."""
        promised = self._fixed_grid is not None and self.position.is_meta
        super()._apply(fn, recurse)
        if promised and not self.weight.is_meta:
            self._fill_positions()
        return self

    def _load_from_state_dict(self, *arguments: Any) -> None:
        """Load weights, and compute the fixed positions that no state dict has."""
        super()._load_from_state_dict(*arguments)
        self._fill_positions()

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
