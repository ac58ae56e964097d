"""Encode whole scans: scan -> latents as `prepare` makes them -> maps of content and style.

The network sees a volume in overlapping windows of its own crop size. A token that several windows cover is
the mean of what they give.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from meduet_fast.autoencoder import Tokenizer, load_tokenizer
from meduet_fast.autoencoder.weights import BUILTIN
from meduet_fast.data.intensity import IntensityRule
from meduet_fast.data.sources import VolumeEntry
from meduet_fast.data.store_index import IMPORTED, StoreIndex, index_path, read_index
from meduet_fast.data.transforms import PreparedVolume, TransformConfig, load_volume
from meduet_fast.data.windows import window_starts
from meduet_fast.devices import select_device
from meduet_fast.engine.checkpoint import latest_checkpoint, read_run
from meduet_fast.errors import UserError, VolumeError, failures_of, printable
from meduet_fast.files import file_sha256, in_real_folder
from meduet_fast.models import MeDUET, MeDUETConfig
from meduet_fast.settings import FROM_1, POSITIVE, SettingError, check_numbers
from meduet_fast.weight_files import METADATA, read_file, weight_file

LONGEST = (512, 512, 1536)  # voxels of the prepared image that are encoded; of 1.5 mm, a whole body
ShowWindows = Callable[[int, int], None]  # takes how many were encoded just now, and how many the volume has


class FactorMaps(NamedTuple):
    """Hold the tokens of a whole volume.

    Attributes:
        content: (X, Y, Z, D) float32, on the CPU.
        style: (X, Y, Z, Ds) float32, on the CPU.
        first: latent voxel where the first patch begins, along each axis.
        windows: how many were encoded.
    """

    content: Tensor
    style: Tensor
    first: tuple[int, int, int]
    windows: int


def window_stride(config: MeDUETConfig, stride: int | None) -> int:
    """Return the latent voxels from window to window: half a crop in whole patches, if None is given.

    Raises:
        SettingError: if windows would not lie on the grid of patches, or leave gaps.
    """
    crop, patch = config.latent_size, config.patch_size
    if stride is None:
        return max(patch, crop // 2 // patch * patch)
    if stride % patch or not patch <= stride <= crop:
        expected = f"a multiple of the network's patch size, {patch}, up to its crop size, {crop}"
        raise SettingError("stride", f"found {stride}, expected {expected}")
    return stride


@torch.no_grad()  # what inference_mode gives could not be trained on
def encode_latents(
    model: MeDUET,
    latents: Tensor,
    stride: int | None = None,
    batch_size: int = 4,
    show: ShowWindows | None = None,
) -> FactorMaps:
    """Encode the latents of a whole volume in overlapping windows, and average the tokens where they overlap.

    No window is padded. If the volume's edges are no multiples of a patch, its patches lie in the middle: the
    rest, less than a patch, is shared by both ends and has no tokens.

    Args:
        model: works on its own device.
        latents: (C, x, y, z) of any floating type, each edge at least a crop's.
        stride: from window to window in latent voxels, a multiple of the patch size, up to the crop size; by
            default half a crop. The last window along an axis ends with the patches.
        batch_size: windows that are encoded at once.
        show: is told of every batch.

    Raises:
        ValueError: if the volume is smaller than a crop, or for another stride.
    """
    crop, patch = model.config.latent_size, model.config.patch_size
    side, stride = crop // patch, window_stride(model.config, stride)  # the former of a window in patches
    if min(latents.shape[1:]) < crop:
        raise ValueError(f"latents have shape {tuple(latents.shape)}, expected edges of {crop} or more")
    x, y, z = (edge // patch for edge in latents.shape[1:])  # patches along each axis
    i, j, k = (edge % patch // 2 for edge in latents.shape[1:])
    inner = latents[:, i:, j:, k:]  # (C, x', y', z') begins with the first patch
    corners = window_starts([patch * n for n in (x, y, z)], crop, stride)
    content = torch.zeros(x, y, z, model.config.embed_dim)  # (X, Y, Z, D)
    style = torch.zeros(x, y, z, model.config.style_dim)  # (X, Y, Z, Ds)
    counts = torch.zeros(x, y, z, 1)
    for done in range(0, len(corners), batch_size):
        batch = corners[done : done + batch_size]
        windows = torch.stack(
            [inner[:, a : a + crop, b : b + crop, c : c + crop] for a, b, c in batch]
        )  # (B, C, S, S, S)
        factors = model(windows.to(model.cls_token.device, torch.float32))  # (B, L, D) and (B, L, Ds)
        for corner, *tokens in zip(batch, factors.content.cpu(), factors.style.cpu(), strict=True):
            place = tuple(slice(start // patch, start // patch + side) for start in corner)
            for total, added in zip((content, style), tokens, strict=True):
                total[place] += added.unflatten(0, (side, side, side))  # (side, side, side, D or Ds)
            counts[place] += 1
        if show is not None:
            show(len(batch), len(corners))
    return FactorMaps(content.div_(counts), style.div_(counts), (i, j, k), len(corners))


@dataclass(frozen=True)
class Pretrained:
    """Hold a pretrained network, and what is known of where it comes from.

    Attributes:
        model: on the CPU, in eval mode.
        file: its weights.
        run: what the record of its run says; None if it is of no run.
        step: steps of the run that it was trained for; None if it is of no run.
        store: the run's latent store, as the record has it.
        index: of that store; None if it is not there.
    """

    model: MeDUET
    file: Path
    run: dict[str, Any] | None
    step: int | None
    store: str | None
    index: StoreIndex | None

    def record(self) -> dict[str, str]:
        """Return the file and its SHA-256, for tables."""
        return {"weights": printable(in_real_folder(self.file)), "weights_sha256": file_sha256(self.file)}


def load_pretrained(weights: Path) -> Pretrained:
    """Load a pretrained network.

    Args:
        weights: see :meth:`Encoder.load`.

    Raises:
        UserError: if it, its run's record or the index of the run's store can't be read.
    """
    file = teacher_file(weights)
    run = file.absolute().parent.parent.parent  # of RUN/checkpoints/STEP/teacher.safetensors
    of_run = file.parent.parent.name == "checkpoints" and (run / "run.json").is_file()
    record = read_run(run, of_checkpoint=False) if of_run else None
    store = record["data"] if record else None
    own = "meduet_config" in read_file(file).get(METADATA, {})
    model = MeDUET.from_pretrained(file) if own else MeDUET.from_reference(file)
    index = read_index(Path(store)) if store and index_path(Path(store)).exists() else None
    step = int(file.parent.name) if of_run and file.parent.name.isdigit() else None
    return Pretrained(model.eval(), file, record, step, store, index)


@contextmanager
def failures_of_memory(path: Path, device: torch.device) -> Iterator[None]:
    """Turn a lack of memory into the failure of one volume.

    Raises:
        VolumeError: what is done within does not fit into the memory of the device, or of the CPU.
    """
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise VolumeError(path, f"does not fit into the memory of {device}: {error}") from error
    except RuntimeError as error:
        if "memory" not in str(error):  # of the CPU's allocator, which has no error of its own
            raise
        raise VolumeError(path, f"does not fit into memory: {error}") from error


@dataclass(frozen=True)
class EncodedScan:
    """Hold the encoding of a whole scan.

    Attributes:
        entry: which it is.
        content: (X, Y, Z, D) float32, a token for each patch; axes RAS.
        style: (X, Y, Z, Ds) float32.
        pooled_content: (D,) mean over the tokens that show anything of the scan.
        pooled_style: (Ds,) of the same.
        affine: (4, 4) float64, from a token's indices to the middle of its patch in mm, RAS.
        intensity: the rule that was applied.
        windows: how many were encoded.
    """

    entry: VolumeEntry
    content: Tensor
    style: Tensor
    pooled_content: Tensor
    pooled_style: Tensor
    affine: np.ndarray
    intensity: IntensityRule
    windows: int

    @property
    def name(self) -> str:
        """Return its name, unique in its input."""
        return self.entry.name

    def record(self) -> dict[str, Any]:
        """Return all but the tokens, as JSON values."""
        return {
            "name": self.entry.name,
            "domain": self.entry.domain,
            "body_part": self.entry.body_part,
            "source": printable(in_real_folder(self.entry.path)),
            "intensity": asdict(self.intensity),
            "affine": self.affine.tolist(),
            "windows": self.windows,
        }


@dataclass(frozen=True)
class EncodeConfig:
    """Say how scans are encoded.

    Attributes:
        tokenizer: "builtin", or the path of a tokenizer, as for ``prepare``; by default the one that made the
            run's store, and the built-in one where there is no such store.
        spacing: mm between voxels of the prepared image; by default as in the run's store, else 1.5.
        stride: from window to window, in latent voxels: a multiple of the patch size, up to the crop size. By
            default half a crop.
        batch_size: windows that are encoded at once.
        device: where tokenizer and network work; "auto" takes CUDA where there is one.
        domain: data set of inputs that do not state one.
        intensity: what of a scan's values becomes [0, 1], for inputs that do not state it, such as
            {"kind": "ct_window", "low": -175, "high": 250}: as it was for the network's training.
        body_part: of inputs that do not state one.

    Raises:
        UserError: if a number is out of its range.
    """

    tokenizer: str | None = None
    spacing: float | None = None
    stride: int | None = None
    batch_size: int = 4
    device: str = "auto"
    domain: str | None = None
    intensity: IntensityRule | None = None
    body_part: str = "unknown"

    def __post_init__(self) -> None:
        check_numbers(self, POSITIVE, "spacing")
        check_numbers(self, FROM_1, "stride", "batch_size")


def teacher_file(weights: Path) -> Path:
    """Return the file of weights that a path stands for; of a run's folder its last checkpoint's teacher.

    Raises:
        UserError: if there is none.
    """
    if (weights / "checkpoints").is_dir():
        weights = latest_checkpoint(weights) / "teacher.safetensors"
    return weight_file(weights)


class Encoder:
    """Encode scans with one network and one tokenizer: ``Encoder.load("RUN").encode(entry)``.

    Args:
        model: in eval mode.
        tokenizer: what made the latents of its pretraining, on the same device. ``channels``, ``compression``
            and ``encode`` are used: anything with these will do.
        spacing: mm between voxels of the prepared image.
        stride, batch_size: see :func:`encode_latents`.
        about: what is known of where network and tokenizer come from, for tables.

    Raises:
        UserError: if they do not fit together.
    """

    def __init__(
        self,
        model: MeDUET,
        tokenizer: Tokenizer,
        spacing: float = 1.5,
        stride: int | None = None,
        batch_size: int = 4,
        about: Mapping[str, str] | None = None,
    ) -> None:
        if tokenizer.channels != model.config.in_channels:
            raise UserError(
                f"tokenizer {tokenizer.identity} makes latents of {tokenizer.channels} channels, the network "
                f"takes {model.config.in_channels}"
            )
        self.model, self.tokenizer, self.batch_size = model, tokenizer, batch_size
        self.stride = window_stride(model.config, stride)
        self.about = dict(about or {})
        # What is shorter than a crop is filled up with air, and nothing else; see ``encode``.
        edge = model.config.latent_size * tokenizer.compression
        self.transform = TransformConfig(spacing, LONGEST, min_size=edge, multiple=tokenizer.compression)

    @classmethod
    def load(cls, weights: Path | str, config: EncodeConfig | None = None) -> Encoder:
        """Load network and tokenizer.

        Args:
            weights: folder of a run, of whose last checkpoint the teacher is taken; a checkpoint's file; what
                ``meduet-fast export`` made of one ("meduet" or "reference"); or a published checkpoint.
            config: how scans are encoded.

        Raises:
            UserError: if one of them can't be read, the tokenizer is not the one that made the run's store,
                or they do not fit together.
        """
        config, found = config or EncodeConfig(), load_pretrained(Path(weights))
        device, index = select_device(config.device), found.index
        tokenizer, named_by = _load_tokenizer(config.tokenizer, found.store, index, device)
        spacing = config.spacing or (index.entries[0].spacing[0] if index and index.entries else 1.5)
        about = {**found.record(), "tokenizer_from": named_by}
        return cls(found.model.to(device), tokenizer, spacing, config.stride, config.batch_size, about)

    def latents(self, entry: VolumeEntry) -> tuple[Tensor, PreparedVolume]:
        """Read a scan, prepare it as ``prepare`` does, and make its latents.

        Returns:
            Latents (C, x, y, z), float32 on the tokenizer's device, at least a crop along every axis; and the
            prepared image.

        Raises:
            VolumeError: if the scan is unusable.
        """
        with failures_of(entry.path):
            volume = load_volume(entry, self.transform)
        latents = self.tokenizer.encode(volume.image[None].to(self.model.cls_token.device))[0]
        if not torch.isfinite(latents).all():
            raise VolumeError(entry.path, "its latents are not finite (NaN or Inf)")
        return latents, volume

    def encode(self, entry: VolumeEntry, show: ShowWindows | None = None) -> EncodedScan:
        """Encode a scan, window after window.

        Args:
            entry: one of those that ``find_volumes`` finds.
            show: is told of every batch of windows.

        Raises:
            VolumeError: if the scan is unusable.
        """
        with failures_of_memory(entry.path, self.model.cls_token.device):
            latents, volume = self.latents(entry)
            maps = encode_latents(self.model, latents, self.stride, self.batch_size, show)
        step = self.model.config.patch_size * self.tokenizer.compression  # of a patch in image voxels
        begin = np.array(maps.first) * self.tokenizer.compression  # (3,) image voxel of the first patch
        # The image is cut to the voxels above 0 before it is filled up: what lies beside them is filling.
        shown = volume.voxels > 0  # (x, y, z)
        scanned = []
        for axis in range(3):
            inside = np.flatnonzero(shown.any(axis=(axis - 1, axis - 2)))
            patches = (inside[[0, -1]] - begin[axis]) // step  # that have these voxels
            first, last = patches.clip(0, maps.content.shape[axis] - 1)
            scanned.append(slice(first, last + 1))
        to_voxels = np.diag([step, step, step, 1.0])  # (4, 4)
        to_voxels[:3, 3] = begin + (step - 1) / 2  # voxel 0's centre is at 0, the first patch's at its middle
        return EncodedScan(
            entry=entry,
            content=maps.content,
            style=maps.style,
            pooled_content=maps.content[tuple(scanned)].mean((0, 1, 2)),  # (D,)
            pooled_style=maps.style[tuple(scanned)].mean((0, 1, 2)),  # (Ds,)
            affine=volume.affine @ to_voxels,
            intensity=volume.intensity,
            windows=maps.windows,
        )

    def record(self) -> dict[str, str]:
        """Return what encodes, for tables."""
        config = self.model.config
        sizes = {"crop": config.latent_size, "patch": config.patch_size, "stride": self.stride}
        return {
            "tokenizer": self.tokenizer.identity,
            **self.about,
            "spacing": f"{self.transform.spacing:g}",
            **{name: str(size) for name, size in sizes.items()},
        }


def _load_tokenizer(
    spec: str | None, store: str | None, index: StoreIndex | None, device: torch.device
) -> tuple[Tokenizer, str]:
    """Load the tokenizer that is asked for, or else a run's, if it is the one that made the run's latents.

    Returns:
        The tokenizer, and what named it.
    """
    made_by = index.tokenizer if index else IMPORTED
    named_by = "as asked for"
    if spec is None and index is not None:
        if made_by == IMPORTED:
            raise UserError(
                f"{store}: its latents were imported, and what made them is not known: name the tokenizer "
                "with --tokenizer"
            )
        spec, named_by = index.tokenizer_spec, f"that of {printable(store)}"
    elif spec is None:
        gone = f"{printable(store)} is not there" if store else "no run's store is known"
        spec, named_by = BUILTIN, f"the built-in one, as {gone}"
        print(
            f"warning: the tokenizer is {named_by}: if the network was trained on another's latents, name it "
            "with --tokenizer, or the encoding means nothing",
            file=sys.stderr,
        )
    tokenizer = load_tokenizer(spec, device)
    if made_by not in (IMPORTED, tokenizer.identity):
        raise UserError(
            f"tokenizer {spec!r} is {tokenizer.identity}, the network was pretrained on latents of {made_by} "
            f"({store}): expected that one"
        )
    return tokenizer, named_by
