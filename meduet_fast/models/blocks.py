"""Transformer blocks with timm's parameter names, and fixed 3D sine-cosine positions.

Shapes: B sequences of N tokens of width D; H heads of width d = D / H.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from meduet_fast.kernels.dtypes import at_least_float32, autocast_dtype
from meduet_fast.layers import attention, sincos_positions_3d

Gelu = Literal["exact", "tanh"]


class HeadNorm(nn.RMSNorm):
    """RMS norm of heads, in float32 at least; keeps the dtype, which attention wants the same everywhere."""

    def __init__(self, dim: int) -> None:
        super().__init__(dim, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        wide = at_least_float32(x)  # (B, H, N, d)
        return (F.rms_norm(wide, self.normalized_shape, eps=self.eps) * self.weight).to(x.dtype)


class Attention(nn.Module):
    """Multi-head self-attention, computed as :func:`~meduet_fast.layers.set_attention_backend` says.

    Args:
        dim: D.
        num_heads: H.
        qk_norm: whether queries and keys get a learnt RMS norm, which bounds their products.
    """

    def __init__(self, dim: int, num_heads: int, qk_norm: bool = False) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.q_norm = HeadNorm(dim // num_heads) if qk_norm else nn.Identity()
        self.k_norm = HeadNorm(dim // num_heads) if qk_norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        batch, length, dim = x.shape  # (B, N, D)
        qkv = self.qkv(x).view(batch, length, 3, self.num_heads, dim // self.num_heads)  # (B, N, 3, H, d)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # (B, H, N, d) each
        query, key = self.q_norm(query), self.k_norm(key)  # (B, H, N, d) each
        attended = attention.attend(query, key, value)  # (B, H, N, d)
        return self.proj(attended.transpose(1, 2).reshape(batch, length, dim))  # (B, N, D)


class Mlp(nn.Module):
    """Linear, GELU, Linear.

    Args:
        dim: D.
        hidden_dim: between the two.
        gelu: "exact", by erf; "tanh", its approximation.
    """

    def __init__(self, dim: int, hidden_dim: int, gelu: Gelu = "exact") -> None:
        super().__init__()
        self.approximate = "none" if gelu == "exact" else "tanh"
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.fc1(x), approximate=self.approximate)  # (B, N, hidden)
        return self.fc2(x)  # (B, N, D)


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float, eps: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=eps)
        self.attn = Attention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, eps=eps)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))  # (B, N, D)
        return x + self.mlp(self.norm2(x))  # (B, N, D)


def residual_stream(tokens: Tensor) -> Tensor:
    """Widen what blocks add to: to float32 under autocast, where bfloat16 would round every sum.

    Source: so it is in the published step, whose positions are float32.
    """
    return tokens if autocast_dtype(tokens) is None else tokens.float()


def sincos_positions(dim: int, grid: int) -> Tensor:
    """Compute fixed positions of a cubic token grid, with a zero row for CLS in front.

    Args:
        dim: width, a multiple of 6.
        grid: tokens along each axis.

    Returns:
        (1, 1 + grid^3, dim) float32.
    """
    table = sincos_positions_3d(dim, (grid, grid, grid))  # (L, D)
    return torch.cat([table.new_zeros(1, dim), table]).unsqueeze(0)  # (1, 1+L, D)
