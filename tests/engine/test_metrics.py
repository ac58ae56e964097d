"""Speed of a device, as a run's records tell it."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from meduet_fast.data.store import LatentStore
from meduet_fast.engine.distributed import World
from meduet_fast.engine.metrics import RunLog, peak_tflops, read_metrics
from meduet_fast.pretraining import MeDUETPretraining, PretrainConfig
from meduet_fast.pretraining.cost import flops_per_sample
from meduet_fast.pretraining.losses import LOSSES

from .team import train_alone

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
    with RunLog(tmp_path, 0, MeDUETPretraining(config), config, World(CUDA)) as log:
        began = time.perf_counter()
        texts = [log.report(step, values, 0.25, began + step) for step in range(4)]
    assert [text is None for text in texts] == [True, False, True, False]
    assert "MFU" in str(texts[1])
    records = read_metrics(tmp_path)
    assert records[1]["samples_per_s"] == pytest.approx(config.batch_size * 3)  # a step takes a second
    assert records[1]["data_wait_percent"] == pytest.approx(25)
    for record, mftd in zip(records, (False, True), strict=True):
        flops = flops_per_sample(config.model, replace(config.objective, mftd=mftd))
        assert record["tflops_per_s"] == pytest.approx(record["samples_per_s"] * flops / 1e12)
        assert record["mfu_percent"] == pytest.approx(100 * record["tflops_per_s"] / 989)
        assert record["tokens_per_s"] == pytest.approx(record["samples_per_s"] * config.model.num_tokens)
        assert record["memory_mb"] == 3000


def test_rates_are_those_of_the_step_and_not_of_its_record(
    tiny_store: Path, tiny_config: PretrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step with a checkpoint is recorded right after the one before it."""
    read_crops = LatentStore.read_crops
    monkeypatch.setattr(LatentStore, "read_crops", lambda *args: time.sleep(0.1) or read_crops(*args))
    run = train_alone(tiny_store, tmp_path / "run", tiny_config)
    for record in read_metrics(run):
        assert 0 < record["data_wait_percent"] <= 100
        assert record["samples_per_s"] <= tiny_config.batch_size / 0.1
