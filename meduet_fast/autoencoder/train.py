"""Train a small tokenizer on one's own volumes, as a task of the engine: ``meduet-fast train-tokenizer``."""

from __future__ import annotations

import hashlib
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from monai.apps.generation.maisi.networks.autoencoderkl_maisi import AutoencoderKlMaisi
from monai.metrics import PSNRMetric, SSIMMetric
from monai.transforms import CenterSpatialCrop
from safetensors.torch import load_file
from torch import Tensor, nn

from meduet_fast.data.folders import format_left_out
from meduet_fast.data.held_out import held_out_start
from meduet_fast.data.sources import find_volumes
from meduet_fast.data.transforms import TransformConfig, load_volume
from meduet_fast.devices import select_device
from meduet_fast.engine import AdamWConfig, Batch, Batches, EngineConfig, FitResult, Task, fit
from meduet_fast.engine.checkpoint import latest_checkpoint
from meduet_fast.engine.metrics import first_and_last, read_metrics
from meduet_fast.engine.precision import Precision
from meduet_fast.engine.step import batch_generator
from meduet_fast.errors import UserError, VolumeError, failures_of
from meduet_fast.lock import FolderLock
from meduet_fast.progress import track
from meduet_fast.settings import FROM_0, FROM_1, POSITIVE, Range, check_numbers

from .autoencoder import Architecture, Tokenizer
from .identity_init import pass_images_through
from .weights import save_safetensors

EVALUATION_CROPS = 8  # of every volume
EVALUATION_CANDIDATES = 32
GAIN_CROP = 12  # edge in latent voxels


@dataclass(frozen=True)
class TokenizerTrainingConfig(EngineConfig):
    """Settings of :func:`train_tokenizer`. Volumes are held in memory: ``workers`` has nothing to read.

    Attributes:
        steps: optimiser steps.
        batch_size: crops of a step and device; every domain appears equally often over the steps.
        crop_size: edge of a crop in voxels of the prepared grid, a multiple of the compression.
        learning_rate: highest rate of AdamW; a short warm-up, then a cosine down to 0.
        gradient_weight: weight of the L1 distance between finite differences: keeps edges and texture.
        kl_weight: weight of the KL divergence of the posterior from a unit normal (nats per latent value).
        held_out_fraction: part of axis 0 of every volume that is kept from training, and measured on.
        precision: "bfloat16" halves the time on processors and GPUs with bfloat16 arithmetic.
        num_channels: channels of each level of the network, finest first.
        num_res_blocks: residual blocks of each level.
        norm_num_groups: groups of every group norm; divides all channels.
    """

    steps: int = 8000
    batch_size: int = 1
    crop_size: int = 32
    learning_rate: float = 3e-4
    gradient_weight: float = 0.5
    kl_weight: float = 1e-5
    held_out_fraction: float = 0.3
    precision: Precision = "float32"
    keep_checkpoints: int = 1
    num_channels: tuple[int, ...] = (16, 16, 32)
    num_res_blocks: tuple[int, ...] = (1, 2, 2)
    norm_num_groups: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_numbers(self, FROM_1, "crop_size", "num_channels", "num_res_blocks", "norm_num_groups")
        check_numbers(self, Range(0, 1, above=True, below=True), "held_out_fraction")
        check_numbers(self, POSITIVE, "learning_rate")
        check_numbers(self, FROM_0, "gradient_weight", "kl_weight")


