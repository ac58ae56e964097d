"""Open runs for their evaluation: the crop of any two windows of a table, by a run's pipeline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from meduet_fast.devices import select_device

from .factors import FactorTable
from .judge import EvaluateConfig, SampleLatents, Scales
from .pipeline import DEFAULT_AVERAGE, MeDUETPipeline

STEPS = 15  # of DPM-Solver++, for crops as small as those of an evaluation


def open_generator(
    run: Path, table: FactorTable, config: EvaluateConfig
) -> tuple[SampleLatents, Mapping[str, str]]:
    """Open a run of ``synthesize train``.

    Args:
        run: its folder.
        table: that it was trained with.
        config: device, and crops at once.

    Returns:
        What samples from it, and where that is from.

    Raises:
        UserError: see :meth:`~.pipeline.MeDUETPipeline.from_run`.
    """
    pipeline = MeDUETPipeline.from_run(run).to(select_device(config.device))

    def place(row: int) -> str:
        x, y, z = table.start[row].tolist()
        return f"{table.volumes[int(table.volume[row])]['name']}@{x},{y},{z}"

    def sample(
        contents: Sequence[int], styles: Sequence[int], scales: Scales, seeds: Sequence[int]
    ) -> Tensor:
        samples = pipeline(
            [place(row) for row in contents], [place(row) for row in styles], list(seeds), table.window,
            steps=STEPS, content_scale=scales[0], style_scale=scales[1], batch_size=config.batch_size,
        )  # fmt: skip
        return torch.stack([one.latents for one in samples])  # (N, C, x, y, z)

    origin = {"weights": str(pipeline.config.origin["weights"]), "average": DEFAULT_AVERAGE}
    return sample, {**origin, "sampler": f"DPM-Solver++, {STEPS} steps"}
