"""Drop-in classes for diffusers' residual blocks, see ``fused.py``. diffusers is imported here alone.

Each block is twice GroupNorm, SiLU and a convolution, which casts what it gets, so under autocast nothing is
lost by a narrow result. Where a block normalises each frame by itself, frames stand on the batch axis, and a
2D map is a 3D map of depth 1.
"""

from __future__ import annotations

from typing import Any

from diffusers.models.autoencoders.autoencoder_kl_cogvideox import CogVideoXResnetBlock3D
from diffusers.models.autoencoders.autoencoder_kl_hunyuan_video import HunyuanVideoResnetBlockCausal3D
from diffusers.models.autoencoders.autoencoder_kl_magvit import EasyAnimateResidualBlock3D
from diffusers.models.autoencoders.autoencoder_kl_mochi import MochiChunkedGroupNorm3D, MochiResnetBlock3D
from diffusers.models.resnet import ResnetBlock2D, TemporalResnetBlock
from torch import Tensor, nn

from meduet_fast.kernels import group_norm_silu

from .fused import Fused, bare, norm_silu


def _plain(module: Any) -> bool:
    """Tell whether a block's norms and activation are what they are by default, and nobody watches them."""
    return (
        type(module.norm1) is type(module.norm2) is nn.GroupNorm
        and type(module.nonlinearity) is nn.SiLU
        and bare(module.norm1, module.norm2, module.nonlinearity)
    )


def _norm_silu_2d(norm: nn.GroupNorm, x: Tensor) -> Tensor:
    """Normalise and activate (B, C, X, Y)."""
    return norm_silu(norm, x.unsqueeze(2)).squeeze(2)


def _norm_silu_frames(norm: nn.GroupNorm, x: Tensor) -> Tensor:
    """Normalise and activate each frame of (B, C, T, X, Y) by itself."""
    frames = x.transpose(1, 2).flatten(0, 1)  # (B*T, C, X, Y)
    return _norm_silu_2d(norm, frames).unflatten(0, (x.shape[0], -1)).transpose(1, 2)  # (B, C, T, X, Y)


class FusedResnetBlock2D(Fused, ResnetBlock2D):
    """The residual block that 2D, 3D and video U-Nets apply to every slice, with pairs fused.

    With "scale_shift" the embedded time scales and shifts between the second norm and its SiLU: one pass with
    that norm's own weight and bias.
    """

    summary = "group_norm_silu"

    @staticmethod
    def fits(module: Any) -> bool:
        known = module.time_embedding_norm == "default" or (
            module.time_embedding_norm == "scale_shift" and module.norm2.affine
        )
        return known and _plain(module)

    def forward(self, input_tensor: Tensor, temb: Tensor | None, *args: Any, **kwargs: Any) -> Tensor:
        """Map (B, C, X, Y) and the embedded time (B, E), if the block takes it, to (B, C', X', Y')."""
        shifted = self.time_embedding_norm == "default"
        fitting = input_tensor.dim() == 4 and (temb is None) == (self.time_emb_proj is None)
        if not fitting or not (shifted or temb is not None) or args or kwargs or not self.fits(self):
            return super().forward(input_tensor, temb, *args, **kwargs)
        x, hidden = input_tensor, _norm_silu_2d(self.norm1, input_tensor)
        resample = self.upsample if self.upsample is not None else self.downsample
        if resample is not None:
            x, hidden = resample(x), resample(hidden)
        hidden = self.conv1(hidden)  # (B, C', X', Y')
        if temb is not None:
            # (B, C'), or (B, 2 C') with "scale_shift"
            temb = self.time_emb_proj(temb if self.skip_time_act else self.nonlinearity(temb))
        if temb is None:
            hidden = _norm_silu_2d(self.norm2, hidden)
        elif shifted:
            hidden = _norm_silu_2d(self.norm2, hidden + temb[:, :, None, None])
        else:
            # Rows for all samples, as one time may serve them all.
            scale, shift = temb.expand(hidden.shape[0], -1).chunk(2, dim=1)  # (B, C') each
            norm = self.norm2
            weight, bias = norm.weight * (1 + scale), norm.bias * (1 + scale) + shift  # (B, C')
            hidden = group_norm_silu(hidden.unsqueeze(2), norm.num_groups, weight, bias, norm.eps).squeeze(2)
        hidden = self.conv2(self.dropout(hidden))
        if self.conv_shortcut is not None:
            # Strides that DDP expects of the gradients.
            x = self.conv_shortcut(x.contiguous() if self.training else x)
        return (x + hidden) / self.output_scale_factor


class FusedTemporalResnetBlock(Fused, TemporalResnetBlock):
    """The residual block along time of video U-Nets and autoencoders with its two pairs fused."""

    summary = "group_norm_silu"

    @staticmethod
    def fits(module: Any) -> bool:
        return _plain(module)

    def forward(self, input_tensor: Tensor, temb: Tensor | None) -> Tensor:
        """Map (B, C, T, X, Y) and the embedded times (B, T, E), if the block takes them."""
        if not self.fits(self):
            return super().forward(input_tensor, temb)
        hidden = self.conv1(norm_silu(self.norm1, input_tensor))  # (B, C', T, X, Y)
        if self.time_emb_proj is not None:
            time = self.time_emb_proj(self.nonlinearity(temb)).transpose(1, 2)  # (B, C', T)
            hidden = hidden + time[..., None, None]
        hidden = self.conv2(self.dropout(norm_silu(self.norm2, hidden)))
        x = input_tensor if self.conv_shortcut is None else self.conv_shortcut(input_tensor)
        return x + hidden


