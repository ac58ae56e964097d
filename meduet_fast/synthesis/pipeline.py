"""Sample latents from content and style, as a pipeline of diffusers: saved, reloaded and called like theirs.

A sample larger than the network's crops is denoised in overlapping windows, which are blended in every step,
so that no window goes its own way. Each window is told the content of its own place.
"""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby, product
from math import lcm, prod
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from meduet_fast.autoencoder import load_tokenizer
from meduet_fast.autoencoder.weights import BUILTIN
from meduet_fast.data.intensity import IntensityRule
from meduet_fast.data.store_index import index_path, read_index
from meduet_fast.data.windows import axis_starts, blend_weight
from meduet_fast.encoding import Encoder
from meduet_fast.encoding.encode import load_pretrained
from meduet_fast.engine.checkpoint import latest_checkpoint, read_run
from meduet_fast.errors import UserError, needs_extra, printable
from meduet_fast.files import atomic_path, file_sha256, in_real_folder
from meduet_fast.models.mixins import quiet
from meduet_fast.settings import FROM_1, POSITIVE, SEED, Range, SettingError, check_numbers

from .components import TABLE, MeDUETAutoencoder, MeDUETEncoder, MeDUETFactors
from .diffusion import size_shift
from .factors import FactorTable
from .guidance import Branch, Guidance, GuidanceMode, guided
from .networks import load_network
from .samplers import (
    SAMPLERS,
    Step,
    build_scheduler,
    require_objective,
    sampling_steps,
    start_from,
)
from .sources import Asked, Content, Sources, Style, Triple, triple

with needs_extra("synthesis"), quiet():
    from diffusers import DiffusionPipeline
    from diffusers.utils import logging as diffusers_logging

INDEX = "model_index.json"
DEFAULT_AVERAGE = "power_0.100"


@dataclass(frozen=True)
class Sample:
    """Hold what was made.

    Attributes:
        latents: (C, X, Y, Z) float32 on the CPU, as the tokenizer makes them.
        affine: (4, 4) float64, from voxels of the decoded image to mm, RAS.
        intensity: rule by which values of [0, 1] came from those of such scans; None if it is not known.
        seed: of its noise, and of what was chosen by chance.
        record: where its content and style come from, its place and size, as JSON values.
    """

    latents: Tensor
    affine: np.ndarray
    intensity: IntensityRule | None
    seed: int
    record: dict[str, Any]


@dataclass(frozen=True)
class SamplingSettings:
    """Say how latents are made of noise.

    Attributes:
        steps: evaluations of the network.
        sampler: dpm++ or euler for a network of "flow"; dpm++, ddim or ddpm for "epsilon". By default the
            pipeline's own.
        content_scale: how strongly content is followed: 0 leaves it out, 1 is as trained.
        style_scale: the same for style.
        mode: how the two scales are put together: "joint", "additive" (published) or "chained".
        interval: noise levels, from 0 to 1, in which the scales hold.
        strength: share of the steps that is gone. Below 1 it begins with the content volume's own latents,
            so that less is changed.
        shift: spends more of the steps (above 1) at much noise; null: by the size of the sample, 1 for that
            of training.
        batch_size: windows that the network gets at once, each once for every branch of the guidance.
        precision: "float32", or "bfloat16" for autocast.

    Raises:
        UserError: if a number is out of its range.
    """

    steps: int = 30
    sampler: str | None = None
    content_scale: float = 1.0
    style_scale: float = 1.0
    mode: GuidanceMode = "joint"
    interval: tuple[float, float] = (0.0, 1.0)
    strength: float = 1.0
    shift: float | None = 1.0
    batch_size: int = 4
    precision: Literal["float32", "bfloat16"] = "float32"

    def __post_init__(self) -> None:
        check_numbers(self, FROM_1, "steps", "batch_size")
        check_numbers(self, POSITIVE, "shift")
        check_numbers(self, Range(0, 1, above=True), "strength")
        self.guidance()  # checks the others

    @property
    def evaluations(self) -> int:
        """Return how often the network is called for a sample of one window."""
        return max(1, round(self.steps * self.strength))

    def guidance(self) -> Guidance:
        """Return what of it is guidance."""
        return Guidance(self.content_scale, self.style_scale, self.mode, self.interval)


class _Order(NamedTuple):
    """Hold all that one sample is made of.

    Attributes:
        seed: of its noise.
        content, style: what it gets; None for nothing.
        start: first corner in the content's volume, in latent voxels.
        size: edges in latent voxels.
        stride: from window to window along each axis.
    """

    seed: int
    content: Content | None
    style: Style | None
    start: Triple
    size: Triple
    stride: Triple


