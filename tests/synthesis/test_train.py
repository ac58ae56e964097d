"""Training a network of synthesis: losses, averages, exact resume, several processes, what is refused."""

from __future__ import annotations

import shutil
from copy import deepcopy
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.utils.flop_counter import FlopCounterMode

from meduet_fast import cli
from meduet_fast.cli import PACKAGED, _parse
from meduet_fast.engine import AdamWConfig
from meduet_fast.engine.checkpoint import checkpoint_steps, latest_checkpoint, read_run
from meduet_fast.engine.metrics import read_metrics
from meduet_fast.engine.parallel import compile_blocks
from meduet_fast.engine.step import batch_generator
from meduet_fast.errors import UserError
from meduet_fast.synthesis.averages import power_exponent, power_momentum
from meduet_fast.synthesis.config import DiffusionConfig, SynthesisConfig, TransformerConfig, UNetConfig
from meduet_fast.synthesis.dry_run import format_plan
from meduet_fast.synthesis.factors import FactorsConfig, FactorTable, write_factors
from meduet_fast.synthesis.networks import load_network, save_network
from meduet_fast.synthesis.train import build_network, build_task, train_synthesis
from tests.engine.team import Team, assert_same_losses, train

from .material import write_run, write_store

pytestmark = pytest.mark.usefixtures("one_thread")
LOSSES = ("denoising", "total", "grad_norm")
VOLUMES = {name: (name[0], (16, 10, 8)) for name in ("a0", "a1", "b0")}
CONFIG = SynthesisConfig(
    steps=6, batch_size=3, workers=0, device="cpu", log_every=1, checkpoint_every=2, keep_checkpoints=3,
    held_out_fraction=0.3, power_averages=(0.1,), constant_average=0.5, content_projection=4,
    optimizer=AdamWConfig(1e-3, warmup_steps=2, weight_decay=0.0),
    transformer=TransformerConfig(patch_size=2, hidden_size=12, depth=3, num_heads=2),
    unet=UNetConfig(
        patch_size=1, num_channels=(8, 12), num_res_blocks=1, attention_levels=(False, True), num_heads=2,
        norm_num_groups=4,
    ),
)  # fmt: skip
KINDS: dict[str, dict[str, Any]] = {
    "transformer": {},
    "unet": {"network": "unet"},
    "tokens": {"content": "tokens"},
    "unet tokens": {"network": "unet", "content": "tokens", "content_pool": 2},
    "tokens of a box, style of a volume": {
        "content": "tokens",
        "factor_source": "volume",
        "exchanged_share": 0.5,
    },
    "volume": {"factor_source": "volume", "standardise": "none"},
    "epsilon": {"diffusion": DiffusionConfig(objective="epsilon")},
    "aligned": {"diffusion": DiffusionConfig(times="logit_normal", align=0.5, align_until=0.5)},
    "unet aligned": {"network": "unet", "diffusion": DiffusionConfig(align=0.5)},
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``store``, ``run`` of an encoder, and ``factors.safetensors``."""
    path = tmp_path_factory.mktemp("synthesis")
    write_store(path / "store", VOLUMES)
    write_run(path / "run", path / "store")
    write_factors(
        path / "run", path / "store", path / "factors.safetensors",
        FactorsConfig(window=(4, 6, 4), stride=2, tokens=True, exchanged=1, device="cpu"),
    )  # fmt: skip
    return path


def fit(place: Path, run: Path, config: SynthesisConfig, **changes: Any) -> Path:
    assert train_synthesis(place / "store", place / "factors.safetensors", run, config, **changes).finished
    return run


def weights(run: Path) -> dict[str, torch.Tensor]:
    """All that the last checkpoint exported."""
    return {
        f"{file.stem}.{name}": value
        for file in latest_checkpoint(run).glob("*.safetensors")
        for name, value in load_file(file).items()
    }


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_trains_and_is_read_again(place: Path, tmp_path: Path, kind: str) -> None:
    config = replace(CONFIG, **KINDS[kind])
    run = fit(place, tmp_path / "run", config)
    records = read_metrics(run)
    assert [record["step"] for record in records] == list(range(6))
    assert all(record["grad_norm"] > 0 for record in records)
    aligned = [step for step, record in enumerate(records) if record.get("alignment")]
    assert aligned == ([0, 1, 2] if config.diffusion.align else [])
    checkpoint = latest_checkpoint(run)
    names = {"network", "power_0.100", "constant"}
    assert {file.stem for file in checkpoint.glob("*.safetensors")} == names
    networks = {name: load_network(checkpoint / f"{name}.safetensors") for name in names}
    assert networks["network"].config.prediction == config.diffusion.objective
    assert tuple(networks["network"].config.sample_size) == (4, 6, 4)
    moved = [name for name, value in networks["network"].state_dict().items()
             if not torch.equal(value, networks["constant"].state_dict()[name])]  # fmt: skip
    assert moved


def test_averages_are_the_sums_they_stand_for(place: Path) -> None:
    """Both, after steps that put known weights into the network."""
    table = FactorTable.open(place / "factors.safetensors")
    task = build_task(CONFIG, table, build_network(CONFIG, table))
    parameter = next(task.network.parameters())
    first = parameter.detach().clone()
    power, constant, gamma = torch.zeros_like(first), first.clone(), power_exponent(0.1)
    for step in range(5):
        with torch.no_grad():
            parameter.fill_(float(step))
        task.after_step(step)
        momentum = power_momentum(step, gamma)
        power, constant = momentum * power + (1 - momentum) * step, 0.5 * constant + 0.5 * step
    averages = [next(average.parameters()) for average in task.averages.values()]
    torch.testing.assert_close(averages[0].data, power)
    torch.testing.assert_close(averages[1].data, constant)


def test_noise_and_times_are_the_batchs_own(place: Path) -> None:
    """Drawn from the generator alone; latents come out normalised by the table's statistics."""
    table = FactorTable.open(place / "factors.safetensors")
    task = build_task(CONFIG, table, build_network(CONFIG, table))
    latents = table.latents_mean.view(-1, 1, 1, 1).expand(2, 4, 4, 6, 4)
    batch = {"latents": latents.bfloat16(), "content": table.content[:2], "style": table.style[:2]}
    one, two, other = (task.prepare(dict(batch), batch_generator(0, number)) for number in (3, 3, 4))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not torch.equal(one["noise"], other["noise"])
    assert one["latents"].abs().max() < 0.1  # bfloat16's rounding of the means
    assert (one["times"] > 0).all()
    assert (one["times"] < 1).all()


def test_noise_covers_content_in_training(place: Path) -> None:
    table = FactorTable.open(place / "factors.safetensors")
    config = replace(CONFIG, diffusion=DiffusionConfig(content_noise=0.5))
    task = build_task(config, table, build_network(config, table))
    content = table.content[:2].repeat(500, 1)
    latents = torch.zeros(1000, 4, 4, 6, 4, dtype=torch.bfloat16)
    batch = {"latents": latents, "content": content, "style": table.style[:1].repeat(1000, 1)}
    noise = (task.prepare(batch, batch_generator(0, 1))["content"] - content) / table.content_deviation
    torch.testing.assert_close(noise.std(0), torch.full((12,), 0.5), rtol=0.1, atol=0)
    torch.testing.assert_close(noise.mean(0), torch.zeros(12), rtol=0, atol=0.06)


@pytest.mark.parametrize("kind", ["tokens", "unet tokens"])
def test_flops_are_counted_of_compiled_blocks_too(place: Path, kind: str) -> None:
    """As on a GPU, where every run counts them; with as many tokens of content as a crop has."""
    config, table = replace(CONFIG, **KINDS[kind]), FactorTable.open(place / "factors.safetensors")
    task = build_task(config, table, build_network(config, table))
    crop = torch.zeros(1, 4, *table.window), torch.ones(1)
    factors = table.content_map(0, table.start[0].tolist(), table.window)[None], table.style[:1]
    network = deepcopy(task.network).to("meta")
    with FlopCounterMode(display=False) as counter:
        network(*(item.to("meta") for item in (*crop, *factors))).sum().backward()
    compile_blocks(task.blocks())
    assert task.flops(0) == counter.get_total_flops()


def test_a_killed_run_goes_on_to_the_bit(place: Path, tmp_path: Path) -> None:
    """SIGKILL in the fourth step: from the checkpoint of step 2."""
    config = replace(CONFIG, **KINDS["aligned"])
    whole = fit(place, tmp_path / "whole", config)
    task = partial(train_synthesis, place / "store", place / "factors.safetensors")
    with Team(task, tmp_path / "run", config, 1, "killed in a step", at=3, rank=0) as team:
        assert team.wait() == [-9], team.said()
    assert checkpoint_steps(tmp_path / "run" / "checkpoints") == [2]
    fit(place, tmp_path / "run", config, resume=True)
    found, wanted = weights(tmp_path / "run"), weights(whole)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], value) for name, value in wanted.items())


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_processes_give_the_losses_of_one(place: Path, tmp_path: Path, parallel: str) -> None:
    kind = "aligned" if parallel == "fsdp" else "unet tokens"
    config = replace(CONFIG, **KINDS[kind], steps=50, accumulate=2, checkpoint_every=50)
    alone = fit(place, tmp_path / "alone", config)
    task = partial(train_synthesis, place / "store", place / "factors.safetensors")
    train(task, tmp_path / "run", replace(config, accumulate=1, parallel=parallel), 2)
    assert_same_losses(tmp_path / "run", alone, losses=LOSSES)


