"""Training a network of synthesis as a task of the engine: noise, times, dropped factors, averages.

Source: downstream section "Synthesis"; synthesis section "Interpolant".
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from meduet_fast.engine import Batch, Task
from meduet_fast.engine.optimizer import update_average

from .alignment import AlignmentHead, alignment_loss
from .averages import power_exponent, power_momentum
from .config import SynthesisConfig
from .cost import flops_per_crop
from .diffusion import draw_times, loss_weight, network_time, noisy, target
from .factors import FactorTable
from .networks import Network, save_network

CONSTANT = "constant"  # the average whose momentum does not change


def average_name(width: float) -> str:
    """Return the name of a power-function average, in exports and on the command line."""
    return f"power_{width:.3f}"


class SynthesisTraining(Task):
    """A network whose call is the loss of a batch of crops, and averages of its weights.

    Args:
        config: of the run.
        network: to train; knows statistics of latents and factors.
        head: for alignment; None if ``config.diffusion.align`` is 0.
        table: has the encoder's patch, and the statistics of the tokens to align to.
    """

    title, sample = "Training synthesis", "crop"
    latents_mean: Tensor  # (C, 1, 1, 1)
    latents_std: Tensor  # (C, 1, 1, 1)
    aligned_mean: Tensor  # (D + Ds,)
    aligned_deviation: Tensor  # (D + Ds,)
    labels = {"total": "loss", "denoising": "den"}  # noqa: RUF012  read only

    def __init__(
        self, config: SynthesisConfig, network: Network, head: AlignmentHead | None, table: FactorTable
    ) -> None:
        super().__init__()
        self.config, self.adamw = config, config.optimizer
        self.network, self.head = network, head
        names = [*map(average_name, config.power_averages), CONSTANT]
        # Names of modules have no dots.
        self.averages = nn.ModuleDict(
            {name.replace(".", "_"): copy.deepcopy(network).requires_grad_(False) for name in names}
        )
        self._names = names
        self._exponents = [power_exponent(width) for width in config.power_averages]
        mean, deviation = (
            torch.tensor(values).view(-1, 1, 1, 1)
            for values in (network.config.latents_mean, network.config.latents_std)
        )  # (C, 1, 1, 1) each
        self.register_buffer("latents_mean", mean, persistent=False)
        self.register_buffer("latents_std", deviation, persistent=False)
        if head is not None:
            self.labels = {**self.labels, "alignment": "align"}
            for name in ("mean", "deviation"):
                tokens = getattr(table, f"token_{name}"), getattr(table, f"style_token_{name}")
                self.register_buffer(f"aligned_{name}", torch.cat(tokens), persistent=False)  # (D + Ds,)
        self._patch = table.patch
        self._flops: int | None = None

    def prepare(self, batch: Batch, generator: torch.Generator) -> Batch:
        """Normalise the latents; draw noise, times, and which factors are left out.

        Args:
            batch: see :class:`~.crops.FactorCrops`.
            generator: on the device.

        Returns:
            ``latents`` and ``noise`` (B, C, x, y, z) float32, ``times`` (B,), ``content_dropped`` and
            ``style_dropped`` (B,) bool, ``style`` (B, Ds), ``content`` (B, D) or (B, X, Y, Z, D), and with
            alignment ``aligned`` (B, X, Y, Z, D + Ds).
        """
        config = self.config.diffusion
        latents = (batch["latents"].float() - self.latents_mean) / self.latents_std  # (B, C, x, y, z)
        size, device = len(latents), latents.device
        noise = torch.randn(latents.shape, generator=generator, device=device)  # (B, C, x, y, z)
        draw = torch.randn if config.times == "logit_normal" else torch.rand
        times = draw_times(
            draw(size, generator=generator, device=device), config.times, config.shift, config.objective
        )  # (B,)
        dropped = torch.rand(2, size, generator=generator, device=device)  # (2, B)
        content = batch["content_map" if self.config.content == "tokens" else "content"].float()
        if config.content_noise:
            spread = config.content_noise * self.network.content_deviation  # (D,)
            content = content + spread * torch.randn(content.shape, generator=generator, device=device)
        prepared = {
            "latents": latents,
            "noise": noise,
            "times": times,
            "content": content,  # (B, D) or (B, X, Y, Z, D)
            "style": batch["style"],
            "content_dropped": dropped[0] < config.drop_content,  # (B,)
            "style_dropped": dropped[1] < config.drop_style,  # (B,)
        }
        if self.head is not None:
            raw = batch["aligned_map"].float()  # (B, X, Y, Z, D + Ds)
            prepared["aligned"] = (raw - self.aligned_mean) / self.aligned_deviation
        return prepared

    def forward(self, batch: Batch, step: int) -> dict[str, Tensor]:
        """Compute ``denoising``, the error of the prediction, and with a head ``alignment``, 0 when off."""
        objective = self.config.diffusion.objective
        latents, noise, times = batch["latents"], batch["noise"], batch["times"]
        aligning = self.phase(step)
        predicted = self.network(
            noisy(latents, noise, times, objective),  # (B, C, x, y, z)
            network_time(times, objective),  # (B,)
            batch["content"], batch["style"], batch["content_dropped"], batch["style_dropped"],
            features=aligning,
        )  # fmt: skip
        features = None
        if aligning:
            predicted, features = predicted
        goal = target(latents, noise, objective)  # (B, C, x, y, z)
        error = (predicted.float() - goal).square().mean((1, 2, 3, 4))  # (B,)
        losses = {"denoising": (loss_weight(times, objective, self.config.diffusion.min_snr) * error).mean()}
        total = losses["denoising"]
        if self.head is not None and features is not None:
            losses["alignment"] = alignment_loss(self.head(features), batch["aligned"])
            total = total + self.config.diffusion.align * losses["alignment"]
        elif self.head is not None:
            # DDP waits for the gradient of every parameter, and checkpoints hold every parameter's moments.
            losses["alignment"] = 0 * sum(parameter.sum() for parameter in self.head.parameters())
            total = total + losses["alignment"]
        losses["total"] = total
        return losses

    def blocks(self) -> Sequence[nn.Module]:
        """Return the blocks of the network and of its averages."""
        networks: list[Any] = [self.network, *self.averages.values()]
        return [block for network in networks for block in network.transformer_blocks()]

    def phase(self, step: int) -> bool:
        """Return whether the network is aligned."""
        return self.head is not None and step < self.phase_starts()[0]

    def phase_starts(self) -> Sequence[int]:
        """Return the first step without alignment, if there are steps with it."""
        return [] if self.head is None else [round(self.config.diffusion.align_until * self.config.steps)]

    def after_step(self, step: int) -> None:
        """Let the averages follow."""
        momenta = [*(power_momentum(step, gamma) for gamma in self._exponents), self.config.constant_average]
        for average, momentum in zip(self.averages.values(), momenta, strict=True):
            update_average(average, self.network, momentum)

    def exports(self) -> Mapping[str, nn.Module]:
        """Return the network and its averages."""
        return {"network": self.network, **dict(zip(self._names, self.averages.values(), strict=True))}

    def write_export(self, name: str, state: Mapping[str, Tensor], path: Path) -> None:
        """Write one of them for :func:`~.networks.load_network`."""
        save_network(self.network, path, state)

    def flops(self, step: int) -> int:
        """Return the FLOPs of a crop; see :func:`~.cost.flops_per_crop`."""
        if self._flops is None:
            self._flops = flops_per_crop(self.network, self._patch)
        return self._flops