class MeDUETPipeline(DiffusionPipeline):
    """Make latents of one anatomy and another scanner, and decode them.

    ::

        pipeline = MeDUETPipeline.from_run("run")
        [sample] = pipeline("ct", "mr_t1", seeds=[0], steps=30)
        image = pipeline.decode(sample.latents)

    Args:
        scheduler: one of diffusers for the network's objective, see :data:`~.samplers.SAMPLERS`.
        vae: the tokenizer.
        transformer, unet: the network, one of both.
        encoder: the pretrained network, for users' scans; None: there can be none.
        factors: table of factors; None: contents and styles are users' scans.
        origin: where the network's weights come from, as JSON values.

    Raises:
        UserError: if they do not fit together.
    """

    _optional_components = ["transformer", "unet", "encoder", "factors"]  # noqa: RUF012  diffusers' name
    model_cpu_offload_seq = "encoder->transformer->unet->vae"

    def __init__(
        self,
        scheduler: Any,
        vae: MeDUETAutoencoder,
        transformer: Any = None,
        unet: Any = None,
        encoder: MeDUETEncoder | None = None,
        factors: MeDUETFactors | None = None,
        origin: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.register_modules(
            transformer=transformer, unet=unet, scheduler=scheduler, vae=vae, encoder=encoder, factors=factors
        )
        self.register_to_config(origin=origin)
        self._check()

    @property
    def network(self) -> Any:
        """Return the transformer or the U-Net."""
        return self.unet if self.transformer is None else self.transformer

    def _check(self) -> None:
        """Refuse parts that do not fit together."""
        if (self.transformer is None) == (self.unet is None):
            raise UserError("pipeline: expected either a transformer or a unet")
        network, tokenizer = self.network.config, self.vae.tokenizer
        require_objective(self.scheduler, network.prediction)
        if network.in_channels != tokenizer.channels:
            raise UserError(
                f"vae: {tokenizer.identity} makes latents of {tokenizer.channels} channels, the network has "
                f"{network.in_channels}"
            )
        widths = {
            "table of factors": self.factors
            and (self.factors.config.content_dim, self.factors.config.style_dim)
        }
        if self.encoder is not None:
            sizes = self.encoder.network.config
            widths["encoder"] = sizes.embed_dim, sizes.style_dim
        for what, found in widths.items():
            if found and found != (network.content_dim, network.style_dim):
                expected = (network.content_dim, network.style_dim)
                raise UserError(f"{what}: content and style of {found} values, the network takes {expected}")
        if self.factors is None:
            return
        table = self.factors.config
        if table.tokenizer != tokenizer.identity:
            raise UserError(
                f"{table.table}: factors of latents of {table.tokenizer}, found the tokenizer "
                f"{tokenizer.identity}: expected the same"
            )
        made_by = table.encoder.get("weights_sha256")
        if self.encoder is not None and self.encoder.config.about.get("weights_sha256") != made_by:
            raise UserError(
                f"{table.table}: factors of the encoder {table.encoder.get('weights')}, found "
                f"{self.encoder.config.about.get('weights')}, which is another: expected the same"
            )

    @classmethod
    def from_pretrained(cls, folder: Path | str, **components: Any) -> MeDUETPipeline:
        """Read a folder that :meth:`save_pretrained` wrote; nothing is sought on the network.

        Args:
            folder: the folder.
            components: take the place of what is in it, by name.

        Raises:
            UserError: if it is absent or damaged, or the parts do not fit together.
        """
        folder = Path(folder)
        if not (folder / INDEX).is_file():
            what = f"no {INDEX} in it" if folder.is_dir() else "no such folder"
            raise UserError(f"{folder}: {what}, expected a pipeline that save_pretrained wrote")
        try:
            with quiet(), _no_bar():
                return super().from_pretrained(
                    str(folder), local_files_only=True, low_cpu_mem_usage=False, **components
                )
        except UserError:
            raise
        except (OSError, ValueError, TypeError, RuntimeError, AttributeError, KeyError) as error:
            raise UserError(f"{folder}: not a readable pipeline: {' '.join(str(error).split())}") from error

    def save_pretrained(self, folder: Path | str, tokens: bool = False) -> None:
        """Write all parts into a new folder, as diffusers' pipelines have them.

        Args:
            folder: absent, or empty.
            tokens: copy the table's maps of tokens, too; without them the pipeline reads them where they are.

        Raises:
            UserError: if there is something.
            OSError: if it can't be written.
        """
        folder = Path(folder)
        refuse_existing(folder)
        with atomic_path(folder) as temporary:
            super().save_pretrained(str(temporary))
            if tokens and self.factors is not None:
                shutil.copyfile(self.factors.table_file(), temporary / "factors" / TABLE)

    @classmethod
    def from_run(cls, run: Path | str, average: str = DEFAULT_AVERAGE) -> MeDUETPipeline:
        """Put together what a run of ``synthesize train`` made and used, on the CPU.

        Args:
            run: its folder; the last checkpoint is taken.
            average: which average of the weights: a name of a file in the checkpoint; "network" is none.

        Raises:
            UserError: if one of the parts is not there or not readable, or they do not fit together.
        """
        run = Path(run)
        record, checkpoint = read_run(run, of_checkpoint=False), latest_checkpoint(run)
        file = checkpoint / f"{average}.safetensors"
        if not file.is_file():
            known = ", ".join(sorted(path.stem for path in checkpoint.glob("*.safetensors")))
            raise UserError(f"average: found {average}, expected one of {checkpoint}: {known}")
        if "factors" not in record:
            raise UserError(f"{run}: not a run of synthesis: no 'factors' in its run.json")
        network: Any = load_network(file)
        table, store = FactorTable.open(record["factors"]), record["data"]
        if table.identity != record["factors_identity"]:
            raise UserError(f"{table.path}: another table of factors than the run {run} was trained with")
        index = read_index(Path(store)) if store and index_path(Path(store)).exists() else None
        builtin = index is None and table.tokenizer.startswith(BUILTIN)
        spec = index.tokenizer_spec if index is not None else BUILTIN
        if index is None and not builtin:
            raise UserError(f"{store}: the store is not there, which names the tokenizer {table.tokenizer}")
        whole = record["config"]["factor_source"] == "volume"
        name = "unet" if hasattr(network.config, "num_channels") else "transformer"
        origin = {
            "weights": printable(in_real_folder(file)),
            "weights_sha256": file_sha256(file),
            "average": average,
        }
        return cls(
            build_scheduler(SAMPLERS[network.config.prediction][0], network.config.prediction),
            MeDUETAutoencoder.from_tokenizer(load_tokenizer(spec), spec),
            encoder=_encoder_of(table),
            factors=MeDUETFactors.from_table(table, store, whole),
            origin=origin,
            **{name: network},
        )

    def __call__(
        self,
        content: Asked | Sequence[Asked],
        style: Asked | Sequence[Asked],
        seeds: Sequence[int] = (0,),
        size: Triple | None = None,
        start: Triple | None = None,
        intensity: IntensityRule | None = None,
        **settings: Any,
    ) -> list[Sample]:
        """Make samples; see :meth:`sample`, with the fields of :class:`SamplingSettings` as keywords."""
        return list(self.sample(content, style, seeds, size, start, SamplingSettings(**settings), intensity))

    def sample(
        self,
        content: Asked | Sequence[Asked],
        style: Asked | Sequence[Asked],
        seeds: Sequence[int],
        size: Triple | None = None,
        start: Triple | None = None,
        settings: SamplingSettings | None = None,
        intensity: IntensityRule | None = None,
        show: Callable[[int], None] | None = None,
    ) -> Iterator[Sample]:
        """Make a sample for each seed, one batch after the other.

        The samples of a seed are the same in any batch, but for the rounding of sums in another order.

        Args:
            content: see ``sources.py``; one for all samples, or one for each.
            style: the same.
            seeds: one for each sample, of its noise and of what is chosen by chance.
            size: edges in latent voxels, multiples of the network's and the encoder's patches; by default
                those of the content's volume, or, for a crop, the network's.
            start: first corner of the crop, in latent voxels of the content's volume; by default in its
                middle.
            settings: how.
            intensity: rule for the values of users' scans; None: they tell.
            show: is told after each step how many samples went through it.

        Raises:
            UserError: for what does not exist or does not fit.
        """
        settings = settings or SamplingSettings()
        contents, styles = (_for_each(given, len(seeds)) for given in (content, style))
        for seed in seeds:
            if not (isinstance(seed, int) and SEED.holds(seed)):
                raise SettingError("seeds", f"found {seed}, expected a whole number, {SEED}")
        scheduler = self.scheduler
        if settings.sampler is not None:
            scheduler = build_scheduler(settings.sampler, self.network.config.prediction)
        told = self.network.config
        sources = Sources(
            self.factors, self._encoder(), told.content == "tokens", told.content_by_volume,
            size or told.sample_size, intensity,
        )  # fmt: skip
        asked = (
            self._place(seed, sources.content(one, seed), sources.style(other, seed), size, start)
            for seed, one, other in zip(seeds, contents, styles, strict=True)
        )
        for same, group in groupby(asked, key=lambda one: (one.size, one.stride)):
            windows = len(self._windows(*same))
            together = max(1, settings.batch_size // windows)  # samples that are made at once
            waiting = list(group)
            for first in range(0, len(waiting), together):
                batch = waiting[first : first + together]
                latents = self._denoise(batch, copy.deepcopy(scheduler), settings, show)  # (B, C, X, Y, Z)
                for one, made in zip(batch, latents, strict=True):
                    yield self._finish(one, made)

    def decode(self, latents: Tensor) -> np.ndarray:
        """Decode a sample's latents (C, X, Y, Z): float32 (X', Y', Z') in [0, 1]."""
        factor = self.vae.tokenizer.compression
        image = np.empty([factor * edge for edge in latents.shape[1:]], np.float32)  # (X', Y', Z')
        for place, part in self.vae.tokenizer.decode_parts(latents):
            image[place] = part.cpu().numpy()
        return image

    def about(self) -> dict[str, Any]:
        """Return what the pipeline is made of, as JSON values."""
        encoder = {} if self.encoder is None else dict(self.encoder.config.about)
        factors = None
        if self.factors is not None:
            factors = {"table": str(self.factors.table_file()), "identity": self.factors.config.identity}
        return {
            "network": {"class": type(self.network).__name__, **(self.config.origin or {})},
            "objective": self.network.config.prediction,
            "tokenizer": self.vae.config.identity,
            "encoder": encoder,
            "factors": factors,
        }

    def _encoder(self) -> Encoder | None:
        if self.encoder is None:
            return None
        spacing, about = self.encoder.config.spacing, self.encoder.config.about
        return Encoder(self.encoder.network, self.vae.tokenizer, spacing, about=about)

    def _place(
        self,
        seed: int,
        content: Content | None,
        style: Style | None,
        size: Triple | None,
        start: Triple | None,
    ) -> _Order:
        """Decide where in its content's volume a sample lies, and which windows it is made in.

        Raises:
            SettingError: for a size or place that does not fit.
        """
        network = self.network.config
        own = network.patch_size * 2 ** (
            len(network.get("num_channels", (0,))) - 1
        )  # the U-Net's levels halve
        patch = 1 if content is None else content.patch
        step = lcm(own, patch)
        sample_size = network.sample_size
        if size is None and content is not None and content.start is None and start is None:
            room = [edge - first for edge, first in zip(content.grid, content.first, strict=True)]
            size = triple([edge // step * step for edge in room])
        size = size or triple(sample_size)
        if any(edge < 1 or edge % step for edge in size):
            why = f"of the patches of the network ({own}) and the encoder ({patch})"
            raise SettingError("size", f"found {size} latent voxels, expected multiples of {step}, {why}")
        window = [min(edge, most) for edge, most in zip(size, sample_size, strict=True)]
        stride = triple([max(step, edge // 2 // step * step) for edge in window])
        if content is None:
            if start is not None:
                raise SettingError("start", f"found {start}, and there is no content whose volume it lies in")
            return _Order(seed, None, style, (0, 0, 0), size, stride)
        name = content.record.get("volume") or content.record["scan"]
        last = [
            first + (whole - first - edge) // patch * patch
            for first, whole, edge in zip(content.first, content.grid, size, strict=True)
        ]  # where the crop can begin at most
        if any(end < first for end, first in zip(last, content.first, strict=True)):
            raise SettingError(
                "size", f"found {size} latent voxels, {name} has {content.grid}: expected no more"
            )
        begin = start or content.start
        if begin is None:
            begin = triple(
                [
                    first + (end - first) // 2 // patch * patch
                    for end, first in zip(last, content.first, strict=True)
                ]
            )
        elif content.by_chance and start is None:
            begin = triple([min(at, end) for at, end in zip(begin, last, strict=True)])
        for at, first, end in zip(begin, content.first, last, strict=True):
            if not first <= at <= end or (at - first) % patch:
                raise SettingError(
                    "start",
                    f"found {begin}, expected from {content.first} to {tuple(last)} in steps of {patch} "
                    f"for {size} latent voxels of {name}",
                )
        return _Order(seed, content, style, begin, size, stride)

    def _windows(self, size: Triple, stride: Triple) -> list[Triple]:
        """Return the first corners of the windows that cover a sample."""
        window = self._window(size)
        axes = [axis_starts(*axis) for axis in zip(size, window, stride, strict=True)]
        return [triple(corner) for corner in product(*axes)]

    def _window(self, size: Triple) -> Triple:
        return triple(
            [min(edge, most) for edge, most in zip(size, self.network.config.sample_size, strict=True)]
        )

    @torch.no_grad()
    def _denoise(
        self,
        asked: Sequence[_Order],
        scheduler: Any,
        settings: SamplingSettings,
        show: Callable[[int], None] | None,
    ) -> Tensor:
        """Make samples of one size from noise.

        Returns:
            (B, C, X, Y, Z) float32 on the CPU, normalised.
        """
        network, size, device = self.network.config, asked[0].size, self.device
        shift = settings.shift or size_shift(prod(size), prod(network.sample_size))
        steps = sampling_steps(scheduler, settings.steps, shift, settings.strength)
        shape = network.in_channels, *size
        generators = [torch.Generator().manual_seed(one.seed) for one in asked]
        noise = torch.stack([torch.randn(shape, generator=one) for one in generators])  # (B, C, X, Y, Z)
        x = noise.to(device)
        if settings.strength < 1:
            mean, deviation = self._statistics()
            latents = torch.stack([self._latents_of(one) for one in asked])  # (B, C, X, Y, Z)
            x = start_from(scheduler, (latents - mean).div(deviation).to(device), x, steps[0])
        for step in steps:
            prediction = self._predict(x, step, asked, settings)  # (B, C, X, Y, Z)
            x = scheduler.step(prediction, step.timestep, x, generator=generators).prev_sample
            if show is not None:
                show(len(asked))
        return x.cpu()

    def _predict(self, x: Tensor, step: Step, asked: Sequence[_Order], settings: SamplingSettings) -> Tensor:
        """Predict velocity or noise of samples (B, C, X, Y, Z), in windows that are blended."""
        size = asked[0].size
        corners, window = self._windows(size, asked[0].stride), self._window(size)
        weights = settings.guidance().branches(step.sigma)
        pairs = [(row, corner) for row in range(len(asked)) for corner in corners]
        if len(corners) == 1:
            return self._predict_windows(x, step, [(one, one.start) for one in asked], weights, settings)
        weight = blend_weight(window).to(x.device)  # (x, y, z)
        total, counts = torch.zeros_like(x), torch.zeros(size, device=x.device)  # (X, Y, Z) the latter
        for corner in corners:
            counts[_box(corner, window)[1:]] += weight
        for first in range(0, len(pairs), settings.batch_size):
            chunk = pairs[first : first + settings.batch_size]
            windows = torch.stack([x[row][_box(corner, window)] for row, corner in chunk])
            places = [(asked[row], _moved(asked[row].start, corner)) for row, corner in chunk]
            predicted = self._predict_windows(windows, step, places, weights, settings)  # (N, C, x, y, z)
            for (row, corner), one in zip(chunk, predicted, strict=True):
                total[row][_box(corner, window)] += weight * one
        return total / counts

    def _predict_windows(
        self,
        windows: Tensor,
        step: Step,
        places: Sequence[tuple[_Order, Triple]],
        weights: dict[Branch, float],
        settings: SamplingSettings,
    ) -> Tensor:
        """Predict windows (N, C, x, y, z), each of a sample and at a place in its content's volume."""
        device, network, size = windows.device, self.network, triple(windows.shape[2:])
        # A table's factors are where the network is, those of scans on the CPU.
        contents = [
            None if one.content is None else one.content.factor(at, size).to(device) for one, at in places
        ]
        styles = [None if one.style is None else one.style.factor.to(device) for one, _ in places]
        no_content = torch.tensor([one is None for one in contents], device=device)  # (N,)
        no_style = torch.tensor([one is None for one in styles], device=device)  # (N,)
        known = next((one for one in contents if one is not None), None)
        if known is None:
            grid = (1, 1, 1) * (network.config.content == "tokens")
            known = torch.zeros(*grid, network.config.content_dim, device=device)
        content = torch.stack([torch.zeros_like(known) if one is None else one for one in contents])
        nothing = torch.zeros(network.config.style_dim, device=device)
        style = torch.stack([nothing if one is None else one for one in styles])  # (N, Ds)

        def told(
            sample: Tensor, time: Tensor, content: Tensor, style: Tensor, without: Tensor, plain: Tensor
        ) -> Tensor:
            repeats = len(sample) // len(places)
            without, plain = without | no_content.repeat(repeats), plain | no_style.repeat(repeats)
            out: Tensor = network(sample, time, content, style, without, plain)
            return out.float()

        time = torch.full((len(windows),), step.network_time, device=device)  # (N,)
        autocast = settings.precision == "bfloat16"
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            return guided(told, windows, time, content, style, weights).float()

    def _statistics(self) -> tuple[Tensor, Tensor]:
        """Return mean and deviation of the latents, (C, 1, 1, 1) each."""
        config = self.network.config
        mean, deviation = torch.tensor([config.latents_mean, config.latents_std])[..., None, None, None]
        return mean, deviation

    def _latents_of(self, one: _Order) -> Tensor:
        if one.content is None:
            raise SettingError("strength", "found less than 1, and there is no content to begin from")
        return one.content.latents(one.start, one.size)  # (C, X, Y, Z)

    def _finish(self, one: _Order, made: Tensor) -> Sample:
        """Bring normalised latents (C, X, Y, Z) to the tokenizer's range, and say where they lie."""
        if not made.isfinite().all():
            raise UserError(f"sample of seed {one.seed}: its latents are not finite (NaN or Inf)")
        mean, deviation = self._statistics()
        factor, spacing = (
            self.vae.tokenizer.compression,
            1.5 if self.encoder is None else self.encoder.config.spacing,
        )
        affine = np.diag([spacing, spacing, spacing, 1.0])
        if one.content is not None and one.content.affine is not None:
            affine = one.content.affine.copy()
        affine[:3, 3] += affine[:3, :3] @ (factor * np.array(one.start))
        # Values look like those of the scanner whose style they have.
        giver = one.style or one.content
        corners = [_moved(one.start, corner) for corner in self._windows(one.size, one.stride)]
        content = None
        if one.content is not None:
            others = {at: one.content.borrowed(at, self._window(one.size)) for at in corners}
            borrowed = [{"window": [*at], "of": [*other]} for at, other in others.items() if other]
            content = {**one.content.record, **({"borrowed": borrowed} if borrowed else {})}
        record = {
            "seed": one.seed,
            "content": content,
            "style": None if one.style is None else one.style.record,
            "start": list(one.start),
            "size": list(one.size),
            "windows": len(corners),
        }
        intensity = None if giver is None else giver.intensity
        return Sample(made * deviation + mean, affine, intensity, one.seed, record)


def refuse_existing(folder: Path) -> None:
    """Refuse to write where something is.

    Raises:
        UserError: for anything but an absent or empty folder.
    """
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise UserError(f"{folder}: is there already: expected a new or empty folder")


@contextmanager
def _no_bar() -> Iterator[None]:
    """Keep diffusers from showing a bar."""
    shown = diffusers_logging.is_progress_bar_enabled()
    diffusers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            diffusers_logging.enable_progress_bar()


def _encoder_of(table: FactorTable) -> MeDUETEncoder | None:
    """Load what encoded a table; None if it is not there any more.

    Raises:
        UserError: if there is another in its place.
    """
    file = Path(table.encoder["weights"])
    if not file.exists():
        return None
    found = load_pretrained(file)
    about = found.record()
    if about["weights_sha256"] != table.encoder["weights_sha256"]:
        raise UserError(f"{file}: not the encoder any more that made the factors of {table.path}")
    return MeDUETEncoder.from_model(found.model, table.volumes[0]["spacing"][0], about)


def _for_each(given: Any, count: int) -> list[Any]:
    """Return one for each sample."""
    if isinstance(given, str | Path | None):
        return [given] * count
    if len(given) != count:
        raise UserError(f"content and style: found {len(given)} for {count} seeds, expected one for each")
    return list(given)


def _moved(start: Triple, by: Triple) -> Triple:
    return triple([a + b for a, b in zip(start, by, strict=True)])


def _box(corner: Triple, size: Triple) -> tuple[slice, ...]:
    """Return the place of a window in all channels of latents (C, X, Y, Z)."""
    return (slice(None), *(slice(first, first + edge) for first, edge in zip(corner, size, strict=True)))
