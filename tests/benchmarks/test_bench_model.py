"""Passes of a network so small that it takes seconds; nothing is compiled."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from benchmarks import bench_model
from benchmarks.harness import time_case
from benchmarks.step_parts import Setting
from meduet_fast.models import MeDUETConfig

CPU = torch.device("cpu")
TINY = Setting(
    "tiny",
    MeDUETConfig(
        latent_size=8, patch_size=2, embed_dim=24, depth=2, num_heads=2, decoder_embed_dim=12,
        decoder_depth=1, decoder_num_heads=2, num_domains=3,
    ),
)  # fmt: skip


@pytest.fixture(autouse=True)
def _no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nn.Module, "compile", lambda self, **options: None)


@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize("part", [bench_model.ENCODER, bench_model.DECODER])
def test_peers_with_our_weights_agree_and_are_timed(part: str, both: bool) -> None:
    rows = time_case(bench_model.pass_case(TINY, part, 2, both, CPU), CPU, 0.05)
    assert [row.variant for row in rows if row.median_us] == [
        "ours", "ours, not compiled", "TransformerEncoder, compiled", "TransformerEncoder", "MONAI",
    ]  # fmt: skip
    assert rows[0].direction == ("forward_backward" if both else "forward")


def test_a_peer_that_differs_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    original = bench_model.monai_layers

    def wrong(blocks: list[bench_model.Block]) -> nn.ModuleList:
        layers = original(blocks)
        layers[0].norm1.eps = 0.1
        return layers

    monkeypatch.setattr(bench_model, "monai_layers", wrong)
    rows = time_case(bench_model.pass_case(TINY, bench_model.ENCODER, 2, False, CPU), CPU, 0.05)
    assert rows[-1].median_us is None
    assert "output is off by" in rows[-1].unavailable
