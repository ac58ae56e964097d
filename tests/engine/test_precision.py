"""Float8 and bfloat16: what is computed in them, what stays as it is, and what is refused."""

from __future__ import annotations

import json
import shutil
import socket
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch._dynamo.utils import counters

from meduet_fast.engine import parallel
from meduet_fast.engine.checkpoint import latest_checkpoint
from meduet_fast.engine.distributed import VARIABLES, World
from meduet_fast.engine.metrics import read_metrics
from meduet_fast.engine.optimizer import build_optimizer
from meduet_fast.engine.parallel import parallelize
from meduet_fast.engine.precision import Precision, low_precision, use_float8
from meduet_fast.engine.step import add_gradients
from meduet_fast.errors import UserError
from meduet_fast.models import MeDUET, MeDUETConfig
from meduet_fast.pretraining import MeDUETPretraining, PretrainConfig, pretrain, random_mix_mask
from meduet_fast.pretraining.losses import LOSSES

from .team import train, train_alone

CPU = torch.device("cpu")
# Sizes that are multiples of 16, and of 6 for the positions.
MODEL = MeDUETConfig(
    latent_size=8, patch_size=2, embed_dim=48, depth=1, num_heads=2, decoder_embed_dim=48, decoder_depth=1,
    decoder_num_heads=2, num_domains=3,
)  # fmt: skip
LINEAR_LAYERS = 4  # of a block


@pytest.fixture(scope="module")
def config(tiny_settings: PretrainConfig) -> PretrainConfig:
    """Four steps of two batches: SiQC from the second on, MFTD from the third."""
    return replace(
        tiny_settings, model=MODEL, steps=4, accumulate=2, siqc_start_step=1, mftd_start_step=2,
        precision="float8",
    )  # fmt: skip


