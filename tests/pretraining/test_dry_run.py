"""What a run will take: FLOPs and memory held to what PyTorch counts and keeps; the plan as it is printed."""

from __future__ import annotations

import json
import re
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from meduet_fast.data.store import LatentStore
from meduet_fast.data.store_writer import StoreWriter, VolumeRecord
from meduet_fast.engine.dry_run import print_plan
from meduet_fast.engine.parallel import shard_count
from meduet_fast.errors import UserError
from meduet_fast.lock import FolderLock
from meduet_fast.models import MeDUET, MeDUETConfig
from meduet_fast.models.export import export_model
from meduet_fast.pretraining import (
    ObjectiveConfig,
    PretrainConfig,
    pretrain,
    pretraining_losses,
    random_mix_mask,
)
from meduet_fast.pretraining.config import doubts
from meduet_fast.pretraining.cost import (
    activation_bytes,
    count_parameters,
    counted_flops,
    flops_per_sample,
    memory_estimate,
)
from meduet_fast.pretraining.dry_run import format_plan, format_sizes
from meduet_fast.pretraining.train import LatentCrops
from tests.kept import kept_bytes

OBJECTIVES = [
    ObjectiveConfig(mftd=mftd, siqc=siqc) for mftd, siqc in ((True, True), (False, True), (True, False))
] + [ObjectiveConfig(mftd=False, siqc=False)]
DEEP = MeDUETConfig(
    latent_size=8, patch_size=2, embed_dim=96, depth=3, num_heads=3, decoder_embed_dim=48, decoder_depth=2,
    decoder_num_heads=2, num_domains=3,
)  # fmt: skip


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_flops_of_few_blocks_tell_those_of_many(objective: ObjectiveConfig) -> None:
    assert flops_per_sample(DEEP, objective) == counted_flops(DEEP, objective)


@pytest.mark.parametrize(("mftd", "published"), [(True, 838e9), (False, 565e9)])
def test_flops_at_vit_base(mftd: bool, published: float) -> None:
    assert flops_per_sample(MeDUETConfig(), ObjectiveConfig(mftd=mftd)) == pytest.approx(published, rel=2e-3)


def _norm_as_on_cuda(self: nn.LayerNorm, x: Tensor) -> Tensor:
    """Autocast has LayerNorm compute in float32 on CUDA, not on the CPU."""
    with torch.autocast("cpu", enabled=False):
        return F.layer_norm(x.float(), self.normalized_shape, self.weight, self.bias, self.eps)


