"""What the rest of the package knows of a tokenizer, and how to get one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path

import torch
from torch import Tensor

from meduet_fast.errors import UserError

BUILTIN = "builtin"
BUILTIN_WEIGHTS = Path(__file__).with_name("builtin.safetensors")


class Tokenizer(ABC):
    """Turns images into latents and back.

    Attributes:
        channels: latent channels C.
        compression: image voxels per latent voxel along each axis.
        scale: what the autoencoder's own latents are multiplied by to have about unit variance;
            :meth:`encode` has applied it, :meth:`decode` takes it out again.
        identity: name and short SHA-256 of the weights; latents of different identities do not mix.
    """

    channels: int
    compression: int
    scale: float
    identity: str

    @abstractmethod
    def encode(
        self, volume: Tensor, sample: bool = False, generator: torch.Generator | None = None
    ) -> Tensor:
        """Image to latents; large images go through in overlapping windows.

        Args:
            volume: (B, 1, X, Y, Z) with values in [0, 1]; X, Y, Z multiples of ``compression``.
            sample: draw from the posterior, mu + sigma * eps, instead of taking its mean mu.
            generator: source of eps, on the tokenizer's device; torch's default generator if None.

        Returns:
            (B, C, X / compression, Y / compression, Z / compression) float32 on the tokenizer's device.

        Raises:
            ValueError: for another shape.
        """

    @abstractmethod
    def decode(self, latents: Tensor) -> Tensor:
        """Latents to an image; large ones go through in overlapping windows.

        Args:
            latents: (B, C, x, y, z), any floating type, as :meth:`encode` makes them.

        Returns:
            (B, 1, x * compression, y * compression, z * compression) float32 in [0, 1].

        Raises:
            ValueError: for another shape.
        """


def load_tokenizer(spec: str = BUILTIN, device: torch.device | str = "cpu") -> Tokenizer:
    """The tokenizer that ``spec`` names.

    Args:
        spec: "builtin", or the path of a ``.safetensors`` file written by ``meduet-fast train-tokenizer``,
            or of MAISI's ``autoencoder.pt``.
        device: where its weights go and its work is done.

    Raises:
        UserError: if there is no such file, or it holds no weights of the expected kind.
    """
    # MONAI takes seconds to import; whoever only needs the interface does not wait for it.
    from .weights import load_maisi, load_safetensors

    if spec == BUILTIN:
        return load_safetensors(BUILTIN_WEIGHTS, name=BUILTIN).to(device)
    path = Path(spec).expanduser()
    if not path.is_file():
        raise UserError(f"tokenizer {spec!r}: expected 'builtin' or the path of a file, found no such file")
    if path.suffix == ".safetensors":
        return load_safetensors(path).to(device)
    return load_maisi(path).to(device)
