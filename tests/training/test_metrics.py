"""Speed of a device, as a run's records tell it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from meduet_fast.training import PretrainConfig
from meduet_fast.training.cost import flops_per_sample
from meduet_fast.training.metrics import LOSSES, RunLog, peak_tflops, read_metrics
from meduet_fast.training.world import World

CUDA = torch.device("cuda")


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989), ("NVIDIA H100 PCIe", 756), ("NVIDIA H100 NVL", 835),
        ("NVIDIA H200", 989), ("NVIDIA H200 NVL", 835), ("NVIDIA GH200 480GB", 989),
        ("NVIDIA A100-SXM4-80GB", 312), ("NVIDIA TITAN V", None),
    ],
)  # fmt: skip
def test_the_peak_is_that_of_the_device(
    monkeypatch: pytest.MonkeyPatch, name: str, peak: float | None
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_tflops(CUDA) == peak
    assert peak_tflops(torch.device("cpu")) is None


def test_flops_and_utilisation_follow_from_the_rate(
    tiny_config: PretrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 3e9)
    config = replace(tiny_config, log_every=2, accumulate=3)
    values = dict.fromkeys((*LOSSES, "grad_norm", "learning_rate"), 1.0)
    with RunLog(tmp_path, 0, config, World(CUDA)) as log:
        texts = [log.report(step, values, 0.0) for step in range(4)]
    assert [text is None for text in texts] == [True, False, True, False]
    assert "MFU" in str(texts[1])
    for record, mftd in zip(read_metrics(tmp_path), (False, True), strict=True):
        flops = flops_per_sample(config.model, replace(config.objective, mftd=mftd))
        assert record["tflops_per_s"] == pytest.approx(record["samples_per_s"] * flops / 1e12)
        assert record["mfu_percent"] == pytest.approx(100 * record["tflops_per_s"] / 989)
        assert record["tokens_per_s"] == pytest.approx(record["samples_per_s"] * config.model.num_tokens)
        assert record["memory_mb"] == 3000
