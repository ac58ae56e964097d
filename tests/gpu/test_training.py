"""Training on CUDA: no step waits for the device, and batches arrive whole."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from meduet_fast.engine.distributed import World
from meduet_fast.engine.parallel import parallelize
from meduet_fast.engine.precision import Precision, low_precision
from meduet_fast.engine.prefetch import prefetch
from meduet_fast.engine.step import StepValues, add_gradients
from meduet_fast.models import MeDUETConfig
from meduet_fast.pretraining import MeDUETPretraining, OptimizerConfig, PretrainConfig, random_mix_mask
from tests.gpu.steps import DEVICE, require_no_waiting, steps_of

MODEL = MeDUETConfig(
    latent_size=8, patch_size=2, embed_dim=96, depth=2, num_heads=2, decoder_embed_dim=48, decoder_depth=1,
    decoder_num_heads=2, num_domains=3,
)  # fmt: skip


def batch(number: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(number)
    return {
        "latents": torch.randn(8, 4, 8, 8, 8, generator=generator).to(torch.bfloat16).pin_memory(),
        "domain": torch.randint(3, (8,), generator=generator).pin_memory(),
        "volume": torch.zeros(8),
    }


def stepper(config: PretrainConfig) -> Callable[[int], StepValues]:
    """A run's steps, from the same weights and batches each time."""
    torch.manual_seed(0)
    task = MeDUETPretraining(config).to(DEVICE)
    return steps_of(task, config, (batch(number) for number in itertools.count()))


@pytest.mark.parametrize("graph", [False, True])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_step_never_waits_for_the_device(accumulate: int, graph: bool) -> None:
    config = PretrainConfig(
        model=MODEL, batch_size=8, accumulate=accumulate, mftd_start_step=0, cuda_graph=graph
    )
    require_no_waiting(stepper(config))


@pytest.mark.parametrize("compiled", [False, True])
def test_a_graph_gives_the_losses_of_single_launches(compiled: bool) -> None:
    """Through all three stretches of a run, each of which is captured anew."""
    config = PretrainConfig(
        model=MODEL, optimizer=OptimizerConfig(warmup_steps=2), batch_size=8, accumulate=2,
        siqc_start_step=3, mftd_start_step=6, compile=compiled,
    )  # fmt: skip
    plain, graphed = stepper(config), stepper(replace(config, cuda_graph=True))
    for number in range(9):
        wanted, found = plain(number).fetch(), graphed(number).fetch()
        assert found == pytest.approx(wanted, rel=0.02), number


def test_prefetched_batches_are_those_that_were_read() -> None:
    for number, found in enumerate(prefetch((batch(number) for number in range(20)), DEVICE)):
        expected = batch(number)
        assert found["latents"].is_cuda
        assert all(torch.equal(found[name].cpu(), expected[name]) for name in expected)
    assert number == 19


def losses_and_gradient(config: PretrainConfig) -> tuple[dict[str, float], torch.Tensor]:
    """Of one batch; the student's gradient in one row."""
    torch.manual_seed(0)
    task = MeDUETPretraining(config).to(DEVICE)
    model = parallelize(task, config, World(DEVICE))
    # 520 rows of tokens: no multiple of 16, which float8 asks of the sizes of weights alone.
    latents, domain = (batch(0)[name].to(DEVICE).float() for name in ("latents", "domain"))
    mask = random_mix_mask(8, MODEL.num_tokens, torch.Generator(DEVICE).manual_seed(0), DEVICE)
    given = {"latents": latents, "domain": domain.long(), "mask": mask}
    losses = add_gradients(model, given, 0, low=low_precision(config.precision, DEVICE))
    gradients = [item.grad.flatten() for item in task.student.parameters() if item.grad is not None]
    return {name: loss.item() for name, loss in losses.items()}, torch.cat(gradients)


@pytest.mark.skipif(
    torch.cuda.get_device_capability() < (8, 9), reason="float8 needs compute capability 8.9 or more"
)
@pytest.mark.parametrize("compiled", [False, True])
def test_float8_is_close_to_bfloat16(compiled: bool) -> None:
    pytest.importorskip("torchao.float8")
    config = PretrainConfig(model=MODEL, batch_size=8, mftd_start_step=0, compile=compiled)
    precision: Precision
    found = {}
    for precision in ("bfloat16", "float8"):
        found[precision] = losses_and_gradient(replace(config, precision=precision))
    (wanted, exact), (losses, gradient) = found["bfloat16"], found["float8"]
    assert losses == pytest.approx(wanted, rel=0.03)
    assert 0.005 < (gradient - exact).norm() / exact.norm() < 0.15
