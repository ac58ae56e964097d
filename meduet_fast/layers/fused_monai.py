"""Drop-in classes for MONAI's modules, see ``fused.py``. MONAI 1.6 is imported here and nowhere else."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from monai.apps.generation.maisi.networks.autoencoderkl_maisi import MaisiGroupNorm3D, MaisiResBlock
from monai.networks.blocks.crossattention import CrossAttentionBlock
from monai.networks.blocks.patchembedding import PatchEmbeddingBlock
from monai.networks.blocks.selfattention import SABlock
from monai.networks.nets.autoencoderkl import AEKLResBlock
from monai.networks.nets.diffusion_model_unet import DiffusionUNetResnetBlock
from monai.networks.nets.swin_unetr import WindowAttention
from monai.utils.type_conversion import convert_to_tensor
from torch import Tensor, nn

from meduet_fast.kernels import autocast_dtype, group_norm_silu, patch_embed_3d, transformed

from .fused import Fused, PatchConv3d, bare, cut_to_patches, norm_silu

# Patch embeddings


def _known_linear(embedding: Any) -> bool:
    """Tell whether a "perceptron" is what it is in MONAI: Rearrange, which knows the patch, and Linear."""
    if type(embedding) is not nn.Sequential or len(embedding) != 2 or type(embedding[1]) is not nn.Linear:
        return False
    edges = getattr(embedding[0], "axes_lengths", {})
    return sorted(edges) == ["p1", "p2", "p3"] and bare(embedding, *embedding)


class FusedPatchEmbeddingBlock(Fused, PatchEmbeddingBlock):
    """Patches, projection and positions in one pass, for both kinds of projection."""

    summary = "patch_embed_3d"

    @staticmethod
    def fits(module: Any) -> bool:
        embedding = module.patch_embeddings
        if module.proj_type == "conv":
            known = type(embedding) in (nn.Conv3d, PatchConv3d)
            return known and bare(embedding) and PatchConv3d.fits(embedding)
        return _known_linear(embedding)

    @staticmethod
    def parts(module: Any) -> list[nn.Module]:
        return list(module.patch_embeddings.modules())

    def forward(self, x: Tensor) -> Tensor:
        """Embed (B, C, X, Y, Z) as tokens (B, L, D)."""
        if not self.fits(self) or x.dim() != 5:
            return super().forward(x)
        embedding: Any = self.patch_embeddings
        if self.proj_type == "conv":
            weight, bias = embedding.weight, embedding.bias
            x = cut_to_patches(x, tuple(weight.shape[2:]))
        else:
            weight, bias = embedding[1].weight, embedding[1].bias
            edges = embedding[0].axes_lengths
            # A token is ordered (p1, p2, p3, c) here, a Conv3d weight (c, p1, p2, p3).
            weight = weight.unflatten(1, (edges["p1"], edges["p2"], edges["p3"], -1)).permute(0, 4, 1, 2, 3)
        # Where positions are wider than the product (autocast), so is their sum.
        position = self.position_embeddings
        product = autocast_dtype(x) or weight.dtype
        if position.dtype == product and position.shape[0] == 1:
            return self.dropout(patch_embed_3d(x, weight, bias, position[0]))
        return self.dropout(patch_embed_3d(x, weight, bias) + position)


# Attention


def _plain_attention(module: Any) -> bool:
    """Tell whether scores have the values' dtype, nobody wants to see them, and nothing is fused already."""
    return not (
        module.use_flash_attention
        or module.save_attn
        or module.rel_positional_embedding is not None
        or module.attention_dtype is not None
    ) and bare(module.input_rearrange, module.out_rearrange, module.drop_weights)


def _attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool
) -> Tensor:
    """Attend: (B, N, H*d) and twice (B, M, H*d) -> (B, N, H*d)."""
    query, key, value = (
        item.unflatten(2, (module.num_heads, -1)).transpose(1, 2) for item in (query, key, value)
    )  # (B, H, N or M, d)
    dropout = module.drop_weights.p if module.drop_weights.training else 0.0
    y = F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, dropout_p=dropout, is_causal=causal, scale=module.scale
    )  # (B, H, N, d)
    return y.transpose(1, 2).flatten(2)  # (B, N, H*d)


