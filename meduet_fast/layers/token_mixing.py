"""Mix two sources in one token sequence, for any token model."""

from __future__ import annotations

from torch import Tensor, nn

from meduet_fast.kernels import demix_tokens, mix_tokens, remix_tokens


class TokenMixer(nn.Module):
    """Mixer of every sample's tokens with those of its batch-flip partner, which takes them apart again.

    For token models of one's own. MeDUET mixes within its patch embedding and takes apart within the assembly
    of its decoder's streams.

    Args:
        num_second: ones in each row of the masks; half of the tokens if None.
    """

    def __init__(self, num_second: int | None = None) -> None:
        super().__init__()
        self.num_second = num_second

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """Do as :meth:`mix`."""
        return self.mix(x, mask)

    def mix(self, x: Tensor, mask: Tensor) -> Tensor:
        """Take the partner's token where the mask (B, L) is 1: (B, L, D) -> (B, L, D)."""
        return mix_tokens(x, mask)

    def demix(self, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Split (B, L, D) into own tokens (B, L-n, D) and the partner's (B, n, D), each in raster order."""
        return demix_tokens(x, mask, self.num_second)

    def remix(self, z1: Tensor, z2: Tensor, mask: Tensor) -> Tensor:
        """Undo :meth:`demix`."""
        return remix_tokens(z1, z2, mask)
