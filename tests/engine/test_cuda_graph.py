"""The step around a CUDA graph; here a stand-in is replayed, ``tests/gpu`` has the real one."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from meduet_fast.engine import cuda_graph, loop
from meduet_fast.engine.cuda_graph import WARM_UP, GraphedGradients, Replay
from meduet_fast.engine.distributed import World
from meduet_fast.engine.loop import backward_of
from meduet_fast.engine.metrics import losses_in, read_metrics
from meduet_fast.engine.optimizer import build_optimizer
from meduet_fast.engine.step import Backward, train_step
from meduet_fast.errors import UserError
from meduet_fast.models import MeDUET
from meduet_fast.pretraining import MeDUETPretraining, PretrainConfig, pretrain

CPU = torch.device("cpu")


def stand_in(work: Callable[[], dict[str, Tensor]]) -> tuple[dict[str, Tensor], Replay]:
    """Does what a graph does: works on the tensors it was recorded with, and overwrites its results."""
    for _ in range(WARM_UP):
        results = work()

    def replay() -> None:
        for name, value in work().items():
            results[name].copy_(value)

    return results, replay


def batches(config: PretrainConfig) -> Iterator[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    size = config.model.latent_size
    while True:
        yield {
            "latents": torch.randn(4, 4, size, size, size, generator=generator),
            "domain": torch.randint(3, (4,), generator=generator),
            "volume": torch.zeros(4),
        }


def losses_of(config: PretrainConfig, graphed: bool) -> tuple[list[dict[str, float]], MeDUET]:
    """All steps of a run, and the teacher at its end."""
    torch.manual_seed(0)
    task = MeDUETPretraining(config)
    backward: Backward
    if graphed:
        backward = GraphedGradients(task, 1 / config.accumulate)
        config = replace(config, cuda_graph=True)
    else:
        backward = backward_of(task, config, World(CPU))
    optimizer, stream = build_optimizer(task.student, config.optimizer), batches(config)
    values = [
        train_step(task, backward, optimizer, stream, number, config, World(CPU)).fetch()
        for number in range(config.steps)
    ]
    return values, task.teacher


@pytest.mark.parametrize("accumulate", [1, 2])
def test_replayed_steps_are_the_plain_ones(
    tiny_config: PretrainConfig, accumulate: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through all three stretches, each of which is captured anew."""
    capture = Mock(side_effect=stand_in)
    monkeypatch.setattr(cuda_graph, "capture", capture)
    config = replace(tiny_config, accumulate=accumulate, siqc_start_step=2, mftd_start_step=4, steps=7)
    found, teacher = losses_of(config, graphed=True)
    wanted, plain_teacher = losses_of(config, graphed=False)
    assert capture.call_count == 3
    assert found == wanted
    for key, value in plain_teacher.state_dict().items():
        assert torch.equal(teacher.state_dict()[key], value), key


def test_a_run_with_a_graph_goes_on_exactly(
    tiny_store: Path, tiny_config: PretrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its gradients exist before the first step; the optimiser's moments must have been loaded by then."""
    monkeypatch.setattr(cuda_graph, "capture", stand_in)
    monkeypatch.setattr(loop, "refuse_graph", lambda *_: None)
    config = replace(tiny_config, cuda_graph=True)
    pretrain(tiny_store, tmp_path / "whole", config)
    whole = read_metrics(tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "stopped")
    shutil.rmtree(tmp_path / "stopped" / "checkpoints" / "6")
    pretrain(tiny_store, tmp_path / "stopped", config, resume=True)
    names = [*losses_in(whole[0]), "grad_norm"]
    for wanted, found in zip(whole, read_metrics(tmp_path / "stopped"), strict=True):
        assert [found[name] for name in names] == [wanted[name] for name in names]
    for name in ("student", "teacher"):
        first, second = (
            load_file(tmp_path / run / "checkpoints/6" / f"{name}.safetensors")
            for run in ("whole", "stopped")
        )
        assert all(torch.equal(first[key], second[key]) for key in first)


def test_a_graph_where_there_can_be_none_is_refused(
    tiny_store: Path, tiny_config: PretrainConfig, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="cuda_graph is for one GPU, without torchrun: found device cpu"):
        pretrain(tiny_store, tmp_path / "run", replace(tiny_config, cuda_graph=True))
    with pytest.raises(ValueError, match=r"cuda_graph is on, expected .*'reversal'"):
        replace(
            tiny_config,
            cuda_graph=True,
            objective=replace(tiny_config.objective, content_adversary="erasure"),
        )
