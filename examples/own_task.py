"""Train a task of your own with the engine: a denoiser of 1D signals, with a running average of its weights.

``python examples/own_task.py RUN`` trains it, again with ``--resume`` goes on; ``torchrun --nproc-per-node
2`` in front shares the batches out. Checkpoints, exact resume, stops, logs and processes come from the
engine.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from meduet_fast.engine import AdamWConfig, Batch, Batches, EngineConfig, Task, fit
from meduet_fast.engine.optimizer import update_average

LENGTH = 32


class Denoiser(Task):
    """Signals (B, 32) with noise in, signals out."""

    title = "Denoising"

    def __init__(self) -> None:
        super().__init__()
        self.adamw = AdamWConfig(learning_rate=1e-2, warmup_steps=2)
        self.network = nn.Sequential(nn.Linear(LENGTH, 64), nn.GELU(), nn.Linear(64, LENGTH))
        self.average = copy.deepcopy(self.network).requires_grad_(False)

    def prepare(self, batch: Batch, generator: torch.Generator) -> Batch:
        """Draw the noise; random numbers belong here."""
        noise = torch.randn(batch["signal"].shape, generator=generator, device=generator.device)
        return {"signal": batch["signal"], "noise": noise}

    def forward(self, batch: Batch, step: int) -> dict[str, Tensor]:
        """Return the losses, the one to differentiate last."""
        found = self.network(batch["signal"] + 0.3 * batch["noise"])  # (B, 32)
        error = (found - batch["signal"]).square().mean()
        slope = (found - batch["signal"]).diff(dim=1).square().mean()
        return {"error": error, "slope": slope, "total": error + 0.1 * slope * (self.phase(step) == "smooth")}

    def trained(self) -> nn.Module:
        """Return what the optimiser gets."""
        return self.network

    def phase(self, step: int) -> str:
        """Return whether slopes count yet."""
        return "smooth" if step >= 4 else "rough"

    def phase_starts(self) -> tuple[int]:
        """Return when they do."""
        return (4,)

    def after_step(self, step: int) -> None:
        """Let the average follow."""
        update_average(self.average, self.network, 0.9)

    def exports(self) -> Mapping[str, nn.Module]:
        """Return what is written beside every checkpoint."""
        return {"denoiser": self.average}

    def flops(self, step: int) -> int:
        """Return those of two matrix products, forward and twice backward."""
        return 3 * 2 * 2 * LENGTH * 64


class Sines(Batches):
    """Sines of random frequency and phase: batch ``n`` is the same whoever reads it."""

    path, identity = Path("sines"), "sines, version 1"

    def read(self, first: int, last: int, rank: int, size: int, pin: bool) -> Iterator[Batch]:
        """Yield this process's batches."""
        for number in range(first + rank, last, size):
            generator = torch.Generator().manual_seed(number)
            frequency, phase = torch.rand(2, 8, 1, generator=generator)  # (8, 1) each
            yield {"signal": torch.sin(6.3 * (phase + 4 * frequency * torch.linspace(0, 1, LENGTH)))}


def make() -> tuple[Task, Batches]:
    """Build the task and open its data."""
    return Denoiser(), Sines()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--accumulate", type=int, default=2)
    parser.add_argument("--resume", action="store_true")
    options = parser.parse_args()
    config = EngineConfig(
        steps=options.steps, batch_size=8, accumulate=options.accumulate, device="cpu", log_every=1
    )
    print(fit(make, config, options.run, options.resume))
