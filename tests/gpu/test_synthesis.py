"""Synthesis on CUDA: no step waits for the device; kernels, graphs and the device itself change nothing."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from meduet_fast.engine.step import StepValues, add_gradients, batch_generator
from meduet_fast.kernels import set_kernel_backend
from meduet_fast.synthesis.config import DiffusionConfig, SynthesisConfig
from meduet_fast.synthesis.train import build_network, build_task
from tests.gpu.steps import DEVICE, require_no_waiting, steps_of
from tests.synthesis.pipelines import make_parts, make_pipeline, shaken
from tests.synthesis.tasks import CONFIG, TABLE, made_up_batch

KINDS: dict[str, dict[str, Any]] = {
    "transformer": {"content": "tokens", "diffusion": DiffusionConfig(times="logit_normal", align=0.5)},
    "unet": {"network": "unet", "diffusion": DiffusionConfig(objective="epsilon", align=0.5)},
}


def made_task(config: SynthesisConfig) -> Any:
    """With weights away from their first values, the zeros among which hide much."""
    torch.manual_seed(0)
    network = shaken(build_network(config, TABLE)).train().requires_grad_(True)
    return build_task(config, TABLE, network).to(DEVICE)


def stepper(config: SynthesisConfig) -> Callable[[int], StepValues]:
    """A run's steps, from the same weights and batches each time."""
    stream = (
        {name: item.pin_memory() for name, item in made_up_batch(4, "cpu", number).items()}
        for number in itertools.count()
    )
    return steps_of(made_task(config), config, stream)


@pytest.mark.parametrize("graph", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_step_never_waits_for_the_device(kind: str, graph: bool) -> None:
    require_no_waiting(stepper(replace(CONFIG, steps=12, cuda_graph=graph, **KINDS[kind])))


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_graph_gives_the_losses_of_single_launches(kind: str, compiled: bool) -> None:
    """With alignment and behind it: it is captured anew."""
    config = replace(CONFIG, steps=6, compile=compiled, **KINDS[kind])
    plain, graphed = stepper(config), stepper(replace(config, cuda_graph=True))
    for number in range(6):
        wanted, found = plain(number).fetch(), graphed(number).fetch()
        assert found == pytest.approx(wanted, rel=0.02), number


@pytest.mark.parametrize("kind", KINDS)
def test_losses_and_gradients_by_kernels_agree_with_plain_pytorch(kind: str) -> None:
    found = []
    for backend in ("eager", "auto"):
        set_kernel_backend(backend)
        task = made_task(replace(CONFIG, **KINDS[kind]))
        batch = task.prepare(made_up_batch(4, DEVICE), batch_generator(0, 0, DEVICE))
        losses = add_gradients(task, batch, 0, low=True)
        gradients = [item.grad.flatten() for item in task.parameters() if item.grad is not None]
        found.append((losses["total"].item(), torch.cat(gradients)))
    (wanted, exact), (loss, gradient) = found
    assert loss == pytest.approx(wanted, rel=0.01)
    assert (gradient - exact).norm() < 0.05 * exact.norm()


@pytest.mark.parametrize("tokens", [False, True])
def test_samples_on_the_device_agree_with_those_of_the_cpu(tokens: bool, tmp_path: Path) -> None:
    """In windows, content of a table and of chance in one batch."""
    pipeline = make_pipeline(make_parts(tmp_path), content="tokens" if tokens else "pooled")
    asked: dict[str, Any] = {"size": (12, 8, 8), "steps": 4, "content_scale": 2.0}
    wanted = pipeline(["ct_a", "random"], "mr", [0, 1], **asked)
    found = pipeline.to(DEVICE)(["ct_a", "random"], "mr", [0, 1], **asked)
    for one, other in zip(found, wanted, strict=True):
        assert one.record == other.record
        assert (one.latents - other.latents).norm() < 0.01 * other.latents.norm()
    assert pipeline.decode(found[0].latents).shape == (48, 32, 32)
