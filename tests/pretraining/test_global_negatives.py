"""The contrast over all processes is that of one process on all their crops, loss and gradients."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from meduet_fast.models import MeDUET
from meduet_fast.pretraining import ObjectiveConfig, pretraining_losses, random_mix_mask

from ..engine.conftest import TINY_MODEL
from ..engine.team import FORKSERVER

BATCH = 4


def in_pairs(parts: list[torch.Tensor]) -> torch.Tensor:
    """All processes' rows as one batch, in which row i's partner is the one that it had before."""
    half = len(parts[0]) // 2
    return torch.cat([part[:half] for part in parts] + [part[half:] for part in reversed(parts)])


@pytest.mark.parametrize("size", [2, 3])
def test_many_processes_contrast_as_one(tmp_path: Path, size: int) -> None:
    torch.manual_seed(0)
    student, teacher = MeDUET(TINY_MODEL), MeDUET(TINY_MODEL)
    student.save_pretrained(tmp_path / "student.safetensors")
    teacher.save_pretrained(tmp_path / "teacher.safetensors")
    edge = TINY_MODEL.latent_size
    batches = [
        {
            "latents": torch.randn(BATCH, TINY_MODEL.in_channels, edge, edge, edge, dtype=torch.float64),
            "domain": torch.randint(TINY_MODEL.num_domains, (BATCH,)),
            "mask": random_mix_mask(BATCH, TINY_MODEL.num_tokens),
        }
        for _ in range(size)
    ]
    processes = []
    for rank, batch in enumerate(batches):
        save_file(batch, tmp_path / f"batch{rank}.safetensors")
        settings = {"rank": rank, "size": size, "folder": tmp_path}
        script = str(Path(__file__).with_name("negatives.py"))
        processes.append(FORKSERVER.Process(target=runpy.run_path, args=(script, {"settings": settings})))
        processes[-1].start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * size
    found = load_file(tmp_path / "found.safetensors")

    latents, domain, mask = (
        in_pairs([batch[key] for batch in batches]) for key in ("latents", "domain", "mask")
    )
    losses = pretraining_losses(
        student.double(), teacher.double(), latents, domain, mask, ObjectiveConfig(global_negatives=True)
    )
    losses["total"].backward()
    for name, value in losses.items():
        torch.testing.assert_close(found[name], value.detach(), rtol=1e-12, atol=1e-12)
    for name, item in student.named_parameters():
        assert item.grad is not None
        torch.testing.assert_close(found[f"grad.{name}"], item.grad, rtol=1e-9, atol=1e-12)
