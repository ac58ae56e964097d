"""A diffusion transformer over latents, conditioned on content and style: SiT's and DiT's sizes, in 3D.

Source: MeDUET section "Synthesis"; blocks after Peebles and Xie, "Scalable Diffusion Models with
Transformers" (2023).

Shapes: B samples of C x X x Y x Z latents; L tokens of width W, each a cubic patch of p^3 * C values; D the
width of content, Ds of style.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from meduet_fast.kernels import patch_grid, unpatchify_3d
from meduet_fast.kernels.patchify import Triple
from meduet_fast.layers import PatchEmbed3d
from meduet_fast.layers.positions import kept_sincos_positions_3d
from meduet_fast.settings import SettingError

from .blocks import Attention, Gelu, Mlp, residual_stream
from .conditioning import (
    Content,
    ContentMap,
    FactorEmbedding,
    FactorStatistics,
    Prediction,
    TimeEmbedding,
    check_conditions,
    no_row,
)
from .mixins import ConfigMixin, ModelMixin, register_to_config

LAYER_NORM_EPS = 1e-6


def modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Normalise tokens (B, L, W) without weights of the norm's own; shift and scale (B, 1, W) are theirs."""
    return F.layer_norm(x, x.shape[-1:], eps=LAYER_NORM_EPS) * (1 + scale) + shift  # (B, L, W)


class ConditionedBlock(nn.Module):
    """Transformer block whose norms shift and scale by content and style, and whose gates open by time.

    x + g1 Attn(LN(x)(1+a1)+b1), then x + g2 MLP(LN(x)(1+a2)+b2), with (b1,a1,b2,a2) = A_c e_c + A_s e_s and
    (g1,g2) of SiLU(t). All start as 0: the block starts as the identity.
    """

    def __init__(self, width: int, num_heads: int, mlp_ratio: float, qk_norm: bool, gelu: Gelu) -> None:
        super().__init__()
        self.attn = Attention(width, num_heads, qk_norm)
        self.mlp = Mlp(width, int(width * mlp_ratio), gelu)
        self.modulation_content = nn.Linear(width, 4 * width)
        self.modulation_style = nn.Linear(width, 4 * width)
        self.gates = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x: Tensor, content: Tensor, style: Tensor, time: Tensor) -> Tensor:
        """Map tokens (B, L, W) under embedded content, style and time (B, W) each: (B, L, W)."""
        modulation = self.modulation_content(content) + self.modulation_style(style)  # (B, 4W)
        shift1, scale1, shift2, scale2 = modulation.unsqueeze(1).chunk(4, -1)  # (B, 1, W) each
        gate1, gate2 = self.gates(time).unsqueeze(1).chunk(2, -1)  # (B, 1, W) each
        x = x + gate1 * self.attn(modulated(x, shift1, scale1))  # (B, L, W)
        return x + gate2 * self.mlp(modulated(x, shift2, scale2))  # (B, L, W)


class FinalLayer(nn.Module):
    """Predict patches: a norm that time and both factors shift and scale, and a Linear that starts as 0."""

    def __init__(self, width: int, patch_values: int) -> None:
        super().__init__()
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))
        self.linear = nn.Linear(width, patch_values)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """Map tokens (B, L, W) under the summed condition (B, W): (B, L, p^3*C) in (px, py, pz, c) order."""
        shift, scale = self.modulation(condition).unsqueeze(1).chunk(2, -1)  # (B, 1, W) each
        return self.linear(modulated(x, shift, scale))  # (B, L, p^3*C)