class AutoencoderTraining(Task):
    """An autoencoder whose call is the losses of a batch of images.

    Args:
        config: of the run.
        architecture: of the network, which starts as an autoencoder already (see ``identity_init``).

    Raises:
        UserError: for sizes that do not go together.
    """

    title, sample = "Training tokenizer", "crop"

    def __init__(self, config: TokenizerTrainingConfig, architecture: Architecture) -> None:
        super().__init__()
        self.config, self.architecture = config, architecture
        self.adamw = AdamWConfig(
            config.learning_rate, initial_learning_rate=0.02 * config.learning_rate, final_learning_rate=0.0,
            warmup_steps=min(50, config.steps // 10), beta2=0.99, weight_decay=1e-4,
        )  # fmt: skip
        try:
            self.network: AutoencoderKlMaisi = architecture.build()
            pass_images_through(self.network)
        except ValueError as error:
            raise UserError(f"num_channels, num_res_blocks, norm_num_groups: {error}") from error

    def prepare(self, batch: Batch, generator: torch.Generator) -> Batch:
        """Draw the posterior's noise for images (B, 1, s, s, s): (B, 4, s/c, s/c, s/c)."""
        images = batch["images"]
        edge = images.shape[-1] // self.architecture.compression
        size = len(images), self.network.latent_channels, edge, edge, edge
        return {"images": images, "noise": torch.randn(size, generator=generator, device=images.device)}

    def forward(self, batch: Batch, step: int) -> dict[str, Tensor]:
        """Return ``l1``, ``edges``, ``kl`` and their weighted sum ``total``."""
        images = batch["images"]  # (B, 1, s, s, s)
        mu, sigma = (moment.float() for moment in self.network.encode(images))  # (B, 4, s/c, s/c, s/c)
        error = self.network.decode(mu + sigma * batch["noise"]).float() - images  # (B, 1, s, s, s)
        edges = torch.stack([error.diff(dim=axis).abs().mean() for axis in range(2, error.ndim)]).mean()
        # The mean error of a crop counts by its square: in the L1 term it would push all weights the same
        # way, and with the same force however small it is; training would swing about the right brightness.
        offset = error.mean(dim=(1, 2, 3, 4), keepdim=True)  # (B, 1, 1, 1, 1)
        l1 = (error - offset).abs().mean() + offset.square().mean()
        kl = 0.5 * (mu.square() + sigma.square() - 2 * sigma.log() - 1).mean()
        total = l1 + self.config.gradient_weight * edges + self.config.kl_weight * kl
        return {"l1": l1, "edges": edges, "kl": kl, "total": total}

    def exports(self) -> Mapping[str, nn.Module]:
        """Return the network."""
        return {"network": self.network}


@dataclass
class _Volume:
    domain: str
    image: Tensor  # (1, X, Y, Z) float32 in [0, 1]
    held_out: int  # first index along X that is not trained on


class VolumeCrops(Batches):
    """Random crops of volumes in memory, ``images`` (B, 1, s, s, s): domains in turn, any volume of each.

    Raises:
        UserError: for unreadable volumes, or one that can't hold a training crop and a held-out crop.
    """

    def __init__(self, path: Path, config: TokenizerTrainingConfig, multiple: int) -> None:
        self.path, self._config, self.volumes = path, config, list[_Volume]()
        listing = find_volumes(path)
        for item in listing.left_out:
            if item.asked:
                raise VolumeError(item.path, item.reason)
        for line in format_left_out(listing.left_out):
            print(line, file=sys.stderr)
        for entry in track(listing.volumes, "Reading volumes", unit="volume"):
            try:
                with failures_of(entry.path):
                    image = load_volume(entry, TransformConfig(multiple=multiple)).image  # (1, X, Y, Z)
            except VolumeError as error:
                raise VolumeError(error.path, entry.tell(error.reason)) from error
            try:
                start = held_out_start(image.shape[1], config.held_out_fraction, config.crop_size)
                if min(image.shape[2:]) < config.crop_size:
                    size = tuple(image.shape[1:])
                    raise UserError(f"{size} voxels cannot hold a crop of {config.crop_size}")
            except UserError as error:
                raise VolumeError(entry.path, entry.tell(str(error))) from error
            self.volumes.append(_Volume(entry.domain, image, start))
        digest = hashlib.sha256()
        for volume in self.volumes:
            digest.update(volume.domain.encode() + volume.image.numpy().tobytes())
        self.identity = digest.hexdigest()

    def read(self, first: int, last: int, rank: int, size: int, pin: bool) -> Iterator[Batch]:
        """Yield this process's share; see :class:`~meduet_fast.engine.Batches`."""
        domains = sorted({volume.domain for volume in self.volumes})
        for number in range(first + rank, last, size):
            generator = batch_generator(self._config.seed, number)
            crops = []
            for place in range(self._config.batch_size):
                domain = domains[(number * self._config.batch_size + place) % len(domains)]
                own = [volume for volume in self.volumes if volume.domain == domain]
                volume = own[int(torch.randint(len(own), (), generator=generator))]
                crops.append(_crop(volume.image, 0, volume.held_out, self._config.crop_size, generator))
            images = torch.stack(crops)  # (B, 1, s, s, s)
            yield {"images": images.pin_memory() if pin else images}


def train_tokenizer(
    input: Path, output: Path, config: TokenizerTrainingConfig | None = None, resume: bool = False
) -> dict[str, Any] | FitResult:
    """Train a tokenizer and write it to ``output`` (a ``.safetensors`` file of the package's own format).

    Checkpoints and logs are kept in a folder beside it, ``<name>.run``, until the file is written.

    Args:
        input: anything that :func:`~meduet_fast.data.sources.find_volumes` reads.
        output: the file to write, whole or not at all.
        config: the settings; the defaults if None.
        resume: go on from the last checkpoint of a run that was stopped, if there is one.

    Returns:
        Measured quality, as it is stored in the file: "psnr_db" and "ssim" on held-out crops, each by domain
        and as the "mean" over the domains; "loss", the mean of the "first" and "last" tenth of the training
        losses logged, if any were.
        How the run ended, if it was stopped, and in processes of a rank other than 0.

    Raises:
        UserError: for bad settings, unreadable volumes, or volumes that cannot hold a training crop and a
            held-out crop.
    """
    config = config or TokenizerTrainingConfig()
    architecture = Architecture(config.num_channels, config.num_res_blocks, config.norm_num_groups)
    if config.crop_size % architecture.compression or config.crop_size < 16:
        raise UserError(
            f"crop_size: found {config.crop_size}, expected a multiple of {architecture.compression}, "
            "at least 16"
        )
    if output.suffix != ".safetensors":
        raise UserError(f"{output}: expected a file name that ends in .safetensors")
    try:  # now, not after an hour of training
        output.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=output.parent):
            pass
    except OSError as error:
        raise UserError(f"{output}: cannot be written: {error.strerror}") from error
    run = output.with_suffix(".run")
    made: list[tuple[AutoencoderTraining, VolumeCrops]] = []

    def make() -> tuple[AutoencoderTraining, VolumeCrops]:
        task = AutoencoderTraining(config, architecture)
        made.append((task, VolumeCrops(input, config, architecture.compression)))
        return made[0]

    result = fit(make, config, run, resume)
    if not result.finished or result.rank:
        return result
    task, crops = made[0]
    with FolderLock(run):
        network = task.network.to(select_device(config.device))
        network.load_state_dict(load_file(latest_checkpoint(run) / "network.safetensors"))
        network.eval()
        tokenizer = Tokenizer(architecture, network, "trained")
        _standardise(tokenizer, crops.volumes)
        metrics = _evaluate(tokenizer, crops.volumes, config)
        records = read_metrics(run)
        if records:
            first, last = first_and_last(records, "total")
            metrics["loss"] = {"first": round(first, 5), "last": round(last, 5)}
        domains = [volume.domain for volume in crops.volumes]
        training = {**asdict(config), "volumes": domains, "torch": torch.__version__}
        save_safetensors(output, architecture, network, metrics, training)
    # Once the lock is closed: NFS keeps open files under another name. What stays behind is of no account.
    shutil.rmtree(run, ignore_errors=True)
    return metrics