def test_transfer_begins_from_the_encoder_and_is_remembered(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = replace(CONFIG, steps=2, transformer=replace(CONFIG.transformer, depth=1))
    run = fit(place, tmp_path / "run", config, init=place / "run")
    assert "folded" in capsys.readouterr().err
    fit(place, run, replace(config, steps=4), resume=True)
    other = tmp_path / "other.safetensors"
    shutil.copy(latest_checkpoint(place / "run") / "teacher.safetensors", other)
    fit(place, run, replace(config, steps=5), resume=True, init=other)  # the same weights
    fit(place, run, replace(config, steps=6), resume=True, init=place / "run")
    other.write_bytes(other.read_bytes()[:-1] + b"x")
    with pytest.raises(UserError, match="leave --init out"):
        fit(place, run, replace(config, steps=7), resume=True, init=other)
    unet = fit(place, tmp_path / "unet", replace(CONFIG, network="unet", steps=2), init=place / "run")
    assert read_run(unet, of_checkpoint=False)["init"]["blocks"] == 1


def test_a_plan_tells_the_run_and_writes_nothing(place: Path, tmp_path: Path) -> None:
    config = replace(CONFIG, **KINDS["aligned"])
    text = format_plan(place / "store", place / "factors.safetensors", tmp_path / "run", config)
    assert "MeDUETTransformer3D" in text
    assert "aligned until step 3" in text
    assert "4 x 6 x 4 latent voxels" in text
    plain = format_plan(place / "store", place / "factors.safetensors", tmp_path / "run", CONFIG)
    assert "objective   flow, content pooled\n" in plain
    assert "B a GPU: weights" in plain
    assert "\ndisk        3 checkpoints of" in plain
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", sorted(path.stem for path in PACKAGED["synthesize train"].glob("*.yaml")))
def test_packaged_networks_can_be_built(name: str) -> None:
    """For windows of the published size, or the demo's; widths are those of the encoders to transfer from."""
    arguments = _parse("synthesize train", ["--config", name, "--data", "a", "--factors", "b"])
    config = SynthesisConfig(**{item.name: arguments[item.name] for item in fields(SynthesisConfig)})
    demo = name.endswith("demo")
    dim, statistics = (96, torch.ones(96)) if demo else (768, torch.ones(768))
    table: Any = SimpleNamespace(
        window=(12, 12, 12) if demo else (64, 64, 32), patch=2 if demo else 4,
        content=torch.empty(1, dim), style=torch.empty(1, dim), latents_mean=torch.zeros(4),
        latents_deviation=torch.ones(4),
        **{f"{kind}_{what}": statistics for kind in ("content", "style") for what in ("mean", "deviation")},
    )  # fmt: skip
    with torch.device("meta"):
        network = build_network(replace(config, standardise="none"), table)
    widths = {"sit_s": 384, "sit_b": 768, "sit_l": 960, "sit_xl": 1152, "unet_b": 768}
    assert network.feature_width == widths.get(name, 96)


def test_sizes_lists_the_packaged_configurations(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    few = {name: PACKAGED["synthesize train"] / f"{name}.yaml" for name in ("unet_b", "sit_demo")}
    monkeypatch.setattr(cli, "_packaged", lambda command: few)
    assert cli.main(["synthesize", "sizes"]) == 0
    _, _, demo, unet = capsys.readouterr().out.splitlines()
    assert demo.startswith("| `sit_demo` | 3 x 96 (4) | 684.4 k | 12 x 12 x 12 | 599.9 M | 16 | ")
    assert unet.startswith("| `unet_b` | 192, 768 (12) | 267.5 M | 64 x 64 x 32 | 4.227 T | 16 | ")
    assert unet.count(" GB") == 2


def test_other_settings_are_refused(place: Path, tmp_path: Path) -> None:
    run = fit(place, tmp_path / "run", replace(CONFIG, steps=2))
    with pytest.raises(UserError, match="can't resume with other settings: content differ"):
        fit(place, run, replace(CONFIG, content="tokens"), resume=True)


def test_what_is_no_network_is_refused(place: Path, tmp_path: Path) -> None:
    teacher = latest_checkpoint(place / "run") / "teacher.safetensors"
    with pytest.raises(UserError, match="not a network of synthesis"):
        load_network(teacher)
    table = FactorTable.open(place / "factors.safetensors")
    network = build_network(CONFIG, table)
    state = dict(network.state_dict())
    state.popitem()
    save_network(network, tmp_path / "less.safetensors", state)
    with pytest.raises(UserError, match=r"less.safetensors: not a readable MeDUETTransformer3D"):
        load_network(tmp_path / "less.safetensors")


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("diffusion", {"objective": "epsilon", "times": "logit_normal"}, "times: found logit_normal"),
        ("diffusion", {"drop_style": 1.0}, "drop_style: found 1"),
        ("diffusion", {"min_snr": 0.0}, "min_snr: found 0, expected more than 0, or null"),
        ("run", {"power_averages": (0.1, 0.5)}, "power_averages: found .0.1, 0.5., expected 0 < value"),
    ],
)
def test_settings_are_checked(kind: str, changes: dict[str, Any], message: str) -> None:
    own = CONFIG.diffusion if kind == "diffusion" else CONFIG
    with pytest.raises(UserError, match=message):
        replace(own, **changes)
