"""The program: help, one-line errors with exit code 2, and what each command passes on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import AbstractContextManager
from dataclasses import fields, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import yaml

from meduet_fast import cli
from meduet_fast.cli import COMMANDS, CONFIGS, _parse, main
from meduet_fast.pretraining import PretrainConfig

PRETRAIN = ["pretrain", "--config", "demo", "--data", "nowhere", "--output", "run"]


def test_help_lists_every_command_and_its_options(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in COMMANDS)
    for name in COMMANDS:
        with pytest.raises(SystemExit) as stop:
            main([*name.split(), "--help"])
        assert stop.value.code == 0
        assert f"meduet-fast {name}" in capsys.readouterr().out


def test_units_are_in_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    for command, words in (("prepare", "mm"), ("pretrain", "in latent voxels")):
        with pytest.raises(SystemExit):
            main([command, "--help"])
        assert words in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], ""),
        (["nonsense"], "no command 'nonsense', expected one of: sample-data"),
        ([*PRETRAIN, "--stepz", "3"], "--stepz"),
        ([*PRETRAIN, "--steps", "many"], "steps"),
        ([*PRETRAIN, "--model.depth", "2.5"], "depth"),
        ([*PRETRAIN, "--batch_size", "3"], "batch_size is 3, expected an even number"),
        ([*PRETRAIN, "--model.patch_size", "5"], "latent_size 8 is not a multiple of patch_size 5"),
        ([*PRETRAIN, "--objective.pairing", "both"], "pairing"),
        (PRETRAIN, "nowhere: not a latent store"),
        (["pretrain", "--config", "demo"], "--data, --output: required, unless with --dry-run"),
        ([*PRETRAIN, "--attention", "flash3"], "attention"),
        ([*PRETRAIN, "--device", "cpu", "--attention", "xformers"], "attention 'xformers'"),
        (["pretrain", "--dry-run", "--config", "demo", "--data", "nowhere"], "nowhere: not a latent store"),
        (["export", "nowhere", "--output", "x"], "nowhere"),
        (["export", "nowhere", "--output", "x", "--format", "onnx"], "format"),
        (["pretrain", "--config", "absent", "--data", "x", "--output", "y"], "of the packaged ones (demo"),
        (["prepare", "--input", "nowhere", "--output", "store"], "nowhere"),
        (["report", "nowhere"], "nowhere"),
        (["encode", "nowhere", "--input", "x", "--output", "y"], "x: no such file or folder"),
        (["train-tokenizer", "--input", "nowhere", "--output", "x.safetensors"], "nowhere"),
        (["import-cache", "nowhere", "--output", "x"], "nowhere"),
    ],
)  # fmt: skip
def test_bad_usage_is_one_line_and_exit_code_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    output = capsys.readouterr()
    if arguments:
        assert output.out == ""
        assert len(output.err.strip().splitlines()) == 1
        assert message in output.err
    assert list(tmp_path.iterdir()) == []


PATHS = [
    ["pretrain", "--config", "demo", "--data", "PATH", "--output", "run"],
    ["pretrain", "--config", "demo", "--dry-run", "--output", "PATH"],
    ["pretrain", "--config", "PATH"],
    ["prepare", "--input", "PATH", "--output", "store"],
    ["prepare", "--tokenizer", "PATH", "--input", "file.nii", "--output", "store", "--device", "cpu"],
    ["import-cache", "PATH", "--output", "store"],
    ["export", "PATH", "--output", "x"],
    ["report", "PATH"],
    ["encode", "PATH", "--input", "file.nii", "--output", "x.safetensors"],
    ["encode", "x", "--input", "PATH", "--output", "x.safetensors"],
    ["encode", "x", "--input", "file.nii", "--output", "PATH/x.safetensors"],
    ["train-tokenizer", "--input", "PATH", "--output", "x.safetensors"],
    ["train-tokenizer", "--input", "file.nii", "--output", "PATH/x.safetensors"],
    ["sample-data", "PATH"],
]


@pytest.mark.parametrize("arguments", PATHS, ids=" ".join)
def test_what_the_system_refuses_is_one_line(
    arguments: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    as_nobody: AbstractContextManager[None],
) -> None:
    """A folder that may not be searched, and a name too long."""
    import meduet_fast.data.samples
    import meduet_fast.encoding
    import meduet_fast.prepare.import_cache
    import meduet_fast.pretraining.dry_run
    import meduet_fast.pretraining.export
    import meduet_fast.report  # noqa: F401

    with TemporaryDirectory() as folder:
        monkeypatch.chdir(folder)
        Path(folder).chmod(0o777)
        Path("closed").mkdir(mode=0)
        Path("file.nii").touch()
        with as_nobody:
            for path, why in (("closed/x", "Permission denied"), ("n" * 300, "File name too long")):
                assert main([argument.replace("PATH", path) for argument in arguments]) == 2
                error = capsys.readouterr().err
                assert error.startswith(f"meduet-fast {arguments[0]}: ")
                assert path in error
                assert why in error
                assert error.count("\n") == 1
        monkeypatch.undo()


def test_a_wrong_key_in_a_file_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "mine.yaml"
    for text, word in (("stepz: 3\n", "stepz"), ("model: {dept: 3}\n", "dept"), ("steps: [", "mine.yaml")):
        config.write_text(text)
        assert main(["pretrain", "--config", str(config), "--data", "x", "--output", "y"]) == 2
        error = capsys.readouterr().err
        assert word in error
        assert len(error.strip().splitlines()) == 1


def test_options_change_single_values_of_a_file() -> None:
    parsed = _parse("pretrain", [*PRETRAIN[1:], "--steps", "7", "--model.depth", "1"])
    demo = yaml.safe_load((CONFIGS / "demo.yaml").read_text())
    assert (parsed.steps, parsed.model.depth) == (7, 1)
    assert parsed.model.embed_dim == demo["model"]["embed_dim"]
    assert parsed.batch_size == demo["batch_size"]


def _config(name: str) -> PretrainConfig:
    parsed = _parse("pretrain", [f"--config={name}"])
    return PretrainConfig(**{item.name: parsed[item.name] for item in fields(PretrainConfig)})


def test_vit_base_is_the_published_setting() -> None:
    assert _config("vit_base") == PretrainConfig()


@pytest.mark.parametrize("name", sorted(path.stem for path in CONFIGS.glob("vit_*.yaml")))
def test_sizes_are_the_published_setting_and_fit_80_gb(name: str) -> None:
    from meduet_fast.pretraining.cost import memory_estimate

    config = _config(name)
    assert config.batch_size * config.accumulate == 64
    assert config.model.embed_dim % 64 == 0
    assert config.model.embed_dim == 64 * config.model.num_heads
    assert config.model.patch_size == (2 if name.endswith("_p2") else 4)
    assert memory_estimate(config).total < 70e9  # an estimate, and CUDA takes some
    row = f"| `{name}` | {config.model.depth} x {config.model.embed_dim} ({config.model.num_heads}) | "
    crops = f" | {config.batch_size}{', recomputed' * config.recompute} | "
    readme = Path(__file__).parents[1] / "README.md"
    assert any(line.startswith(row) and crops in line for line in readme.read_text().splitlines())
    published = PretrainConfig()
    size = {"embed_dim": 768, "depth": 12, "num_heads": 12, "patch_size": 4}
    assert (
        replace(config, model=replace(config.model, **size), batch_size=64, accumulate=1, recompute=False)
        == published
    )


def test_a_dry_run_needs_no_folders_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["pretrain", "--config", "demo", "--dry-run", "--output", "run", "--steps", "10"]) == 0
    output = capsys.readouterr()
    assert "10, 180 crops" in output.out
    assert output.err == ""
    assert list(tmp_path.iterdir()) == []


def test_sizes_lists_the_packaged_configurations(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli, "_packaged", lambda command: {"demo": CONFIGS / "demo.yaml"})
    assert main(["sizes"]) == 0
    assert "| `demo` | 3 x 96 (4) |" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_writes_a_checkpoint_and_ends_cleanly(tmp_path: Path, stop: signal.Signals) -> None:
    """The program as a process, stopped like a user does it, or a scheduler."""
    import numpy as np
    import torch

    from meduet_fast.data.store_writer import StoreWriter, VolumeRecord

    store = tmp_path / "store"
    with StoreWriter(store, tokenizer="test", tokenizer_spec="test", channels=4, compression=4) as writer:
        for domain in "ab":
            record = VolumeRecord(
                name=domain, domain=domain, body_part="none", content_key=domain, source=domain,
                latent=torch.randn(4, 12, 12, 12), affine=np.eye(4), spacing=(1.5, 1.5, 1.5), intensity={},
            )  # fmt: skip
            writer.add(record)
    size = {"latent_size": 8, "patch_size": 2, "embed_dim": 24, "depth": 1, "num_heads": 2, "num_domains": 2}
    decoder = {"decoder_embed_dim": 12, "decoder_depth": 1, "decoder_num_heads": 2}
    config = {
        "model": size | decoder,
        "steps": 100_000,
        "batch_size": 2,
        "workers": 1,
        "checkpoint_every": 100_000,
    }
    (tmp_path / "config.yaml").write_text(json.dumps(config))
    command = [sys.executable, "-m", "meduet_fast", "pretrain", "--config", str(tmp_path / "config.yaml")]
    command += ["--data", str(store), "--output", str(tmp_path / "run"), "--resume"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env=environment,
    )
    metrics = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 90
    while not (metrics.exists() and metrics.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.05)
    os.killpg(process.pid, stop)  # as a terminal or torchrun does: to the readers too
    out, err = process.communicate(timeout=60)
    assert process.returncode == 128 + stop, err
    assert f"stopped by {stop.name} after step" in err
    assert "Traceback" not in err + out
    assert next((tmp_path / "run" / "checkpoints").iterdir()).name.isdigit()
