"""Training on CUDA: no step waits for the device, and batches arrive whole."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch

from meduet_fast.model import MeDUET, MeDUETConfig
from meduet_fast.training import PretrainConfig
from meduet_fast.training.optimizer import build_optimizer
from meduet_fast.training.prefetch import prefetch
from meduet_fast.training.pretrain import train_step
from meduet_fast.training.step import PretrainStep

DEVICE = torch.device("cuda")
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


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_step_never_waits_for_the_device(accumulate: int) -> None:
    torch.manual_seed(0)
    student = MeDUET(MODEL).to(DEVICE)
    teacher = copy.deepcopy(student).requires_grad_(False)
    config = PretrainConfig(model=MODEL, batch_size=8, accumulate=accumulate, mftd_start_step=0)
    step, optimizer = PretrainStep(student, teacher), build_optimizer(student, config.optimizer)
    batches = prefetch((batch(number) for number in itertools.count()), DEVICE)
    for number in range(3):  # kernels and the optimiser's state are made at first
        train_step(step, optimizer, batches, number, config, DEVICE)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        values = [train_step(step, optimizer, batches, number, config, DEVICE) for number in range(3, 6)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.tensor(list(value.fetch().values())).isfinite().all() for value in values)


def test_prefetched_batches_are_those_that_were_read() -> None:
    for number, found in enumerate(prefetch((batch(number) for number in range(20)), DEVICE)):
        expected = batch(number)
        assert found["latents"].is_cuda
        assert all(torch.equal(found[name].cpu(), expected[name]) for name in expected)
    assert number == 19