class FusedSABlock(Fused, SABlock):
    """Self-attention without the N x N scores in memory; with them within transforms of torch.func.

    A row whose mask leaves nothing to attend to gives zeros, where the original gives NaN.
    """

    summary = "scaled_dot_product_attention"

    @staticmethod
    def fits(module: Any) -> bool:
        return _plain_attention(module)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        """Attend among (B, N, C); ``attn_mask`` (B, N), where not causal, is 0 for tokens to leave out."""
        # Fused attention has no forward-mode derivative.
        if not self.fits(self) or transformed() or (self.causal and attn_mask is not None):
            return super().forward(x, attn_mask)
        if self.use_combined_linear:
            query, key, value = self.qkv(x).chunk(3, -1)
        else:
            query, key, value = self.to_q(x), self.to_k(x), self.to_v(x)
        mask = None if attn_mask is None else (attn_mask != 0)[:, None, None]  # (B, 1, 1, N)
        y = _attend(self, query, key, value, mask, self.causal)  # (B, N, H*d)
        return self.drop_output(self.out_proj(y) if self.include_fc else y)


class FusedCrossAttentionBlock(Fused, CrossAttentionBlock):
    """Cross-attention without the scores in memory; with them within transforms of torch.func."""

    summary = "scaled_dot_product_attention"

    @staticmethod
    def fits(module: Any) -> bool:
        return _plain_attention(module) and not module.causal

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Attend from (B, N, C) to a context (B, M, D), or among themselves."""
        if not self.fits(self) or transformed():
            return super().forward(x, context)
        seen = x if context is None else context
        y = _attend(self, self.to_q(x), self.to_k(seen), self.to_v(seen), None, causal=False)
        return self.drop_output(self.out_proj(y))


class FusedWindowAttention(Fused, WindowAttention):
    """Attention within Swin's windows, biases of positions and of shifted windows added by the operation."""

    summary = "scaled_dot_product_attention"

    @staticmethod
    def fits(module: Any) -> bool:
        return bare(module.softmax, module.attn_drop)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Attend within windows (B*W, N, C); ``mask`` (W, N, N) is added to the scores of each."""
        # MONAI's own option is fused, too, but without gradients alone.
        fused_already = self.use_flash_attention and not torch.is_grad_enabled()
        if fused_already or not self.fits(self) or transformed():
            return super().forward(x, mask)
        _, length, width = x.shape
        qkv = self.qkv(x).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)  # (3, B*W, H, N, d)
        positions: Any = self.relative_position_index  # (N', N') of a whole window, N' >= N
        index = positions[:length, :length].flatten()
        bias = self.relative_position_bias_table[index].T.unflatten(1, (length, length))  # (H, N, N)
        bias = bias[None]  # (1, H, N, N)
        if mask is not None:
            # The bias is the same in every sample: its windows stand beside their heads, samples before them.
            bias = (bias + mask[:, None]).flatten(0, 1)[None]  # (1, W*H, N, N)
            qkv = qkv.unflatten(1, (-1, mask.shape[0])).flatten(2, 3)  # (3, B, W*H, N, d)
        query, key, value = qkv
        y = F.scaled_dot_product_attention(
            query, key, value, attn_mask=bias.to(query.dtype), scale=self.scale,
            dropout_p=self.attn_drop.p if self.attn_drop.training else 0.0,
        )  # fmt: skip
        y = y.reshape(-1, self.num_heads, length, width // self.num_heads)  # (B*W, H, N, d)
        return self.proj_drop(self.proj(y.transpose(1, 2).flatten(2)))  # (B*W, N, C)


# GroupNorm and SiLU. A convolution follows in each, so under autocast nothing is lost by a narrow result.


class FusedDiffusionUNetResnetBlock(Fused, DiffusionUNetResnetBlock):
    """The residual block of MONAI's diffusion U-Nets with its two pairs of GroupNorm and SiLU fused."""

    summary = "group_norm_silu"

    @staticmethod
    def fits(module: Any) -> bool:
        return (
            module.spatial_dims == 3
            and type(module.norm1) is type(module.norm2) is nn.GroupNorm
            and type(module.nonlinearity) is nn.SiLU
            and bare(module.norm1, module.norm2, module.nonlinearity)
        )

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """Map (B, C, X, Y, Z) and the embedded time (B, E) to (B, C', X', Y', Z')."""
        if not self.fits(self):
            return super().forward(x, emb)
        hidden = norm_silu(self.norm1, x)
        resample = self.upsample if self.upsample is not None else self.downsample
        if resample is not None:
            x, hidden = resample(x), resample(hidden)
        time = self.time_emb_proj(self.nonlinearity(emb))  # (B, C')
        hidden = self.conv1(hidden) + time[:, :, None, None, None]
        return self.skip_connection(x) + self.conv2(norm_silu(self.norm2, hidden))


