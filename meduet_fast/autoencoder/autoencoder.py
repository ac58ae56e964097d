"""Encode images as latents and decode them: MONAI's ``AutoencoderKlMaisi`` in overlapping windows."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import groupby

import torch
import torch.nn.functional as F
from monai.apps.generation.maisi.networks.autoencoderkl_maisi import AutoencoderKlMaisi, MaisiGroupNorm3D
from monai.data.utils import compute_importance_map, dense_patch_slices
from monai.inferers import sliding_window_inference
from torch import Tensor, nn


@dataclass(frozen=True)
class Architecture:
    """Size an ``AutoencoderKlMaisi`` (1 -> 1 channels, no attention), in MONAI's names.

    Attributes:
        num_channels: channels of each level, finest first; each level after the first halves the resolution.
        num_res_blocks: residual blocks of each level.
        norm_num_groups: groups of every group norm.
        latent_channels: channels of the latents.
    """

    num_channels: tuple[int, ...]
    num_res_blocks: tuple[int, ...]
    norm_num_groups: int
    latent_channels: int = 4

    @property
    def compression(self) -> int:
        """Return the image voxels per latent voxel along each axis."""
        return int(2 ** (len(self.num_channels) - 1))

    def build(self) -> AutoencoderKlMaisi:
        """Build the network, newly initialised.

        Raises:
            ValueError: if the sizes do not fit together (MONAI's message).
        """
        network = AutoencoderKlMaisi(
            spatial_dims=3,
            in_channels=1,
            out_channels=1,
            attention_levels=[False] * len(self.num_channels),
            norm_eps=1e-6,
            # MONAI's own memory savers are slow, and wrong for some sizes; our windows bound the memory.
            num_splits=1,
            norm_float16=False,
            save_mem=False,
            **asdict(self),
        )
        for module in list(network.modules()):
            for name, child in module.named_children():
                # MONAI's group norm loops over the groups; torch's gives the same numbers in one pass.
                if isinstance(child, MaisiGroupNorm3D):
                    setattr(module, name, nn.GroupNorm(child.num_groups, child.num_channels, child.eps))
        return network


# Spec section 1: the published tokenizer, 20.9 M parameters.
MAISI = Architecture(num_channels=(64, 128, 256), num_res_blocks=(2, 2, 2), norm_num_groups=32)


class Tokenizer:
    """Encode and decode with an ``AutoencoderKlMaisi``; large volumes go through in overlapping windows.

    Args:
        architecture: what ``network`` was built from.
        network: the autoencoder with its weights.
        name: first part of the identity.
        scale: what the autoencoder's own latents are multiplied by to have about unit variance;
            :meth:`encode` has applied it, :meth:`decode` takes it out again.
        window: longest edge that goes through the network at once (image voxels, a multiple of the
            compression).

    Attributes:
        channels: latent channels C.
        compression: image voxels per latent voxel along each axis.
        identity: name and short SHA-256 of the weights; latents of different identities do not mix.
    """

    OVERLAP = 16  # image voxels that neighbouring windows share
    SIGMA = 0.125  # of the Gaussian that a window is weighted by, in edges of it

    def __init__(
        self,
        architecture: Architecture,
        network: AutoencoderKlMaisi,
        name: str,
        scale: float = 1.0,
        window: int = 128,
    ) -> None:
        self.architecture, self.network, self.scale, self.window = architecture, network, scale, window
        self.channels = architecture.latent_channels
        self.compression = architecture.compression
        digest = hashlib.sha256()  # of names, shapes and values, however they were stored
        for key, weight in sorted(network.state_dict().items()):
            digest.update(f"{key}{tuple(weight.shape)}".encode())
            digest.update(weight.detach().to("cpu", torch.float32).contiguous().numpy().tobytes())
        self.identity = f"{name}-{digest.hexdigest()[:12]}"
        network.eval().requires_grad_(False)

    def to(self, device: torch.device | str) -> Tokenizer:
        """Move the weights to ``device`` and return the tokenizer."""
        self.network.to(device)
        return self

    @property
    def device(self) -> torch.device:
        """Return where the weights are."""
        return next(self.network.parameters()).device

    @torch.no_grad()
    def encode(
        self, volume: Tensor, sample: bool = False, generator: torch.Generator | None = None
    ) -> Tensor:
        """Encode images.

        Args:
            volume: (B, 1, X, Y, Z) with values in [0, 1]; X, Y, Z multiples of ``compression``.
            sample: draw from the posterior, mu + sigma * eps, instead of taking its mean mu.
            generator: source of eps, on the tokenizer's device; torch's default generator if None.

        Returns:
            (B, C, X / compression, Y / compression, Z / compression) float32 on the tokenizer's device.

        Raises:
            ValueError: for another shape.
        """
        if volume.ndim != 5 or volume.shape[1] != 1 or any(n % self.compression for n in volume.shape[2:]):
            raise ValueError(
                f"encode: found shape {tuple(volume.shape)}, expected (B, 1, X, Y, Z) "
                f"with X, Y, Z multiples of {self.compression}"
            )
        mu, sigma = self._in_windows(volume, self.network.encode, voxels=1)  # (B, C, x, y, z) each
        if sample:
            # Drawn after the windows are blended: the noise keeps its variance where they overlap.
            mu = mu + sigma * torch.randn(sigma.shape, generator=generator, device=sigma.device)
        return mu * self.scale

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Decode latents (B, C, x, y, z), of any floating type, as :meth:`encode` makes them.

        Returns:
            (B, 1, x * compression, y * compression, z * compression) float32 in [0, 1].

        Raises:
            ValueError: for another shape.
        """
        if latents.ndim != 5 or latents.shape[1] != self.channels:
            raise ValueError(
                f"decode: found shape {tuple(latents.shape)}, expected (B, {self.channels}, x, y, z)"
            )
        (image,) = self._in_windows(
            latents / self.scale, lambda z: (self.network.decode(z),), voxels=self.compression
        )  # (B, 1, X, Y, Z)
        return image.clamp_(0, 1)

    @torch.no_grad()
    def decode_parts(self, latents: Tensor) -> Iterator[tuple[tuple[slice, slice, slice], Tensor]]:
        """Decode one volume slab after slab along its longest axis, the same windows blended as the same.

        What this takes of memory beside the latents does not grow with that axis.

        Args:
            latents: (C, x, y, z) of any floating type, as :meth:`encode` makes them.

        Yields:
            Where a slab lies in the image, and the slab (X', Y', Z'), float32 in [0, 1] on the tokenizer's
            device. In the order of the axis they cover the image once.

        Raises:
            ValueError: for another shape.
        """
        if latents.ndim != 4 or latents.shape[0] != self.channels:
            raise ValueError(
                f"decode_parts: found shape {tuple(latents.shape)}, expected ({self.channels}, x, y, z)"
            )
        factor, shape = self.compression, tuple(latents.shape[1:])
        axis, overlap = max(range(3), key=lambda number: shape[number]), self.OVERLAP // factor
        edges = [_window_edge(size, self.window // factor, overlap, 1) for size in shape]
        if edges == list(shape):
            whole = slice(0, factor * shape[0]), slice(0, factor * shape[1]), slice(0, factor * shape[2])
            yield whole, self.decode(latents[None])[0, 0]
            return
        weight = compute_importance_map(tuple(edges), "gaussian", self.SIGMA, self.device)  # (x', y', z')
        weight = F.interpolate(weight[None, None], scale_factor=factor)[0, 0]  # (X', Y', Z')
        windows = dense_patch_slices(
            shape,
            edges,
            [max(1, edge - overlap * (edge < size)) for edge, size in zip(edges, shape, strict=True)],
        )
        slab = [factor * (edges[axis] if number == axis else size) for number, size in enumerate(shape)]
        total, weights = torch.zeros(2, *slab, device=self.device)  # (X, Y, Z) each, short along the axis
        begin = 0  # of the slab, in latent voxels
        by_start = groupby(sorted(windows, key=lambda one: one[axis].start), lambda one: one[axis].start)
        for start, group in [*((start, list(group)) for start, group in by_start), (shape[axis], [])]:
            done = factor * (start - begin)  # of the slab's voxels, where no more windows are to come
            if done:
                place = [slice(0, factor * size) for size in shape]
                place[axis] = slice(factor * begin, factor * start)
                part = total.narrow(axis, 0, done) / weights.narrow(axis, 0, done)
                yield (place[0], place[1], place[2]), part.clamp_(0, 1)
                for values in (total, weights):
                    kept = values.narrow(axis, done, slab[axis] - done).clone()
                    values.zero_().narrow(axis, 0, slab[axis] - done).copy_(kept)
            begin = start
            for window in group:
                inside = [slice(factor * part.start, factor * part.stop) for part in window]
                inside[axis] = slice(0, slab[axis])
                box = (slice(None), *window)
                x = (latents[box][None] / self.scale).to(self.device, torch.float32)  # (1, C, x, y, z)
                total[tuple(inside)] += weight * self.network.decode(x)[0, 0]  # (x', y', z')
                weights[tuple(inside)] += weight

    def _in_windows(
        self, x: Tensor, network: Callable[[Tensor], tuple[Tensor, ...]], voxels: int
    ) -> tuple[Tensor, ...]:
        """Apply ``network`` to ``x`` (B, C, X, Y, Z), in blended overlapping windows if it is large.

        ``voxels`` is the edge, in image voxels, of one element of ``x``.
        """
        x = x.to(self.device, torch.float32)
        overlap = self.OVERLAP // voxels
        step = self.compression // voxels  # windows must start at whole latent voxels
        edges = tuple(_window_edge(size, self.window // voxels, overlap, step) for size in x.shape[2:])
        if edges == tuple(x.shape[2:]):
            return network(x)
        blended = sliding_window_inference(
            x,
            roi_size=edges,
            sw_batch_size=1,
            predictor=network,
            # MONAI steps by int(edge * (1 - overlap)); the half keeps rounding from making that one less.
            overlap=[(overlap - 0.5) / edge for edge in edges],
            mode="gaussian",
            sigma_scale=self.SIGMA,
        )
        return (blended,) if isinstance(blended, Tensor) else tuple(blended)  # MONAI unpacks a tuple of one


def _window_edge(size: int, longest: int, overlap: int, multiple: int) -> int:
    """Return the edge of the equal windows, at most ``longest``, that cover ``size`` with the least work."""
    if size <= longest:
        return size
    count = math.ceil((size - overlap) / (longest - overlap))
    return math.ceil((size + (count - 1) * overlap) / count / multiple) * multiple
