"""The loop: exact resume, stops, bad losses, full disks, settings that do not fit."""

from __future__ import annotations

import os
import random
import resource
import shutil
import signal
import time
from dataclasses import replace
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from meduet_fast.data.store import LatentStore
from meduet_fast.engine.checkpoint import checkpoint_steps, latest_checkpoint
from meduet_fast.engine.metrics import RunLog, read_metrics
from meduet_fast.errors import UserError
from meduet_fast.models import MeDUET
from meduet_fast.pretraining import PretrainConfig, pretrain
from meduet_fast.pretraining.losses import LOSSES

from .team import FORKSERVER


def losses(run: Path) -> list[tuple[float, ...]]:
    return [tuple(record[name] for name in (*LOSSES, "grad_norm")) for record in read_metrics(run)]


def weights(run: Path) -> dict[str, torch.Tensor]:
    checkpoint = latest_checkpoint(run)
    return {
        f"{model}.{key}": value
        for model in ("student", "teacher")
        for key, value in load_file(checkpoint / f"{model}.safetensors").items()
    }


@pytest.fixture(scope="module")
def whole_run(
    tiny_store: Path, tiny_settings: PretrainConfig, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A run to its end; copy before changing it."""
    run = tmp_path_factory.mktemp("whole") / "run"
    result = pretrain(tiny_store, run, tiny_settings)
    assert result.finished
    assert result.step == tiny_settings.steps
    return run


def test_a_run_writes_what_it_promises(whole_run: Path, tiny_config: PretrainConfig) -> None:
    assert checkpoint_steps(whole_run / "checkpoints") == [4, 6]
    records = read_metrics(whole_run)
    assert [record["step"] for record in records] == list(range(6))
    assert [record["mftd"] > 0 for record in records] == [False] * 3 + [True] * 3
    assert list((whole_run / "tensorboard").glob("events*"))
    student = MeDUET.from_pretrained(latest_checkpoint(whole_run) / "student.safetensors")
    assert student.config == tiny_config.model
    # The contrast's scales are trained, which the published code forgot.
    assert (student.siqc_log_scale != MeDUET(tiny_config.model).siqc_log_scale).all()


@pytest.mark.parametrize("stop_at", [1, 4])
@pytest.mark.parametrize("workers", [0, 2])
def test_resume_is_exact(
    whole_run: Path, tiny_store: Path, tiny_config: PretrainConfig, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, stop_at: int, workers: int,
) -> None:  # fmt: skip
    """A run interrupted by SIGTERM and resumed gives the same bits as one that was not, with any workers."""
    run = tmp_path / "stopped"
    config = replace(tiny_config, workers=workers)
    original = RunLog.report

    def report_then_stop(self: RunLog, step: int, *rest: Any) -> str | None:
        if step == stop_at - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, step, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(RunLog, "report", report_then_stop)
        result = pretrain(tiny_store, run, config)
    assert result.stopped_by == signal.SIGTERM
    assert 0 < result.step < config.steps
    assert checkpoint_steps(run / "checkpoints")[-1] == result.step
    torch.manual_seed(12345)  # the state outside must not matter
    assert pretrain(tiny_store, run, config, resume=True).finished
    assert losses(run) == losses(whole_run)
    expected = weights(whole_run)
    resumed = weights(run)
    assert resumed.keys() == expected.keys()
    assert all(torch.equal(resumed[key], expected[key]) for key in expected)


def test_a_finished_run_is_left_alone(whole_run: Path, tiny_store: Path, tiny_config: PretrainConfig) -> None:
    before = (latest_checkpoint(whole_run) / "run.json").stat().st_mtime_ns
    assert pretrain(tiny_store, whole_run, tiny_config, resume=True).finished
    assert (latest_checkpoint(whole_run) / "run.json").stat().st_mtime_ns == before


@pytest.mark.parametrize("seed", [20251126, 2**64 - 1])
def test_large_seeds(tiny_store: Path, tiny_config: PretrainConfig, tmp_path: Path, seed: int) -> None:
    config = replace(tiny_config, seed=seed, steps=2, checkpoint_every=1, workers=1)
    assert pretrain(tiny_store, tmp_path / "run", config).finished
    first = losses(tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "2")
    assert pretrain(tiny_store, tmp_path / "run", config, resume=True).finished
    assert losses(tmp_path / "run") == first


def test_an_existing_run_needs_resume_and_the_same_settings(
    whole_run: Path, tiny_store: Path, tiny_config: PretrainConfig
) -> None:
    with pytest.raises(UserError, match="--resume"):
        pretrain(tiny_store, whole_run, tiny_config)
    other = replace(tiny_config, optimizer=replace(tiny_config.optimizer, learning_rate=2e-3))
    with pytest.raises(UserError, match=r"optimizer\.learning_rate was 0\.001, now 0\.002"):
        pretrain(tiny_store, whole_run, other, resume=True)


def test_accumulation_equals_its_own_batches(
    tiny_store: Path, tiny_config: PretrainConfig, tmp_path: Path
) -> None:
    """Two batches a step read the same crops in the same order as one batch a step does."""
    config = replace(tiny_config, steps=2, accumulate=2, mftd_start_step=0)
    assert pretrain(tiny_store, tmp_path / "run", config).finished
    first = read_metrics(tmp_path / "run")[0]
    # At step 0 nothing was trained yet: the step's loss is the mean over the first two batches.
    single = replace(config, steps=2, accumulate=1, optimizer=replace(config.optimizer, clip_norm=1e-30))
    single = replace(
        single, optimizer=replace(single.optimizer, initial_learning_rate=0.0, warmup_steps=10**9)
    )
    assert pretrain(tiny_store, tmp_path / "single", single).finished
    parts = read_metrics(tmp_path / "single")
    assert first["reconstruction"] == pytest.approx(
        sum(item["reconstruction"] for item in parts) / 2, rel=1e-6
    )


def test_a_non_finite_loss_names_term_step_and_volumes(
    tiny_store: Path, tiny_config: PretrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = LatentStore.read_crops
    reads = 0

    def poisoned(self: LatentStore, *args: object) -> torch.Tensor:
        nonlocal reads
        reads += 1
        crops = original(self, *args)  # type: ignore[arg-type]
        return crops * float("nan") if reads == 4 else crops

    monkeypatch.setattr(LatentStore, "read_crops", poisoned)
    message = (
        r"step 3: reconstruction is nan .*volumes in the batch: volume.*good checkpoint is .*checkpoints/2"
    )
    with pytest.raises(UserError, match=message):
        pretrain(tiny_store, tmp_path / "run", tiny_config)
    assert checkpoint_steps(tmp_path / "run" / "checkpoints") == [2]
    for value in weights(tmp_path / "run").values():
        assert torch.isfinite(value).all()


def test_settings_that_do_not_fit_the_store(
    tiny_store: Path, tiny_config: PretrainConfig, tmp_path: Path
) -> None:
    few = replace(tiny_config, model=replace(tiny_config.model, num_domains=2))
    with pytest.raises(UserError, match=r"3 domains \(a, b, c\), model.num_domains is 2"):
        pretrain(tiny_store, tmp_path / "run", few)
    large = replace(tiny_config, model=replace(tiny_config.model, latent_size=16))
    with pytest.raises(UserError, match="volume0"):
        pretrain(tiny_store, tmp_path / "run", large)
    with pytest.raises(UserError, match="device 'tpu7'"):
        pretrain(tiny_store, tmp_path / "run", replace(tiny_config, device="tpu7"))
    with pytest.raises(ValueError, match="batch_size is 3, expected an even number"):
        replace(tiny_config, batch_size=3)
    assert not (tmp_path / "run").exists()


def test_a_damaged_checkpoint_is_refused(
    whole_run: Path, tiny_store: Path, tiny_config: PretrainConfig, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(whole_run, run)
    for file in (latest_checkpoint(run) / "state").glob("*.distcp"):
        file.write_bytes(file.read_bytes()[:1000])
    longer = latest_checkpoint(run)
    longer.rename(longer.with_name("5"))
    text = (longer.with_name("5") / "run.json").read_text().replace('"step": 6', '"step": 5')
    (longer.with_name("5") / "run.json").write_text(text)
    with pytest.raises(UserError, match="checkpoints/5: not a readable checkpoint"):
        pretrain(tiny_store, run, tiny_config, resume=True)


# As code, because the server can't import this file. One thread, as here: then sums are bit-equal.
RESUME = """
import torch
from meduet_fast.pretraining import pretrain
torch.set_num_threads(1)
pretrain(*arguments, resume=True)
"""


def start(store: Path, run: Path, config: PretrainConfig) -> ForkServerProcess:
    process = FORKSERVER.Process(target=exec, args=(RESUME, {"arguments": (store, run, config)}))
    process.start()
    return process


def test_a_write_that_fails_keeps_the_last_checkpoint(
    tiny_store: Path, tiny_config: PretrainConfig, tmp_path: Path
) -> None:
    """The operating system refuses to grow a file, as a full disk does."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    longer = replace(tiny_config, steps=8, checkpoint_every=4)
    fresh = tmp_path / "fresh"
    pretrain(tiny_store, fresh, longer)
    size = (latest_checkpoint(fresh) / "student.safetensors").stat().st_size // 2
    shutil.rmtree(fresh / "checkpoints" / "8")
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        with pytest.raises(UserError, match=r"checkpoints/8: checkpoint not written: .*checkpoints/4"):
            pretrain(tiny_store, fresh, longer, resume=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [item.name for item in (fresh / "checkpoints").iterdir()] == ["4"], (
        "a half-written checkpoint stays"
    )
    assert pretrain(tiny_store, fresh, longer, resume=True).finished


@pytest.mark.slow
def test_kill_9_at_random_moments_never_harms_a_checkpoint(
    tiny_store: Path, tiny_config: PretrainConfig, tmp_path: Path
) -> None:
    """Twenty kills: every checkpoint left behind loads, and the losses are those of a run never killed."""
    config = replace(tiny_config, steps=150, checkpoint_every=1)
    run, rng = tmp_path / "run", random.Random(0)
    for _ in range(20):
        before = checkpoint_steps(run / "checkpoints")
        process = start(tiny_store, run, config)
        deadline = time.monotonic() + 60
        while checkpoint_steps(run / "checkpoints") == before and time.monotonic() < deadline:
            time.sleep(0.002)
        time.sleep(rng.random() * 0.1)
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        steps = checkpoint_steps(run / "checkpoints")
        assert steps[-1] > (before or [0])[-1]
        for step in steps:
            for model in ("student", "teacher"):
                MeDUET.from_pretrained(run / "checkpoints" / str(step) / f"{model}.safetensors")
    assert pretrain(tiny_store, run, replace(config, checkpoint_every=1000), resume=True).finished
    unbroken = tmp_path / "unbroken"
    pretrain(tiny_store, unbroken, replace(config, checkpoint_every=1000))
    assert losses(run) == losses(unbroken)
