"""Numbers that make no sense are refused, and so is what a file would be read as, but nobody means."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import torch

from meduet_fast.autoencoder.train import TokenizerTrainingConfig
from meduet_fast.cli import main
from meduet_fast.data.crops import random_stream
from meduet_fast.encoding import EncodeConfig
from meduet_fast.engine.config import AdamWConfig, EngineConfig
from meduet_fast.engine.step import batch_generator
from meduet_fast.errors import UserError
from meduet_fast.models import MeDUETConfig
from meduet_fast.prepare.prepare import PrepareConfig
from meduet_fast.pretraining import ObjectiveConfig, OptimizerConfig, PretrainConfig
from meduet_fast.settings import check_yaml
from meduet_fast.synthesis.config import DiffusionConfig, SynthesisConfig, TransformerConfig, UNetConfig
from meduet_fast.synthesis.factors import FactorsConfig
from meduet_fast.synthesis.judge import EvaluateConfig
from meduet_fast.synthesis.sample import SampleConfig

SETTINGS = [
    AdamWConfig, EncodeConfig, EngineConfig, MeDUETConfig, ObjectiveConfig, OptimizerConfig, PrepareConfig,
    PretrainConfig, TokenizerTrainingConfig, FactorsConfig, SynthesisConfig, TransformerConfig, UNetConfig,
    DiffusionConfig, SampleConfig, EvaluateConfig,
]  # fmt: skip
NUMBERS = [
    (settings, name, kind)
    for settings in SETTINGS
    for name, hint in get_type_hints(settings).items()
    for kind in (int, float)
    if kind in (get_args(hint) or (hint,))
]


def test_every_number_is_found() -> None:
    assert len(NUMBERS) > 70
    assert (AdamWConfig, "clip_norm", float) in NUMBERS
    assert (TokenizerTrainingConfig, "num_channels", int) in NUMBERS


@pytest.mark.parametrize(
    ("settings", "name", "kind"), NUMBERS, ids=[f"{item.__name__}.{name}" for item, name, _ in NUMBERS]
)
def test_numbers_that_are_none(settings: Any, name: str, kind: type) -> None:
    several = isinstance(getattr(settings(), name), tuple)
    for value in (-1, float("nan"), float("inf"), "3", True, *([1.5] if kind is int else [])):
        with pytest.raises(UserError, match=rf"^{name}: found .*, expected "):
            settings(**{name: (value,) if several else value})


@pytest.mark.parametrize(
    ("settings", "name", "value", "expected"),
    [
        (AdamWConfig, "clip_norm", 0, "found 0, expected more than 0, or null for none"),
        (AdamWConfig, "learning_rate", 0.0, "found 0, expected more than 0"),
        (AdamWConfig, "beta1", 1.0, "found 1, expected 0 <= value < 1"),
        (AdamWConfig, "beta2", None, "found nothing, expected 0 <= value < 1"),
        (OptimizerConfig, "teacher_momentum", 1, "found 1, expected 0 <= value < 1"),
        (OptimizerConfig, "final_teacher_momentum", 1.01, "found 1.01, expected 0 <= value <= 1"),
        (EngineConfig, "seed", 2**64, f"found {2**64}, expected 0 <= value <= {2**64 - 1}"),
        (PrepareConfig, "seed", 2**64, f"found {2**64}, expected 0 <= value <= {2**64 - 1}"),
        (EngineConfig, "steps", 2**41, f"found {2**41} of 1 batches, expected {2**40} in all"),
        (EngineConfig, "timeout_s", 10**12, f"found {10**12}, expected 1 <= value <= 10000000"),
        (EngineConfig, "log_every", 0, "found 0, expected 1 or more"),
        (MeDUETConfig, "depth", 2.5, "found 2.5, expected a whole number, more than 0"),
        (MeDUETConfig, "mlp_ratio", 10**400, f"found {10**400}, expected more than 0"),
        (EngineConfig, "seed", 10**400, f"found {10**400}, expected 0 <= value <= {2**64 - 1}"),
        (PretrainConfig, "held_out_fraction", 1, "found 1, expected 0 <= value < 1"),
        (TokenizerTrainingConfig, "held_out_fraction", 0, "found 0, expected 0 < value < 1"),
    ],
)  # fmt: skip
def test_limits(settings: Any, name: str, value: object, expected: str) -> None:
    with pytest.raises(UserError) as raised:
        settings(**{name: value})
    assert str(raised.value) == f"{name}: {expected}"


def test_volumes_to_hold_out_need_a_part() -> None:
    with pytest.raises(
        ValueError, match="held_out is 'volumes', expected held_out_fraction above 0, found 0"
    ):
        PretrainConfig(held_out="volumes")


def test_limits_that_are_allowed() -> None:
    AdamWConfig(clip_norm=None, weight_decay=0, warmup_steps=0, beta1=0, final_learning_rate=0)
    OptimizerConfig(teacher_momentum=0, final_teacher_momentum=1)
    PretrainConfig(seed=2**64 - 1)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("steps: 3\nsteps: 4\n", "line 2: steps is given twice"),
        ("model:\n  depth: 1\nsteps: 2\nmodel: {num_heads: 2}\n", "line 4: model is given twice"),
        ("model:\n  depth: 1\n  depth: 2\n", "line 3: depth is given twice"),
        ("steps: 010\n", "line 1: found 010, expected a number without leading 0 or colon"),
        ("steps: 1:30\n", "line 1: found 1:30, expected a number without leading 0 or colon"),
        ("other: {}\n", "line 1: other is empty"),
        ("", "expected settings, one to a line"),
        ("- steps: 3\n", "expected settings, one to a line"),
        ("steps: [", "not readable as YAML"),
        ("steps: 3\n{a: b}: 1\n", "line 2: expected a name before the colon"),
        ("model: &m {a: *m}\n", "settings that are nested too deeply, or contain themselves"),
        ("model: " + 2000 * "[", "settings that are nested too deeply"),
    ],
)
def test_what_a_file_must_not_say(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=f"mine.yaml: {message}".replace("[", r"\[")):
        check_yaml(path)


PRETRAIN = ["pretrain", "--dry-run", "--config"]


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("", ["--optimizer.clip_norm=-1"], "optimizer.clip_norm: found -1, expected more than 0"),
        ("", ["--objective.lambda_domain=-1"], "objective.lambda_domain: found -1, expected 0 or more"),
        ("optimizer: {beta1: .nan}", [], "optimizer.beta1: found nan, expected 0 <= value < 1"),
        ("model: {mlp_ratio: .inf}", [], "model.mlp_ratio: found inf, expected more than 0"),
        ("", ["--seed", str(2**64)], "seed: found 18446744073709551616, expected"),
        ("", ["--step", "3"], "unrecognized arguments: --step 3"),
        ("", ["--optimizer.clip", "3"], "unrecognized arguments: --optimizer.clip 3"),
        ("", ["--steps", "1e3"], "steps: found 1000.0, expected a whole number"),
        ("", ["--optimizer.clip_norm", "off"], "optimizer.clip_norm: found off, expected a number or null"),
        ("", ["--recompute", "1"], "recompute: found 1, expected true or false"),
        ("", ["--objective.pairing", "both"], "found both, expected 'source' or 'reference'"),
        ("steps: null", [], "steps: found nothing, expected a whole number"),
        ("objective: {mftd: null}", [], "objective.mftd: found nothing, expected a value"),
        ("precision: null", [], "precision: found nothing, expected a value"),
        ("model: null", [], "model: found nothing, expected settings"),
        ("model: 3", [], "model: found 3, expected settings"),
    ],
)  # fmt: skip
def test_an_option_is_named_as_it_was_typed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, options: list[str], message: str
) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text or "steps: 3")
    assert main([*PRETRAIN, str(path), *options]) == 2
    output = capsys.readouterr()
    assert output.err.startswith("meduet-fast pretrain: ")
    assert message in output.err
    assert output.err.count("\n") == 1
    assert output.out == ""


def test_what_yaml_reads_as_meant(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "mine.yaml"
    text = "optimizer: {learning_rate: 1e-4, clip_norm: null}\nsteps: 5\nrecompute: yes\n"
    path.write_text(text, encoding="utf-8-sig")  # with a byte-order mark, as some editors do
    assert main([*PRETRAIN, str(path), "--config", "demo", "--config", str(path)]) == 0
    assert "5, 90 crops" in capsys.readouterr().out


@pytest.mark.parametrize("seed", [0, 1, 2**24 - 1])
def test_small_seeds_draw_what_they_always_did(seed: int) -> None:
    for number in (0, 7, 2**40 - 1):
        expected = torch.Generator().manual_seed((seed << 40) + number)
        assert batch_generator(seed, number).initial_seed() == expected.initial_seed()


def test_large_seeds_draw_numbers_of_their_own() -> None:
    seeds = [2**24, 20251126, 2**32 + 1, 2**63, 2**64 - 2, 2**64 - 1]
    drawn = {batch_generator(seed, number).initial_seed() for seed in seeds for number in (0, 1, 2**40 - 1)}
    assert len(drawn) == 3 * len(seeds)
    for seed in seeds:
        torch.manual_seed(seed)
        random_stream(seed, 1, 2**40 - 1).random()