class MeDUETTransformer3D(FactorStatistics, ModelMixin, ConfigMixin):
    """Predict velocity or noise of latents from content and style.

    With ``content="tokens"`` the network sees a map of content, place by place: a narrow projection of it is
    added to the patch tokens, and its mean over the map takes the place of the pooled factor in the blocks.

    Args:
        in_channels: C.
        sample_size: latent voxels along x, y, z of the crops it is made for; others work, too.
        content_dim: D.
        style_dim: Ds.
        content: "pooled", one vector for a crop; "tokens", a map.
        content_projection: channels that are left of content tokens.
        content_pool: tokens of content along each axis whose mean it sees.
        content_by_volume: whether tokens of content come at mean 0 and deviation 1 within their volume; for
            those who call, the network itself does not see to it.
        prediction: "flow", the velocity n - z; "epsilon", the noise n.
        latents_mean, latents_std: of each channel; for those who normalise, the network itself does not.
        patch_size: p, in latent voxels.
        hidden_size: W, a multiple of 6 and of ``num_heads``.
        depth: blocks.
        num_heads: attention heads.
        mlp_ratio: hidden width of an MLP over W.
        qk_norm: whether queries and keys get an RMS norm.
        gelu: "tanh", the published approximation; "exact", as in pretraining.

    Raises:
        SettingError: naming the setting that does not fit.
        ValueError: for a sample_size that is no multiple of the patch.
    """

    @register_to_config
    def __init__(
        self,
        in_channels: int = 4,
        sample_size: Triple = (24, 24, 24),
        content_dim: int = 768,
        style_dim: int = 192,
        content: Content = "pooled",
        content_projection: int = 16,
        content_pool: int = 1,
        content_by_volume: bool = False,
        prediction: Prediction = "flow",
        latents_mean: tuple[float, ...] = (0.0, 0.0, 0.0, 0.0),
        latents_std: tuple[float, ...] = (1.0, 1.0, 1.0, 1.0),
        patch_size: int = 4,
        hidden_size: int = 384,
        depth: int = 12,
        num_heads: int = 6,
        mlp_ratio: float = 4.0,
        qk_norm: bool = False,
        gelu: Gelu = "tanh",
    ) -> None:
        super().__init__()
        check_conditions(in_channels, content, prediction, latents_mean, latents_std)
        for number, what in (
            (6, "6, as 3D sine-cosine positions need"),
            (num_heads, f"num_heads {num_heads}"),
        ):
            if hidden_size % number:
                raise SettingError("hidden_size", f"found {hidden_size}, expected a multiple of {what}")
        x, y, z = sample_size  # a list, where it comes from a file
        self.patch_size, self.feature_depth = patch_size, max(1, depth // 3)
        self.grid = patch_grid((x, y, z), patch_size)
        self.patch_embed = PatchEmbed3d(in_channels, hidden_size, patch_size, (x, y, z), "sincos")
        self.time_embed = TimeEmbedding(hidden_size)
        self.content_map = (
            ContentMap(content_dim, content_projection, content_pool) if content == "tokens" else None
        )
        self.content_tokens = nn.Linear(content_projection, hidden_size) if content == "tokens" else None
        self.content_embed = FactorEmbedding(
            content_projection if content == "tokens" else content_dim, hidden_size
        )
        self.style_embed = FactorEmbedding(style_dim, hidden_size)
        self.blocks = nn.ModuleList(
            ConditionedBlock(hidden_size, num_heads, mlp_ratio, qk_norm, gelu) for _ in range(depth)
        )
        self.final = FinalLayer(hidden_size, patch_size**3 * in_channels)
        self.register_statistics(content_dim, style_dim, content)
        self.reset_parameters()

    @property
    def feature_width(self) -> int:
        """Return the width of the features."""
        return self.final.linear.in_features

    def reset_parameters(self) -> None:
        """Draw first values of all parameters and reset buffers; for memory that ``to_empty`` gave."""
        for module in self.modules():
            if isinstance(module, PatchEmbed3d | FactorEmbedding | ContentMap | nn.RMSNorm):
                module.reset_parameters()
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.patch_embed.weight.flatten(1))
        nn.init.zeros_(self.patch_embed.bias)  # type: ignore[arg-type]
        zero = [self.content_tokens, self.final.modulation[1], self.final.linear]
        for block in self.blocks:
            assert isinstance(block, ConditionedBlock)
            zero += [block.modulation_content, block.modulation_style, block.gates[1]]
        for linear in zero:
            if linear is not None:
                nn.init.zeros_(linear.weight)  # type: ignore[arg-type]
        self.reset_statistics()

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor,
        content: Tensor,
        style: Tensor,
        content_dropped: Tensor | None = None,
        style_dropped: Tensor | None = None,
        features: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Predict what ``prediction`` says.

        Args:
            sample: (B, C, X, Y, Z) noisy normalised latents, any size that the patch divides.
            timestep: (B,): 1000 sigma of the flow, or the step of epsilon.
            content: (B, D) raw factors; or raw tokens (B, X', Y', Z', D) of the same crop, on any grid.
            style: (B, Ds) raw factors.
            content_dropped, style_dropped: (B,) bool, rows without that factor; None for no row.
            features: whether tokens from inside are asked for, too.

        Returns:
            (B, C, X, Y, Z); with ``features`` also the tokens after a third of the blocks,
            (B, X/p, Y/p, Z/p, W).

        Raises:
            ValueError: naming what has the wrong shape.
        """
        grid = patch_grid(sample.shape, self.patch_size)
        position = None
        if grid != self.grid:
            position = kept_sincos_positions_3d(self.feature_width, grid, sample.device)  # (L, W)
        x = residual_stream(self.patch_embed(sample, position=position))  # (B, L, W)
        time = self.time_embed(timestep)  # (B, W)
        content, style = self.standardised(content, style)  # (B, D) or (B, X', Y', Z', D); (B, Ds)
        content_dropped = no_row(content_dropped, sample)  # (B,)
        if self.content_map is not None and self.content_tokens is not None:
            narrow = self.content_map(
                self.content_map.pooled(content), grid, content_dropped
            )  # (B, L, content_projection)
            x = x + self.content_tokens(narrow)  # (B, L, W)
            content = narrow.mean(1)  # (B, content_projection)
        content = self.content_embed(content, content_dropped)  # (B, W)
        style = self.style_embed(style, no_row(style_dropped, sample))  # (B, W)
        inner = x
        for number, block in enumerate(self.blocks, 1):
            x = block(x, content, style, time)  # (B, L, W)
            inner = x if number == self.feature_depth else inner
        patches = self.final(x, time + content + style)  # (B, L, p^3*C)
        out = unpatchify_3d(patches, self.patch_size, grid)  # (B, C, X, Y, Z)
        return (out, inner.unflatten(1, grid)) if features else out

    def transformer_blocks(self) -> list[nn.Module]:
        """Return the blocks: what is compiled, recomputed or sharded each on its own."""
        return list(self.blocks)