def format_metrics(metrics: dict[str, Any]) -> str:
    """Return the result of :func:`train_tokenizer` as a table: a line for each domain, and their mean."""
    lines = [f"{'held-out crops of':<24}{'PSNR (dB)':>10}{'SSIM':>8}"]
    for domain, psnr in metrics["psnr_db"].items():
        lines.append(f"{domain:<24}{psnr:>10.2f}{metrics['ssim'][domain]:>8.3f}")
    if "loss" in metrics:
        lines.append("training loss {first:.4f} at first, {last:.4f} at last".format(**metrics["loss"]))
    return "\n".join(lines)


def _crop(image: Tensor, first: int, last: int, size: int, generator: torch.Generator) -> Tensor:
    """Cut a random crop (1, size, size, size) that lies in [first, last) along the first axis of space."""
    lows, highs = (first, 0, 0), (last, *image.shape[2:])
    x, y, z = (
        int(torch.randint(low, high - size + 1, (), generator=generator))
        for low, high in zip(lows, highs, strict=True)
    )
    return image[:, x : x + size, y : y + size, z : z + size]


@torch.no_grad()
def _standardise(tokenizer: Tokenizer, volumes: list[_Volume]) -> None:
    """Give the latents mean 0 and overall variance 1, each channel's deviation in proportion to its effect on
    the image, by folding that into the 1x1x1 convolutions around them; reconstructions stay the same.

    So an error of latents weighs about what it does to the image. With equal deviations most of the variance
    would be fine detail that nothing around it foretells, and pretraining would try to predict noise.
    Measured on the training side of every volume.
    """
    parts, middles = [], []
    for volume in track(volumes, "Standardising latents", unit="volume"):
        end = volume.held_out // tokenizer.compression * tokenizer.compression
        latents = tokenizer.encode(volume.image[None, :, :end])
        parts.append(latents[0].flatten(1))
        middles.append(CenterSpatialCrop(GAIN_CROP)(latents[0]).as_subclass(Tensor)[None])
    std, mean = torch.std_mean(torch.cat(parts, dim=1), dim=1)
    std.clamp_min_(1e-6)  # a channel that says nothing
    gain = torch.stack([_gains(tokenizer.network, latents, std) for latents in middles]).mean(0)
    scale = gain / gain.square().mean().sqrt() / std
    weights = tokenizer.network.state_dict()  # shares memory with the network
    weights["quant_conv_mu.conv.weight"].mul_(scale.view(-1, 1, 1, 1, 1))
    weights["quant_conv_mu.conv.bias"].sub_(mean).mul_(scale)
    weights["quant_conv_log_sigma.conv.bias"].add_(2 * scale.log())  # the logarithm of the variance
    back = weights["post_quant_conv.conv.weight"]
    weights["post_quant_conv.conv.bias"].add_(back.flatten(1) @ mean)
    back.div_(scale.view(1, -1, 1, 1, 1))


