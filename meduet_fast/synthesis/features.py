"""Extract features on which sets of crops are compared: of tokenizer, encoder, or a user's network."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import torch
from monai.apps.generation.maisi.networks.autoencoderkl_maisi import MaisiEncoder
from torch import Tensor

from meduet_fast.autoencoder import Tokenizer
from meduet_fast.data.windows import window_starts
from meduet_fast.encoding.encode import window_stride
from meduet_fast.errors import UserError
from meduet_fast.models import MeDUET


class CropFactors(NamedTuple):
    """Content (N, D) and style (N, Ds) of N crops, means over their tokens, float32."""

    content: np.ndarray
    style: np.ndarray


@torch.inference_mode()
def crop_factors(model: MeDUET, crops: Tensor, batch_size: int = 64) -> CropFactors:
    """Encode crops as they are, with nothing of what surrounds them.

    Crops larger than the network's are encoded in windows that overlap by half; a token that several windows
    cover is their mean, as in :func:`~meduet_fast.encoding.encode.encode_latents`.

    Args:
        model: works on its own device.
        crops: latents (N, C, x, y, z), edges multiples of the patch size and at least the network's crop.
        batch_size: windows that are encoded at once.
    """
    size, patch = model.config.latent_size, model.config.patch_size
    starts = window_starts(crops.shape[2:], size, window_stride(model.config, None))  # W
    places = [tuple(slice(i // patch, (i + size) // patch) for i in start) for start in starts]
    times = torch.zeros([edge // patch for edge in crops.shape[2:]])  # (X', Y', Z'), windows over a token
    for place in places:
        times[place] += 1
    # Of each window's tokens, so that every token of the crop counts the same.
    weights = torch.stack([1 / times[place].flatten() for place in places]) / times.numel()  # (W, L)
    weights = weights.to(model.cls_token.device)
    content: list[Tensor] = []
    style: list[Tensor] = []
    for some in crops.split(max(1, batch_size // len(starts))):  # (B, C, x, y, z)
        windows = torch.stack(
            [some[:, :, x : x + size, y : y + size, z : z + size] for x, y, z in starts], 1
        )  # (B, W, C, S, S, S)
        factors = model(
            windows.flatten(0, 1).to(model.cls_token.device, torch.float32)
        )  # (B W, L, D), (B W, L, Ds)
        for kept, tokens in ((content, factors.content), (style, factors.style)):
            kept.append(torch.einsum("bwld,wl->bd", tokens.unflatten(0, (len(some), -1)), weights).cpu())
    return CropFactors(torch.cat(content).numpy(), torch.cat(style).numpy())


class FeatureNetwork(Protocol):
    """Give features of decoded crops.

    Attributes:
        name: for tables.
        note: what is to be known of it, a sentence.
    """

    name: str
    note: str

    def __call__(self, images: Sequence[Tensor]) -> np.ndarray:
        """Return (N, P, F) float32 of N images (X, Y, Z) in [0, 1]: F features in each of P planes."""


class TokenizerFeatures:
    """Give the mean of the deepest map of a tokenizer's encoder, before it becomes latents; P is 1."""

    name = "tokenizer"
    note = "the deepest map of the tokenizer's encoder, mean over the crop; the generator is not shown it"

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer

    @torch.inference_mode()
    def __call__(self, images: Sequence[Tensor]) -> np.ndarray:
        """Return (N, 1, F); see :class:`FeatureNetwork`."""
        encoder = self.tokenizer.network.encoder
        assert isinstance(encoder, MaisiEncoder)
        blocks = list(encoder.blocks)[:-2]  # without the last norm and the map to latents
        edge, rows = self.tokenizer.window, []
        for image in images:
            total, voxels = torch.zeros(()), 0
            for slab in image.split(edge, 0):
                for bar in slab.split(edge, 1):
                    for block in bar.split(edge, 2):
                        x = block[None, None].to(self.tokenizer.device)  # (1, 1, X, Y, Z)
                        for layer in blocks:
                            x = layer(x)  # (1, F, x, y, z) at last
                        total = total + block.numel() * x.mean((0, 2, 3, 4)).cpu()  # (F,)
                        voxels += block.numel()
            rows.append(total / voxels)
        return torch.stack(rows)[:, None].numpy()  # (N, 1, F)


class SliceFeatures:
    """Give the features of a user's TorchScript network on the middle slices of three planes; P is 3.

    The network takes (N, 3, H, W) float32 in [0, 1], grey repeated as three channels, rows from anterior or
    superior to the opposite, and returns (N, F). A TorchScript file holds code, which loading it may run.

    Args:
        path: the file.
        device: where it works.

    Raises:
        UserError: the file is no TorchScript network.
    """

    def __init__(self, path: Path, device: torch.device | str = "cpu") -> None:
        self.path, self.device, self.name = path, torch.device(device), path.stem
        self.note = f"{path.name} on the middle slices of three planes, distances averaged over the planes"
        try:
            self.network = torch.jit.load(str(path), map_location=self.device).eval()
        except (RuntimeError, ValueError, OSError) as error:
            found = str(error).strip().splitlines()[-1]
            raise UserError(f"{path}: expected a TorchScript network (torch.jit.save): {found}") from error

    @torch.inference_mode()
    def __call__(self, images: Sequence[Tensor]) -> np.ndarray:
        """Return (N, 3, F); see :class:`FeatureNetwork`.

        Raises:
            UserError: the network fails on slices, or returns something else than (N, F) finite numbers.
        """
        planes = []
        for axis in (2, 1, 0):
            slices = torch.stack(
                [image.select(axis, image.shape[axis] // 2).T.flip(0) for image in images]
            )  # (N, H, W)
            planes.append(self._features(slices[:, None].expand(-1, 3, -1, -1).to(self.device)))
        return torch.stack(planes, 1).numpy()  # (N, 3, F)

    def _features(self, slices: Tensor) -> Tensor:
        expected = f"expected ({len(slices)}, F) numbers of {tuple(slices.shape)} slices"
        try:
            found = self.network(slices.contiguous())  # (N, F)
        except RuntimeError as error:  # whatever the user's network raises becomes this
            raise UserError(f"{self.path}: {expected}: {str(error).strip().splitlines()[-1]}") from error
        if not isinstance(found, Tensor) or found.ndim != 2 or len(found) != len(slices):
            shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise UserError(f"{self.path}: {expected}, found {shape}")
        if not torch.isfinite(found).all():
            raise UserError(f"{self.path}: {expected}, found some that are not finite")
        return found.float().cpu()
