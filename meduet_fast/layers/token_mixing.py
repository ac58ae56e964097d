"""Mixing of two sources in one token sequence as a module, for any token model."""

from __future__ import annotations

from torch import Tensor, nn

from meduet_fast.kernels import demix_tokens, mix_tokens, remix_tokens


class TokenMixer(nn.Module):
    """Mixes every sample's tokens with those of its batch-flip partner, and takes them apart again.

    Args:
        num_second: ones in each row of the masks; half of the tokens if None.
    """

    def __init__(self, num_second: int | None = None) -> None:
        super().__init__()
        self.num_second = num_second

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """:meth:`mix`."""
        return self.mix(x, mask)

    def mix(self, x: Tensor, mask: Tensor) -> Tensor:
        """(B, L, D) and (B, L) -> (B, L, D): the partner's token where the mask is 1."""
        return mix_tokens(x, mask)

    def demix(self, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """(B, L, D) -> own tokens (B, L-n, D) and the partner's (B, n, D), each in raster order."""
        return demix_tokens(x, mask, self.num_second)

    def remix(self, z1: Tensor, z2: Tensor, mask: Tensor) -> Tensor:
        """The inverse of :meth:`demix`."""
        return remix_tokens(z1, z2, mask)