class FusedAEKLResBlock(Fused, AEKLResBlock):
    """The residual block of MONAI's AutoencoderKL with its two pairs of GroupNorm and SiLU fused."""

    summary = "group_norm_silu"

    @staticmethod
    def fits(module: Any) -> bool:
        norms = (module.norm1, module.norm2)
        return all(type(norm) is nn.GroupNorm for norm in norms) and bare(*norms)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, X, Y, Z) to (B, C', X, Y, Z); 2D maps run the original."""
        if not self.fits(self) or x.dim() != 5:
            return super().forward(x)
        hidden = self.conv1(norm_silu(self.norm1, x))
        return self.nin_shortcut(x) + self.conv2(norm_silu(self.norm2, hidden))


def _plain_maisi_norm(norm: Any) -> bool:
    return not norm.norm_float16 and not norm.print_info


class FusedMaisiResBlock(Fused, MaisiResBlock):
    """MAISI's residual block with its two pairs of GroupNorm and SiLU fused.

    Where ``save_mem`` emptied CUDA's cache between them there is nothing left to empty.
    """

    summary = "group_norm_silu"

    @staticmethod
    def fits(module: Any) -> bool:
        norms = (module.norm1, module.norm2)
        known = all(type(norm) is MaisiGroupNorm3D and _plain_maisi_norm(norm) for norm in norms)
        return known and bare(*norms)

    @staticmethod
    def parts(module: Any) -> list[nn.Module]:
        return [module.norm1, module.norm2]

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, X, Y, Z) to (B, C', X, Y, Z)."""
        if not self.fits(self):
            return super().forward(x)
        hidden = self.conv1(norm_silu(self.norm1, x))
        hidden = self.conv2(norm_silu(self.norm2, hidden))
        out: Tensor = convert_to_tensor(self.nin_shortcut(x) + hidden)
        return out


class FusedMaisiGroupNorm3D(Fused, MaisiGroupNorm3D):
    """MAISI's GroupNorm without the loop over groups; float32 like the original."""

    summary = "group_norm_silu, activation=False"

    @staticmethod
    def fits(module: Any) -> bool:
        return _plain_maisi_norm(module)

    def forward(self, input: Tensor) -> Tensor:
        """Normalise (B, C, X, Y, Z), in float32."""
        if not self.fits(self) or input.dim() != 5:
            return super().forward(input)
        return group_norm_silu(
            input.to(torch.float32), self.num_groups, self.weight, self.bias, self.eps, activation=False
        )


RULES: dict[type[nn.Module], type[Fused]] = {
    PatchEmbeddingBlock: FusedPatchEmbeddingBlock,
    SABlock: FusedSABlock,
    CrossAttentionBlock: FusedCrossAttentionBlock,
    WindowAttention: FusedWindowAttention,
    DiffusionUNetResnetBlock: FusedDiffusionUNetResnetBlock,
    AEKLResBlock: FusedAEKLResBlock,
    MaisiResBlock: FusedMaisiResBlock,
    MaisiGroupNorm3D: FusedMaisiGroupNorm3D,
}
