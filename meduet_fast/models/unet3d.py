"""A diffusion U-Net over latents: content by cross-attention, style and time by adaptive group norms.

Source: MeDUET section "Synthesis"; levels and skips after Rombach et al., "High-Resolution Image Synthesis
with Latent Diffusion Models" (2022), adaptive norms after Dhariwal and Nichol, "Diffusion Models Beat GANs on
Image Synthesis" (2021).

Shapes: B samples of C x X x Y x Z latents; maps of K channels, channels last in memory, with N voxels; D the
width of content, Ds of style, W of the embedded conditions, T tokens of content.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from meduet_fast.kernels import group_norm_silu, patch_grid, unpatchify_3d
from meduet_fast.kernels.patchify import Triple
from meduet_fast.layers import PatchEmbed3d, attention
from meduet_fast.layers.positions import kept_sincos_positions_3d
from meduet_fast.settings import SettingError

from .blocks import Attention, Mlp
from .conditioning import (
    Content,
    ContentMap,
    FactorEmbedding,
    FactorStatistics,
    Prediction,
    TimeEmbedding,
    check_conditions,
    linear_prediction,
    no_row,
)
from .mixins import ConfigMixin, ModelMixin, register_to_config

NORM_EPS = 1e-6
MLP_RATIO = 4


def conv3(in_channels: int, out_channels: int) -> nn.Conv3d:
    """Build a convolution over 3^3 voxels that keeps the size."""
    return nn.Conv3d(in_channels, out_channels, 3, padding=1)


def to_tokens(x: Tensor) -> Tensor:
    """View a map (B, K, X, Y, Z) as tokens (B, N, K)."""
    return x.permute(0, 2, 3, 4, 1).flatten(1, 3)


def to_map(tokens: Tensor, grid: Triple) -> Tensor:
    """View tokens (B, N, K) as a map (B, K, X, Y, Z), channels last in memory."""
    return tokens.unflatten(1, grid).permute(0, 4, 1, 2, 3)


def positions(width: int, grid: Triple, device: torch.device, extent: Triple) -> Tensor:
    """Compute sine-cosine positions (N, width) of a grid; widths that 6 does not divide lack slow waves."""
    return kept_sincos_positions_3d(-(-width // 6) * 6, grid, device, extent)[:, :width]


def check_size(shape: Sequence[int], divisor: int) -> None:
    """Refuse a map whose last three axes the levels do not divide, with a ValueError."""
    for axis, size in enumerate(shape[-3:]):
        if size % divisor or size == 0:
            raise ValueError(
                f"spatial axis {axis} has size {size}, expected a positive multiple of {divisor}: "
                "patch_size, doubled by every further level"
            )


class ResidualBlock(nn.Module):
    """Two convolutions behind adaptive norms; starts as its skip."""

    def __init__(self, in_channels: int, out_channels: int, width: int, norm_num_groups: int) -> None:
        super().__init__()
        self.norm_num_groups = norm_num_groups
        self.sizes = [in_channels, in_channels, out_channels, out_channels]  # scale and shift of both norms
        self.time = nn.Linear(width, sum(self.sizes))
        self.style = nn.Linear(width, sum(self.sizes))
        self.conv1 = conv3(in_channels, out_channels)
        self.conv2 = conv3(out_channels, out_channels)
        same = in_channels == out_channels
        self.skip = nn.Identity() if same else nn.Conv3d(in_channels, out_channels, 1)

    def forward(self, x: Tensor, time: Tensor, style: Tensor) -> Tensor:
        """Map (B, K, X, Y, Z) under embedded time and style (B, W): (B, K', X, Y, Z)."""
        condition = self.time(F.silu(time)) + self.style(style)  # (B, 2K + 2K')
        scale1, shift1, scale2, shift2 = condition.split(self.sizes, -1)  # (B, K), (B, K), (B, K'), (B, K')
        groups = self.norm_num_groups
        h = self.conv1(group_norm_silu(x, groups, 1 + scale1, shift1, NORM_EPS))  # (B, K', X, Y, Z)
        h = self.conv2(group_norm_silu(h, groups, 1 + scale2, shift2, NORM_EPS))  # (B, K', X, Y, Z)
        return self.skip(x) + h


class CrossAttention(nn.Module):
    """Attention of tokens to a context."""

    def __init__(self, channels: int, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.to_q = nn.Linear(channels, channels)
        self.to_kv = nn.Linear(width, 2 * channels)
        self.proj = nn.Linear(channels, channels)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """Map tokens (B, N, K) with a context (B, T, W): (B, N, K)."""
        query = self.to_q(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # (B, H, N, d)
        pair = self.to_kv(context).unflatten(-1, (2, self.num_heads, -1))  # (B, T, 2, H, d)
        key, value = pair.permute(2, 0, 3, 1, 4).unbind(0)  # (B, H, T, d) each
        attended = attention.attend(query, key, value)  # (B, H, N, d)
        return self.proj(attended.transpose(1, 2).flatten(2))  # (B, N, K)


class ContextBlock(nn.Module):
    """Self-attention between the voxels of a map, cross-attention to content, MLP; starts as the identity."""

    def __init__(self, channels: int, width: int, num_heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(channels, NORM_EPS)
        self.attn = Attention(channels, num_heads)
        self.norm2 = nn.LayerNorm(channels, NORM_EPS)
        self.cross = CrossAttention(channels, width, num_heads)
        self.norm3 = nn.LayerNorm(channels, NORM_EPS)
        self.mlp = Mlp(channels, MLP_RATIO * channels, "tanh")

    def forward(self, x: Tensor, context: Tensor, places: Tensor | None) -> Tensor:
        """Map (B, K, X, Y, Z) with a context (B, T, W); ``places`` (N, K) tell queries where they are."""
        grid, x = x.shape[2:], to_tokens(x)  # (B, N, K)
        x = x + self.attn(self.norm1(x))  # (B, N, K)
        query = self.norm2(x) if places is None else self.norm2(x) + places.to(x.dtype)  # (B, N, K)
        x = x + self.cross(query, context)  # (B, N, K)
        x = x + self.mlp(self.norm3(x))  # (B, N, K)
        return to_map(x, (grid[0], grid[1], grid[2]))


class Conditions(NamedTuple):
    """What a pass is conditioned on.

    Attributes:
        time, style: (B, W).
        context: (B, T, W) of content.
        grid: of the context's tokens; None for one that has no place.
    """

    time: Tensor
    style: Tensor
    context: Tensor
    grid: Triple | None


class Stage(nn.Module):
    """A residual block, and attention behind it if ``num_heads`` are given."""

    def __init__(
        self, in_channels: int, out_channels: int, width: int, norm_num_groups: int, num_heads: int | None
    ) -> None:
        super().__init__()
        self.resnet = ResidualBlock(in_channels, out_channels, width, norm_num_groups)
        self.attention = None if num_heads is None else ContextBlock(out_channels, width, num_heads)

    def forward(self, x: Tensor, conditions: Conditions) -> Tensor:
        """Map (B, K, X, Y, Z) to (B, K', X, Y, Z)."""
        time, style, context, extent = conditions
        x = self.resnet(x, time, style)  # (B, K', X, Y, Z)
        if self.attention is None:
            return x
        places = None
        if extent is not None:
            places = positions(x.shape[1], patch_grid(x.shape, 1), x.device, extent)  # (N, K')
        return self.attention(x, context, places)  # (B, K', X, Y, Z)


class Level(nn.Module):
    """Hold the stages of one resolution, on the way down or up, and what changes it afterwards."""

    def __init__(self, stages: Iterable[Stage], sampler: nn.Module | None) -> None:
        super().__init__()
        self.stages = nn.ModuleList(stages)
        self.sampler = sampler


class PatchConv(PatchEmbed3d):
    """Convolve patches that do not overlap: makes each of them one voxel."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        """Map (B, K, X, Y, Z) to (B, K', X/p, Y/p, Z/p)."""
        return to_map(super().forward(x), patch_grid(x.shape, self.patch_size))


class Upsample(nn.Module):
    """Double the size by repetition and convolve, in a transposed convolution with 3.4 times fewer products.

    Of the three repeated voxels that the kernel sees along an axis, two are the same: four kernels of two
    weights, a sum of weights among them, do for even and odd places.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = conv3(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, K, X, Y, Z) to (B, K, 2X, 2Y, 2Z)."""
        if x.device.type == "cpu" and min(x.shape[2:]) == 1:
            # There torch 2.13's gradient of a transposed convolution in bfloat16 is memory never written to.
            return self.conv(F.interpolate(x, scale_factor=2.0))  # (B, K, 2X, 2Y, 2Z)
        weight = self.conv.weight  # (K, K, 3, 3, 3)
        for axis in (2, 3, 4):
            before, here, after = weight.unbind(axis)
            weight = torch.stack([after, here + after, before + here, before], axis)
        weight = weight.transpose(0, 1)  # (K, K, 4, 4, 4), inputs first
        return F.conv_transpose3d(x, weight, self.conv.bias, stride=2, padding=1)  # (B, K, 2X, 2Y, 2Z)


class MeDUETUNet3D(FactorStatistics, ModelMixin, ConfigMixin):
    """Predict velocity or noise of latents from content and style.

    Content is the context of cross-attention: the pooled factor as one token, or, with ``content="tokens"``,
    a narrow projection of each token of the crop's map with its place. Style and time scale and shift every
    channel after the norms of residual blocks. What it says is added to the best multiple of the sample
    (:func:`~.conditioning.linear_prediction`), which convolutions between norms are slow to learn.

    Args:
        in_channels, sample_size, content_dim, style_dim, content, content_projection, content_pool,
        content_by_volume, prediction, latents_mean, latents_std: see
        :class:`~.transformer3d.MeDUETTransformer3D`.
        patch_size: latent voxels along the edge of a voxel of the first level; 1 begins with a convolution.
        num_channels: of each level; every further one halves the size.
        num_res_blocks: residual blocks of a level on the way down; one more on the way up.
        attention_levels: whether a level has attention; what lies below the last one always does.
        num_heads: attention heads.
        norm_num_groups: groups of channels that are normalised together.
        features_patch: edge of the encoder's patch in latent voxels. Features come from the coarsest level
            whose voxels are not larger.

    Raises:
        SettingError: naming the setting that does not fit.
        ValueError: for a sample_size that the levels do not divide.
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
        patch_size: int = 1,
        num_channels: tuple[int, ...] = (128, 256, 384),
        num_res_blocks: int = 2,
        attention_levels: tuple[bool, ...] = (False, True, True),
        num_heads: int = 8,
        norm_num_groups: int = 32,
        features_patch: int = 4,
    ) -> None:
        super().__init__()
        check_conditions(in_channels, content, prediction, latents_mean, latents_std)
        if len(attention_levels) != len(num_channels):
            found = f"found {len(attention_levels)} levels, expected {len(num_channels)} as in num_channels"
            raise SettingError("attention_levels", found)
        for number in num_channels:
            for divisor, name in ((norm_num_groups, "norm_num_groups"), (num_heads, "num_heads")):
                if number % divisor:
                    raise SettingError(
                        "num_channels", f"found {number}, expected a multiple of {name} {divisor}"
                    )
        x, y, z = sample_size  # a list, where it comes from a file
        self.in_channels, self.patch_size = in_channels, patch_size
        self.divisor = patch_size * 2 ** (len(num_channels) - 1)  # of every size
        check_size((x, y, z), self.divisor)
        edges = [patch_size * 2**level for level in range(len(num_channels))]
        self.feature_level = max(sum(edge <= features_patch for edge in edges) - 1, 0)
        self.feature_width = num_channels[self.feature_level]
        first, last = num_channels[0], num_channels[-1]
        width = 4 * first

        self.time_embed = TimeEmbedding(width)
        self.style_embed = FactorEmbedding(style_dim, width)
        self.content_embed = FactorEmbedding(content_dim, width) if content == "pooled" else None
        self.content_map = (
            ContentMap(content_dim, content_projection, content_pool) if content == "tokens" else None
        )
        self.content_tokens = nn.Linear(content_projection, width) if content == "tokens" else None

        whole = patch_size == 1
        self.conv_in = conv3(in_channels, first) if whole else PatchConv(in_channels, first, patch_size)

        def level(channels: list[int], number: int, sampler: nn.Module | None) -> Level:
            heads = num_heads if attention_levels[number] else None
            out = num_channels[number]
            return Level((Stage(k, out, width, norm_num_groups, heads) for k in channels), sampler)

        deepest, before, skips = len(num_channels) - 1, first, [first]
        self.down_blocks = nn.ModuleList()
        for number, channels in enumerate(num_channels):
            sampler = None if number == deepest else PatchConv(channels, channels, 2)
            inputs = [before] + [channels] * (num_res_blocks - 1)
            self.down_blocks.append(level(inputs, number, sampler))
            skips += [channels] * (num_res_blocks + (number < deepest))
            before = channels
        self.mid_block = nn.ModuleList(
            Stage(last, last, width, norm_num_groups, heads) for heads in (num_heads, None)
        )
        self.up_blocks = nn.ModuleList()
        for number, channels in reversed([*enumerate(num_channels)]):
            inputs = [k + skips.pop() for k in [before] + [channels] * num_res_blocks]
            self.up_blocks.append(level(inputs, number, Upsample(channels) if number else None))
            before = channels
        self.conv_norm_out = nn.GroupNorm(norm_num_groups, first, NORM_EPS)
        self.conv_out = conv3(first, patch_size**3 * in_channels)
        self.register_statistics(content_dim, style_dim, content)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw first values of all parameters and reset buffers; for memory that ``to_empty`` gave."""
        kinds = (PatchEmbed3d, FactorEmbedding, ContentMap, nn.LayerNorm, nn.GroupNorm, nn.Conv3d, nn.Linear)
        for module in self.modules():
            if isinstance(module, kinds):
                module.reset_parameters()
        zero: list[nn.Linear | nn.Conv3d] = [self.conv_out]
        for block in self.transformer_blocks():
            if isinstance(block, ResidualBlock):
                zero += [block.style, block.conv2]
            else:
                zero += [block.attn.proj, block.cross.proj, block.mlp.fc2]
        for layer in zero:
            for parameter in layer.parameters():
                nn.init.zeros_(parameter)
        self.reset_statistics()

    def embed_content(self, content: Tensor, dropped: Tensor) -> Tensor:
        """Embed standardised content, (B, D) or (B, X', Y', Z', D), as a context (B, T, W).

        Tokens that are dropped are all the same, for they have no place: attention finds one.
        """
        if self.content_embed is not None:
            return self.content_embed(content, dropped).unsqueeze(1)  # (B, 1, W)
        assert self.content_map is not None
        assert self.content_tokens is not None
        grid = patch_grid(content.movedim(-1, 1).shape, 1)
        tokens = self.content_tokens(self.content_map(content, grid, dropped))  # (B, T, W)
        places = positions(tokens.shape[-1], grid, tokens.device, grid).to(tokens.dtype)  # (T, W)
        return tokens + places.masked_fill(dropped[:, None, None], 0)  # (B, T, W)

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
            sample: (B, C, X, Y, Z) noisy normalised latents, any size that the levels divide.
            timestep: (B,): 1000 sigma of the flow, or the step of epsilon.
            content: (B, D) raw factors; or raw tokens (B, X', Y', Z', D) of the same crop, on any grid.
            style: (B, Ds) raw factors.
            content_dropped, style_dropped: (B,) bool, rows without that factor; None for no row.
            features: whether a map from inside is asked for, too.

        Returns:
            (B, C, X, Y, Z); with ``features`` also (B, X'', Y'', Z'', K) from the way down.

        Raises:
            ValueError: naming what has the wrong shape.
        """
        if sample.dim() != 5 or sample.shape[1] != self.in_channels:
            expected = f"(B, {self.in_channels}, X, Y, Z)"
            raise ValueError(f"sample has shape {tuple(sample.shape)}, expected {expected}")
        check_size(sample.shape, self.divisor)
        grid = patch_grid(sample.shape, self.patch_size)
        content, style = self.standardised(content, style)  # (B, D) or (B, X', Y', Z', D); (B, Ds)
        if self.content_map is not None:
            content = self.content_map.pooled(content)  # (B, X', Y', Z', D)
        conditions = Conditions(
            self.time_embed(timestep),  # (B, W)
            self.style_embed(style, no_row(style_dropped, sample)),  # (B, W)
            self.embed_content(content, no_row(content_dropped, sample)),  # (B, T, W)
            None if self.content_map is None else patch_grid(content.shape[1:4], 1),
        )
        x = self.conv_in(sample).contiguous(memory_format=torch.channels_last_3d)  # (B, K, X/p, Y/p, Z/p)
        skips, inner = [x], x
        for number, level in enumerate(self.down_blocks):
            for stage in level.stages:  # type: ignore[union-attr]
                x = stage(x, conditions)  # (B, K, X, Y, Z)
                skips.append(x)
            inner = x if number == self.feature_level else inner
            if level.sampler is not None:
                x = level.sampler(x)  # type: ignore[operator]  # (B, K, X/2, Y/2, Z/2)
                skips.append(x)
        for stage in self.mid_block:
            x = stage(x, conditions)  # (B, K, X, Y, Z)
        for level in self.up_blocks:
            for stage in level.stages:  # type: ignore[union-attr]
                x = stage(torch.cat([x, skips.pop()], 1), conditions)  # (B, K, X, Y, Z)
            if level.sampler is not None:
                x = level.sampler(x)  # type: ignore[operator]  # (B, K, 2X, 2Y, 2Z)
        norm = self.conv_norm_out
        x = self.conv_out(group_norm_silu(x, norm.num_groups, norm.weight, norm.bias, norm.eps))
        # (B, p^3*C, X/p, Y/p, Z/p)
        out = unpatchify_3d(to_tokens(x), self.patch_size, grid) if self.patch_size > 1 else x
        out = out + linear_prediction(sample, timestep, self.config.prediction)  # (B, C, X, Y, Z)
        return (out, inner.permute(0, 2, 3, 4, 1)) if features else out

    def transformer_blocks(self) -> list[ResidualBlock | ContextBlock]:
        """Return residual blocks and attentions: what is compiled, recomputed or sharded each on its own."""
        return [module for module in self.modules() if isinstance(module, ResidualBlock | ContextBlock)]