@pytest.fixture(scope="module")
def alone(tiny_store: Path, config: PretrainConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of one process."""
    return train_alone(tiny_store, tmp_path_factory.mktemp("alone") / "run", config)


def blocks_of(model: MeDUET) -> list[nn.Module]:
    return [*model.blocks, *model.decoder_blocks]


def linear_layers(module: nn.Module) -> list[nn.Linear]:
    return [layer for layer in module.modules() if isinstance(layer, nn.Linear)]


def gradients(precision: Precision, settings: PretrainConfig) -> tuple[dict[str, float], torch.Tensor]:
    """All losses of a batch, and the student's gradient in one row."""
    torch.manual_seed(0)
    config = replace(settings, precision=precision)
    task = MeDUETPretraining(config)
    step = parallelize(task, config, World(CPU))
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(4, 4, 8, 8, 8, generator=generator)
    mask = random_mix_mask(4, MODEL.num_tokens, generator, CPU)
    domain = torch.tensor([0, 1, 2, 0])
    batch = {"latents": latents, "domain": domain, "mask": mask}
    losses = add_gradients(step, batch, settings.steps - 1, low=low_precision(precision, CPU))
    found = [parameter.grad for parameter in task.student.parameters() if parameter.grad is not None]
    assert {item.dtype for item in found} == {torch.float32}
    return {name: loss.item() for name, loss in losses.items()}, torch.cat([item.flatten() for item in found])


def test_rounding_grows_from_float32_to_float8_and_stays_small(config: PretrainConfig) -> None:
    exact, wanted = gradients("float32", config)
    assert gradients("auto", config)[0] == exact  # the CPU's default
    errors = []
    for precision, most in (("bfloat16", 0.003), ("float8", 0.02)):
        losses, gradient = gradients(precision, config)
        assert losses == pytest.approx(exact, rel=most)
        errors.append(((gradient - wanted).norm() / wanted.norm()).item())
    bfloat16, float8 = errors
    assert 0.001 < bfloat16 < 0.02  # the autocast is on
    assert 2 * bfloat16 < float8 < 0.1


def test_all_layers_of_blocks_are_swapped_and_nothing_else_changes() -> None:
    model = MeDUET(MODEL)
    before, groups = dict(model.named_parameters()), build_optimizer(model, PretrainConfig().optimizer)
    assert use_float8(blocks_of(model), CPU) == 2 * LINEAR_LAYERS
    after = dict(model.named_parameters())
    assert list(after) == list(before)
    assert all(after[name] is before[name] for name in before)
    swapped = [name for name, layer in model.named_modules() if type(layer).__name__ == "Float8Linear"]
    assert len(swapped) == 2 * LINEAR_LAYERS
    assert all("blocks.0." in name for name in swapped)
    again = build_optimizer(model, PretrainConfig().optimizer)
    for old, new in zip(groups.param_groups, again.param_groups, strict=True):
        assert [id(item) for item in old["params"]] == [id(item) for item in new["params"]]


def test_layers_of_other_sizes_stay() -> None:
    model = MeDUET(replace(MODEL, decoder_embed_dim=24))
    assert use_float8(blocks_of(model), CPU) == LINEAR_LAYERS
    assert all(type(layer) is nn.Linear for block in model.decoder_blocks for layer in linear_layers(block))


def test_a_network_without_any_such_layer_is_refused() -> None:
    model = MeDUET(replace(MODEL, embed_dim=24, decoder_embed_dim=24))
    with pytest.raises(UserError, match=r"sizes that are multiples of 16.*model\.embed_dim"):
        use_float8(blocks_of(model), CPU)


def test_without_torchao_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchao.float8", None)
    with pytest.raises(UserError, match=r"pip install '\.\[float8\]' in a clone"):
        use_float8(blocks_of(MeDUET(MODEL)), CPU)


def test_older_gpus_are_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100")
    with pytest.raises(UserError, match=r"8\.9 or more, NVIDIA A100 has 8\.0"):
        use_float8([], torch.device("cuda"))


def losses_of(run: Path) -> list[dict[str, float]]:
    return [{name: record[name] for name in (*LOSSES, "grad_norm")} for record in read_metrics(run)]


def assert_close(run: Path, expected: Path, first: float) -> None:
    """In the first step, whose weights are equal; later, rounding to other numbers has added up."""
    found, wanted = losses_of(run), losses_of(expected)
    assert len(found) == len(wanted) == 4
    assert found[0] == pytest.approx(wanted[0], rel=first)
    for values, others in zip(found[1:], wanted[1:], strict=True):
        assert values == pytest.approx(others, rel=0.05)


def test_checkpoints_look_as_always_and_resuming_is_exact(
    alone: Path, tiny_store: Path, config: PretrainConfig, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(alone, run)
    shutil.rmtree(run / "checkpoints" / "4")
    assert pretrain(tiny_store, run, config, resume=True).finished
    assert losses_of(run) == losses_of(alone)
    for name in ("student", "teacher"):
        found, wanted = (load_file(latest_checkpoint(at) / f"{name}.safetensors") for at in (run, alone))
        assert {key: (value.shape, value.dtype) for key, value in found.items()} == {
            key: (value.shape, value.dtype) for key, value in MeDUET(MODEL).state_dict().items()
        }
        assert all(torch.equal(found[key], value) for key, value in wanted.items())


def test_another_precision_cant_go_on_but_an_older_run_can(
    alone: Path, tiny_store: Path, config: PretrainConfig, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="precision was float8, now bfloat16"):
        pretrain(tiny_store, alone, replace(config, precision="bfloat16"), resume=True)
    run = tmp_path / "run"
    shutil.copytree(alone, run)
    path = latest_checkpoint(run) / "run.json"
    saved = json.loads(path.read_text())
    del saved["config"]["precision"]  # as before there was this setting
    path.write_text(json.dumps(saved))
    with pytest.raises(UserError, match="precision was auto, now float8"):
        pretrain(tiny_store, run, config, resume=True)
    assert pretrain(tiny_store, run, replace(config, precision="auto"), resume=True).finished


@pytest.mark.parametrize("parallel", [pytest.param("ddp", marks=pytest.mark.slow), "fsdp"])
def test_two_processes_give_the_losses_of_one(
    alone: Path, tiny_store: Path, config: PretrainConfig, tmp_path: Path, parallel: str
) -> None:
    run = tmp_path / "run"
    said = train(tiny_store, run, replace(config, accumulate=1, parallel=parallel, recompute=True), 2)
    assert "arning" not in said.replace("warning: the teacher keeps", "")
    assert "Failed" not in said
    assert_close(run, alone, 1e-5)


@pytest.mark.slow
def test_shards_recomputed_and_compiled_are_one_graph(
    alone: Path, tiny_store: Path, config: PretrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a group of one process, since Inductor would take minutes."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    for name, value in zip(VARIABLES, ("0", "1", "0", "127.0.0.1", str(port)), strict=True):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(parallel.torch, "compile", partial(torch.compile, backend="aot_eager"))
    torch._dynamo.reset()
    counters.clear()
    together = replace(config, parallel="fsdp", recompute=True, compile=True)
    assert pretrain(tiny_store, tmp_path / "run", together).finished
    # Blocks of the encoder and of the decoder are of one size: of the student's with gradients, of the
    # teacher's without.
    assert counters["stats"]["unique_graphs"] == 2
    assert not counters["graph_break"]
    torch._dynamo.reset()
    assert_close(tmp_path / "run", alone, 0.01)