def _gains(network: AutoencoderKlMaisi, latents: Tensor, std: Tensor) -> Tensor:
    """Measure the root mean square change of the image per deviation of each latent channel, (C,)."""
    image, step = network.decode(latents), 0.1
    noise = torch.randn(latents.shape[2:], generator=torch.Generator().manual_seed(0)).to(latents)
    gains = []
    for channel, deviation in enumerate(std):
        moved = latents.clone()
        moved[:, channel] += step * deviation * noise
        gains.append((network.decode(moved) - image).square().mean().sqrt() / step)
    # A channel that moves nothing keeps a small share: a deviation of 0 could not be undone.
    result = torch.stack(gains)
    return result.clamp_min(1e-3 * float(result.max()))


@torch.no_grad()
def _evaluate(
    tokenizer: Tokenizer, volumes: list[_Volume], config: TokenizerTrainingConfig
) -> dict[str, Any]:
    """Measure PSNR (dB) and SSIM of held-out crops by domain, and their means over the domains."""
    psnr, ssim = PSNRMetric(max_val=1.0), SSIMMetric(spatial_dims=3, data_range=1.0)
    values: dict[str, dict[str, list[float]]] = {"psnr_db": {}, "ssim": {}}
    for volume in track(volumes, "Measuring", unit="volume"):
        crops = held_out_crops(volume.image, volume.held_out, config.crop_size)
        result = torch.cat([tokenizer.decode(tokenizer.encode(crop[None])) for crop in crops]).cpu()
        for by_domain, metric in zip(values.values(), (psnr, ssim), strict=True):
            by_domain.setdefault(volume.domain, []).extend(
                torch.as_tensor(metric(result, crops)).flatten().tolist()
            )
    metrics = {}
    for name, by_domain in values.items():
        means = {domain: fmean(found) for domain, found in by_domain.items()}
        means["mean"] = fmean(means.values())
        metrics[name] = {domain: round(value, 4) for domain, value in means.items()}
    return metrics


def held_out_crops(image: Tensor, held_out: int, size: int) -> Tensor:
    """Choose crops (EVALUATION_CROPS, 1, size, size, size) of ``image``, (1, X, Y, Z), at X >= ``held_out``.

    Of many random ones (fixed seed) those with the most contrast: empty air would flatter the figures.
    """
    generator = torch.Generator().manual_seed(0)
    crops = [_crop(image, held_out, image.shape[1], size, generator) for _ in range(EVALUATION_CANDIDATES)]
    crops.sort(key=lambda crop: -float(crop.std()))
    return torch.stack(crops[:EVALUATION_CROPS])