class FusedEasyAnimateResidualBlock3D(Fused, EasyAnimateResidualBlock3D):
    """The residual block of AutoencoderKLMagvit with its two pairs fused, by frames or over the volume."""

    summary = "group_norm_silu"

    @staticmethod
    def fits(module: Any) -> bool:
        return _plain(module)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Map (B, C, T, X, Y) to (B, C', T, X, Y)."""
        if not self.fits(self):
            return super().forward(hidden_states)
        apply = _norm_silu_frames if self.spatial_group_norm else norm_silu
        hidden = self.conv1(apply(self.norm1, hidden_states))  # (B, C', T, X, Y)
        hidden = self.conv2(self.dropout(apply(self.norm2, hidden)))
        return (hidden + self.shortcut(hidden_states)) / self.output_scale_factor


class FusedHunyuanVideoResnetBlock(Fused, HunyuanVideoResnetBlockCausal3D):
    """The residual block of AutoencoderKLHunyuanVideo with its two pairs fused."""

    summary = "group_norm_silu"

    @staticmethod
    def fits(module: Any) -> bool:
        return _plain(module)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Map (B, C, T, X, Y) to (B, C', T, X, Y)."""
        if not self.fits(self):
            return super().forward(hidden_states)
        x = hidden_states.contiguous()
        hidden = self.conv1(norm_silu(self.norm1, x))  # (B, C', T, X, Y)
        hidden = self.conv2(self.dropout(norm_silu(self.norm2, hidden)))
        return hidden + (x if self.conv_shortcut is None else self.conv_shortcut(x))


class FusedCogVideoXResnetBlock3D(Fused, CogVideoXResnetBlock3D):
    """The residual block of AutoencoderKLCogVideoX's encoder with its two pairs fused.

    The decoder's blocks scale and shift between norm and SiLU by what the latents say, and are left alone.
    """

    summary = "group_norm_silu"

    @staticmethod
    def fits(module: Any) -> bool:
        return module.spatial_norm_dim is None and _plain(module)

    def forward(
        self,
        inputs: Tensor,
        temb: Tensor | None = None,
        zq: Tensor | None = None,
        conv_cache: dict[str, Tensor] | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Map (B, C, T, X, Y) to (B, C', T, X, Y); the second is what convolutions keep for later frames."""
        if zq is not None or not self.fits(self):
            return super().forward(inputs, temb, zq, conv_cache)
        before, after = conv_cache or {}, {}
        hidden = norm_silu(self.norm1, inputs)
        hidden, after["conv1"] = self.conv1(hidden, conv_cache=before.get("conv1"))  # (B, C', T, X, Y)
        if temb is not None:
            hidden = hidden + self.temb_proj(self.nonlinearity(temb))[:, :, None, None, None]
        hidden = self.dropout(norm_silu(self.norm2, hidden))
        hidden, after["conv2"] = self.conv2(hidden, conv_cache=before.get("conv2"))
        x = inputs
        if self.in_channels != self.out_channels:
            if self.use_conv_shortcut:
                x, after["conv_shortcut"] = self.conv_shortcut(x, conv_cache=before.get("conv_shortcut"))
            else:
                x = self.conv_shortcut(x)
        return hidden + x, after


class FusedMochiResnetBlock3D(Fused, MochiResnetBlock3D):
    """The residual block of AutoencoderKLMochi with its two pairs fused, all frames at once."""

    summary = "group_norm_silu"

    @staticmethod
    def fits(module: Any) -> bool:
        norms = (module.norm1, module.norm2)
        return (
            all(type(norm) is MochiChunkedGroupNorm3D for norm in norms)
            and all(type(norm.norm_layer) is nn.GroupNorm for norm in norms)
            and type(module.nonlinearity) is nn.SiLU
            and bare(*norms, *(norm.norm_layer for norm in norms), module.nonlinearity)
        )

    def forward(
        self, inputs: Tensor, conv_cache: dict[str, Tensor] | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Map (B, C, T, X, Y) to the same; the second is what convolutions keep for later frames."""
        if not self.fits(self):
            return super().forward(inputs, conv_cache)
        before, after = conv_cache or {}, {}
        hidden = _norm_silu_frames(self.norm1.norm_layer, inputs)  # (B, C, T, X, Y)
        hidden, after["conv1"] = self.conv1(hidden, conv_cache=before.get("conv1"))
        hidden = _norm_silu_frames(self.norm2.norm_layer, hidden)
        hidden, after["conv2"] = self.conv2(hidden, conv_cache=before.get("conv2"))
        return hidden + inputs, after


RULES: dict[type[nn.Module], type[Fused]] = {
    ResnetBlock2D: FusedResnetBlock2D,
    TemporalResnetBlock: FusedTemporalResnetBlock,
    EasyAnimateResidualBlock3D: FusedEasyAnimateResidualBlock3D,
    HunyuanVideoResnetBlockCausal3D: FusedHunyuanVideoResnetBlock,
    CogVideoXResnetBlock3D: FusedCogVideoXResnetBlock3D,
    MochiResnetBlock3D: FusedMochiResnetBlock3D,
}
