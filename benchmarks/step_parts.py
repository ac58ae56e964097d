"""What benchmarks of the step are made of: networks, inputs, our step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from meduet_fast.engine.cuda_graph import GraphedGradients
from meduet_fast.engine.optimizer import build_optimizer
from meduet_fast.engine.step import Backward, add_gradients, update
from meduet_fast.kernels import kernel_backend, set_kernel_backend
from meduet_fast.kernels.verify import FACTOR
from meduet_fast.models import MeDUET, MeDUETConfig
from meduet_fast.pretraining import (
    MeDUETPretraining,
    ObjectiveConfig,
    OptimizerConfig,
    PretrainConfig,
    random_mix_mask,
)

Batch = tuple[Tensor, Tensor, Tensor]
Models = tuple[MeDUET, MeDUET]


@dataclass(frozen=True)
class Setting:
    """A network and how it is called in tables."""

    name: str
    model: MeDUETConfig


VIT_BASE = Setting("ViT-B", MeDUETConfig())
SMALL = Setting(
    "ViT 384 x 6 + 4",
    MeDUETConfig(
        embed_dim=384, depth=6, num_heads=6, decoder_embed_dim=192, decoder_depth=4, decoder_num_heads=6
    ),
)


def make_models(config: MeDUETConfig, device: torch.device) -> Models:
    """A student, and a teacher with other weights, as after some training."""
    torch.manual_seed(0)
    with device:
        return MeDUET(config), MeDUET(config).requires_grad_(False)


def make_batch(config: MeDUETConfig, batch: int, device: torch.device) -> Batch:
    """Latents of noise, domains, mixing mask."""
    generator = torch.Generator(device).manual_seed(0)
    size = (batch, config.in_channels, *[config.latent_size] * 3)
    latents = torch.randn(size, generator=generator, device=device)
    domain = torch.randint(config.num_domains, (batch,), generator=generator, device=device)
    return latents, domain, random_mix_mask(batch, config.num_tokens, generator, device)


class OurStep:
    """What training does on the device in a step; learning rate and momentum stay at their peak and start.

    Args:
        student, teacher: trained in place.
        optimizer: AdamW and the teacher's average.
        objective: weights and variants of the losses.
        graph: launch losses and gradients as one CUDA graph.
    """

    def __init__(
        self,
        student: MeDUET,
        teacher: MeDUET,
        optimizer: OptimizerConfig,
        objective: ObjectiveConfig,
        graph: bool = False,
    ) -> None:
        config = PretrainConfig(
            model=student.config, optimizer=optimizer, objective=objective, mftd_start_step=0
        )
        self._task, self._graph = MeDUETPretraining(config, student, teacher), graph
        low = student.cls_token.is_cuda
        self._backward: Backward = (
            GraphedGradients(self._task, low=low) if graph else partial(add_gradients, self._task, low=low)
        )
        self._optimizer = build_optimizer(student, optimizer)
        for group in self._optimizer.param_groups:
            group["lr"] = optimizer.learning_rate

    def __call__(self, latents: Tensor, domain: Tensor, mask: Tensor) -> dict[str, Tensor]:
        """The losses, on the device."""
        losses = self._backward({"latents": latents, "domain": domain, "mask": mask}, 0, True)
        update(self._task, self._optimizer, 0, keep_gradients=self._graph)
        return losses


@contextmanager
def plain_kernels() -> Iterator[None]:
    """Within it fast operations run in plain PyTorch."""
    before = kernel_backend()
    set_kernel_backend("eager")
    try:
        yield
    finally:
        set_kernel_backend(before)


def check_graph(graph: OurStep, step: OurStep, batch: Batch) -> None:
    """Hold a graph to the same steps without it.

    Args:
        graph: not used yet.
        step: from the same weights, not used yet.
        batch: what to step on.

    Raises:
        AssertionError: if a loss differs by more than three roundings of bfloat16.
    """
    for _ in range(3):
        plain = step(*batch)
        for name, loss in graph(*batch).items():
            error = abs(loss.item() - plain[name].item())
            allowed = FACTOR * torch.finfo(torch.bfloat16).eps * abs(plain[name].item())
            if not error <= allowed:
                raise AssertionError(f"{name} is off by {error:.3g}, allowed {allowed:.3g}")
