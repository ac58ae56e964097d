"""Compiled and recomputed blocks: the same losses, one graph each, nothing compiled again after warm-up."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

from meduet_fast.engine import parallel
from meduet_fast.engine.metrics import RunLog, read_metrics
from meduet_fast.pretraining import PretrainConfig, pretrain
from meduet_fast.pretraining.losses import LOSSES


@pytest.fixture(autouse=True)
def _forget_what_was_compiled() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@pytest.fixture
def config(tiny_config: PretrainConfig) -> PretrainConfig:
    """Two steps of each of the three stretches of a run, then four more."""
    return replace(tiny_config, siqc_start_step=2, mftd_start_step=4, steps=10, checkpoint_every=10)


@pytest.mark.parametrize(
    ("recompute", "backend"), [(False, "aot_eager"), pytest.param(True, "inductor", marks=pytest.mark.slow)]
)
def test_compiled_blocks_give_the_same_losses_and_are_compiled_once(
    tiny_store: Path, config: PretrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    recompute: bool, backend: str,
) -> None:  # fmt: skip
    pretrain(tiny_store, tmp_path / "eager", config)
    original = RunLog.report

    def report(self: RunLog, step: int, *rest: Any) -> str | None:
        if step == 5:  # the first step of each stretch has been
            torch.compiler.set_stance("fail_on_recompile")
        return original(self, step, *rest)

    monkeypatch.setattr(RunLog, "report", report)
    monkeypatch.setattr(parallel.torch, "compile", partial(torch.compile, backend=backend))
    try:
        pretrain(tiny_store, tmp_path / "compiled", replace(config, compile=True, recompute=recompute))
    finally:
        torch.compiler.set_stance("default")
    # Encoder and decoder, of the student with gradients and of the teacher without.
    assert counters["stats"]["unique_graphs"] == 4
    assert not counters["graph_break"]
    for eager, compiled in zip(
        read_metrics(tmp_path / "eager"), read_metrics(tmp_path / "compiled"), strict=True
    ):
        for name in LOSSES:
            assert compiled[name] == pytest.approx(eager[name], abs=1e-5), (name, eager["step"])


def test_recomputed_blocks_give_the_same_bits(
    tiny_store: Path, config: PretrainConfig, tmp_path: Path
) -> None:
    pretrain(tiny_store, tmp_path / "kept", config)
    pretrain(tiny_store, tmp_path / "recomputed", replace(config, recompute=True))
    first, second = (
        [[record[name] for name in (*LOSSES, "grad_norm")] for record in read_metrics(tmp_path / run)]
        for run in ("kept", "recomputed")
    )
    assert first == second


def test_blocks_of_any_number_of_sizes_are_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """A U-Net's are of one class, and of more sizes than PyTorch compiles a function for."""

    class Block(torch.nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(width))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * self.weight

    widths = range(2, 12)
    monkeypatch.setattr(torch._dynamo.config, "recompile_limit", torch._dynamo.config.recompile_limit)
    monkeypatch.setattr(parallel.torch, "compile", partial(torch.compile, backend="eager"))
    blocks = [Block(width) for width in widths]
    parallel.compile_blocks(blocks)
    for width, block in zip(widths, blocks, strict=True):
        block(torch.ones(3, width)).sum().backward()
    assert counters["stats"]["unique_graphs"] == len(widths)