def _kept_bytes(config: MeDUETConfig, objective: ObjectiveConfig, batch: int, recompute: bool) -> int:
    """Bytes of the storages that autograd keeps for backward, parameters left out."""
    model = MeDUET(config)
    for block in (*model.blocks, *model.decoder_blocks) if recompute else ():
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)  # type: ignore[method-assign]
    latents, domain = torch.randn(batch, 4, 8, 8, 8), torch.zeros(batch, dtype=torch.int64)
    mask = random_mix_mask(batch, config.num_tokens)
    return kept_bytes(model, lambda: pretraining_losses(model, model, latents, domain, mask, objective))


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_activations_are_what_autograd_keeps(
    objective: ObjectiveConfig, recompute: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The slope over the batch: copies of weights in bfloat16 are kept too, but once."""
    monkeypatch.setattr(nn.LayerNorm, "forward", _norm_as_on_cuda)
    config = replace(DEEP, embed_dim=192, num_heads=6, decoder_embed_dim=96)
    kept = _kept_bytes(config, objective, 6, recompute) - _kept_bytes(config, objective, 2, recompute)
    assert activation_bytes(config, objective, 4, recompute) == pytest.approx(
        kept, rel=0.1 if recompute else 0.03
    )


def test_memory_adds_up_and_shards() -> None:
    config = PretrainConfig(model=DEEP, batch_size=2)
    count = count_parameters(DEEP)
    whole, part = memory_estimate(config), memory_estimate(config, 4)
    state = (whole.weights, whole.averages, whole.gradients, whole.optimizer)
    assert state == (4 * count, 4 * count, 4 * count, 8 * count)
    assert whole.total == sum(state) + whole.copies + whole.activations
    assert (part.weights, part.activations) == (-(-count // 4) * 4, whole.activations)
    large = PretrainConfig()
    assert memory_estimate(large, 8).total < memory_estimate(large).total
    assert memory_estimate(replace(large, recompute=True)).total < memory_estimate(large).total / 3


def test_who_shares_a_copy(tiny_config: PretrainConfig) -> None:
    ddp, fsdp, hsdp = (replace(tiny_config, parallel=name) for name in ("ddp", "fsdp", "hsdp"))
    assert [shard_count(config, 8, 4) for config in (ddp, fsdp, hsdp)] == [1, 8, 4]
    assert shard_count(replace(hsdp, shard_size=2), 8, 4) == 2
    with pytest.raises(UserError, match="shard_size is 3, expected a divisor of the 8 processes"):
        shard_count(replace(hsdp, shard_size=3), 8, 4)


def test_the_plan_of_a_run(tiny_store: Path, tiny_config: PretrainConfig, tmp_path: Path) -> None:
    config = replace(tiny_config, accumulate=3, parallel="hsdp")
    (init,) = export_model(MeDUET(config.model), tmp_path / "init.safetensors", "reference")
    plan = format_plan(config, tiny_store, processes=4, local=2, init=init)
    for words in (
        "4 volumes of 3 domains (a, b, c)",
        "shortest edges are 10 to 10",
        "4 processes, one GPU each: 2 copies, each sharded over 2 (hsdp)",
        "4 crops at once x 3 accumulated x 4 = 48 crops a step",
        "6, 288 crops",
        f"init        {init}, SHA-256 ",
        "left fresh  1 tensor, 2 parameters: siqc_log_scale",
        "from step 0 on: reconstruction + SiQC",
        "from step 3 on: reconstruction + MFTD + SiQC",
        "B a GPU: weights",
        "2 checkpoints of",
    ):
        assert words in plan
    assert "1 GPU\n" in format_plan(config)


def test_a_store_that_does_not_fit_is_refused(tiny_store: Path, tiny_config: PretrainConfig) -> None:
    with pytest.raises(UserError, match=r"3 domains \(a, b, c\), model\.num_domains is 2"):
        format_plan(replace(tiny_config, model=replace(tiny_config.model, num_domains=2)), tiny_store)
    with pytest.raises(UserError, match=r"volume0 \(20, 12, 10\) is smaller than a crop of 12"):
        format_plan(replace(tiny_config, model=replace(tiny_config.model, latent_size=12)), tiny_store)


def test_the_plan_is_printed_once(
    tiny_config: PretrainConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def form(processes: int, local: int) -> str:
        return format_plan(tiny_config, None, processes, local)

    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, lines in (("0", 1), ("1", 0)):
        monkeypatch.setenv("RANK", rank)
        print_plan(form)
        assert capsys.readouterr().out.count("2 processes") == lines
    monkeypatch.setenv("WORLD_SIZE", "two")
    with pytest.raises(UserError, match="WORLD_SIZE is 'two', expected a number"):
        print_plan(form)


def test_the_table_of_sizes(tiny_config: PretrainConfig) -> None:
    larger = replace(tiny_config, model=DEEP)
    lines = format_sizes({"larger": larger, "tiny": tiny_config}).splitlines()
    assert [line.split(" | ")[0] for line in lines] == ["| configuration", "| ---", "| `tiny`", "| `larger`"]
    assert {line.count("|") for line in lines} == {7}
    assert "\n".join(lines[:2]) in (Path(__file__).parents[2] / "README.md").read_text()


def made_run(folder: Path, config: PretrainConfig, data: str) -> None:
    """What a run leaves behind that a plan looks at."""
    checkpoint = folder / "checkpoints" / "4"
    checkpoint.mkdir(parents=True)
    record = {"step": 4, "config": config.identity(), "data": data}
    (checkpoint / "run.json").write_text(json.dumps(record))


def test_the_plan_refuses_what_the_run_would(
    tiny_store: Path, tiny_config: PretrainConfig, tmp_path: Path
) -> None:
    """Each refusal is the run's own, which is tried beside it; nothing is written."""
    held, old, other = tmp_path / "held", tmp_path / "old", tmp_path / "other"
    identity = LatentCrops(LatentStore.open(tiny_store), tiny_config).identity
    made_run(old, tiny_config, identity)
    made_run(other, tiny_config, "others")
    (tmp_path / "file").touch()
    faster = replace(tiny_config, optimizer=replace(tiny_config.optimizer, learning_rate=1.0))
    cases: list[tuple[PretrainConfig, Path, bool, str]] = [
        (replace(tiny_config, device="tpu7"), tmp_path / "run", False, "device 'tpu7' can't be used"),
        (replace(tiny_config, cuda_graph=True), tmp_path / "run", False, "cuda_graph is for one GPU"),
        (replace(tiny_config, attention="xformers"), tmp_path / "run", False, "attention 'xformers'"),
        (tiny_config, old, False, "holds a run already"),
        (faster, old, True, "optimizer.learning_rate was 0.001, now 1.0"),
        (replace(tiny_config, steps=3), old, True, "4 steps are done, --steps asks for 3"),
        (tiny_config, other, True, "the data are not those"),
        (tiny_config, tmp_path / "file", False, "file: cannot be written"),
        (tiny_config, tmp_path / "file" / "run", False, "file/run: cannot be written"),
        (tiny_config, tmp_path / ("n" * 300), False, "File name too long"),
        (tiny_config, held, True, "held: in use by process"),
    ]
    with FolderLock(held):
        before = sorted(tmp_path.rglob("*"))
        for config, output, resume, message in cases:
            with pytest.raises(UserError, match=re.escape(message)):
                format_plan(config, tiny_store, output=output, resume=resume)
            assert sorted(tmp_path.rglob("*")) == before
            with pytest.raises(UserError, match=re.escape(message)):
                pretrain(tiny_store, output, config, resume)
            assert sorted(tmp_path.rglob("*")) == before
        longer = replace(tiny_config, steps=9)
        assert "9, 36 crops" in format_plan(longer, tiny_store, output=old, resume=True)
        format_plan(tiny_config, tiny_store, output=tmp_path / "new" / "run")
        assert sorted(tmp_path.rglob("*")) == before


def test_what_is_hardly_meant_is_said(
    tiny_config: PretrainConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with StoreWriter(tmp_path / "st", tokenizer="t", tokenizer_spec="t", channels=4, compression=4) as writer:
        for name in "ab":
            record = VolumeRecord(
                name=name, domain="one", body_part="none", content_key=name, source=name,
                latent=torch.randn(4, 20, 8, 8), affine=np.eye(4), spacing=(1.5, 1.5, 1.5), intensity={},
            )  # fmt: skip
            writer.add(record)
    config = replace(tiny_config, steps=1)
    plan = format_plan(config, tmp_path / "st")
    pretrain(tmp_path / "st", tmp_path / "run", config)
    said = capsys.readouterr().err
    for words in (
        "the store has one domain",
        "the teacher keeps 100 % of what it began with over the 1 steps",
    ):
        assert f"warning     {words}" in plan or f"            {words}" in plan
        assert f"warning: {words}" in said


def test_a_teacher_that_keeps_its_start() -> None:
    """As the product of all momenta says; half of it is the limit."""
    assert doubts(10, 0.9, 0.9, 2) == []  # 0.9^10 = 0.35
    [kept] = doubts(6, 0.9, 0.9, 2)
    assert kept.startswith("the teacher keeps 53 % of what it began with over the 6 steps (without --init, ")
    assert doubts(7, 0.9, 0.9, 2) == []  # 0.48
    assert doubts(100_000, 0.0, 1.0, None) == []
    assert len(doubts(1, 0.99, 0.99, 1)) == 2
    assert PretrainConfig().doubts(10) == []
    [early] = doubts(200_000, 0.997, 0.9997, 2, done=100)  # a good run's early checkpoint: 0.997^100 = 0.74
    assert early.startswith("the teacher keeps 74 % of what it began with over the 100 steps")
    assert doubts(200_000, 0.997, 0.9997, 2, done=1000) == []


def test_doubts_of_a_long_run_take_no_time() -> None:
    began = time.perf_counter()
    [kept] = doubts(2**40, 1 - 1e-13, 1 - 1e-13, 2)
    assert "keeps 90 %" in kept  # exp(-2^40 1e-13) = 0.896
    assert doubts(2**40, 0.9, 1.0, 2) == []
    assert time.perf_counter() - began < 1


def test_the_plan_refuses_tasks_that_do_not_know_of_each_other(
    tiny_config: PretrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    with pytest.raises(UserError, match="one of 2 tasks"):
        format_plan(tiny_config)
