"""Runs that begin from weights: what is taken over, what is refused, and what a resume makes of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from meduet_fast.engine.distributed import World
from meduet_fast.errors import UserError
from meduet_fast.files import file_sha256
from meduet_fast.models import MeDUET, MeDUETConfig
from meduet_fast.models.export import export_model
from meduet_fast.pretraining import PretrainConfig, pretrain
from meduet_fast.pretraining import train as train_module
from meduet_fast.pretraining.dry_run import format_plan
from meduet_fast.pretraining.init_weights import read_initial
from meduet_fast.pretraining.task import MeDUETPretraining

ENCODER = ("embed_layer.", "cls_token", "blocks.", "norm.")


@pytest.fixture
def source(tiny_config: PretrainConfig) -> MeDUET:
    torch.manual_seed(99)
    return MeDUET(tiny_config.model).requires_grad_(False)


def _meduet(model: MeDUET, folder: Path) -> Path:
    return export_model(model, folder / "meduet")[0].parent


def _reference(model: MeDUET, folder: Path) -> Path:
    return export_model(model, folder / "reference.safetensors", "reference")[0]


def _published(model: MeDUET, folder: Path) -> Path:
    """As the published code saves it, from a compiled network under DDP."""
    state = {f"module._orig_mod.{key}": value for key, value in model.to_reference().items()}
    state["module._orig_mod.patch_embed.proj.weight"] = torch.zeros(8, 3, 16, 16)
    moments = {"state": {0: {"exp_avg": torch.zeros(5)}}, "param_groups": []}
    torch.save({"model": state, "optimizer": moments, "epoch": 7}, folder / "checkpoint_7.pth")
    return folder / "checkpoint_7.pth"


@pytest.mark.parametrize(("write", "fresh", "left_out"), [
    (_meduet, set(), set()),
    (_reference, {"siqc_log_scale"}, set()),
    (_published, {"siqc_log_scale"}, {"patch_embed.proj.weight", "optimizer.state.0.exp_avg"}),
])  # fmt: skip
def test_student_and_teacher_begin_from_a_file(
    write: Callable[[MeDUET, Path], Path], fresh: set[str], left_out: set[str], source: MeDUET,
    tiny_store: Path, tiny_config: PretrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    path = write(source, tmp_path)
    found = read_initial(path, MeDUET(tiny_config.model))
    assert (set(found.fresh), set(found.left_out)) == (fresh, left_out)

    monkeypatch.setattr(train_module, "fit", lambda make, *_: make())
    task: MeDUETPretraining
    task, _ = pretrain(tiny_store, tmp_path / "run", tiny_config, init=path)  # type: ignore[misc]
    assert task.init == {"path": str(found.file), "sha256": file_sha256(found.file), "part": found.part}
    for model in (task.student, task.teacher):
        assert all(torch.equal(model.state_dict()[name], source.state_dict()[name]) for name in found.loaded)
    told = capsys.readouterr().err
    assert f"{found.file}" in told
    assert f"loaded      {len(found.loaded)} tensors" in told
    assert f"left out    {len(left_out)} tensor" in told


def test_an_encoder_alone_leaves_the_rest_fresh(
    source: MeDUET, tiny_config: PretrainConfig, tmp_path: Path
) -> None:
    encoder = {key: value for key, value in source.state_dict().items() if key.startswith(ENCODER)}
    torch.save({"state_dict": encoder}, tmp_path / "a.pt")
    found = read_initial(tmp_path / "a.pt", source)
    assert found.loaded.keys() == encoder.keys()
    assert {key.split(".")[0] for key in found.fresh} == {
        "pos_embed", "disentangled_factorizer", "latent_entanglement", "domain_classifier", "decoder_embed",
        "mask_token", "decoder_pos_embed", "decoder_blocks", "decoder_norm", "decoder_pred", "siqc_log_scale",
    }  # fmt: skip
    texts = [text for _, text in found.rows()]
    assert texts[1].startswith(f"loaded      {len(encoder)} tensors, ")
    assert texts[1].endswith(" parameters: cls_token, embed_layer, blocks, norm")
    assert texts[3] == "left out    0 tensors, 0 parameters"
    del encoder["norm.bias"]
    torch.save(encoder, tmp_path / "a.pt")
    with pytest.raises(UserError, match=r"a\.pt: less than the whole encoder, 1 missing: norm\.bias"):
        read_initial(tmp_path / "a.pt", source)


def test_other_crops_and_other_data_sets_are_no_other_network(
    source: MeDUET, tiny_config: PretrainConfig, tmp_path: Path
) -> None:
    path = _meduet(source, tmp_path)
    config = tiny_config.model
    larger = replace(config, latent_size=2 * config.latent_size, num_domains=config.num_domains + 1)
    found = read_initial(path, MeDUET(larger))
    assert set(found.fresh) == set(found.left_out) == {
        "pos_embed", "decoder_pos_embed",
        *(f"domain_classifier.domain_classifier_{f}.4.{n}" for f in "cs" for n in ("weight", "bias")),
    }  # fmt: skip
    MeDUET(larger).load_state_dict(found.loaded, strict=False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"embed_dim": 48}, r"embed_dim 24 \(model\.embed_dim is 48\)"),
        ({"depth": 5}, r"depth \d \(model\.depth is 5\)"),
        ({"patch_size": 1}, r"patch_size \d \(model\.patch_size is 1\)"),
        ({"in_channels": 3}, r"in_channels 4 \(model\.in_channels is 3\)"),
        ({"decoder_depth": 5}, r"decoder_depth \d \(model\.decoder_depth is 5\)"),
        ({"num_heads": 6}, r"num_heads is 6, the weights were made with \d"),
        ({"mlp_ratio": 2.0}, r"of another shape: blocks\.0\.mlp\.fc1\.weight has shape .*, expected"),
    ],
)
@pytest.mark.parametrize("write", [_meduet, _reference])
def test_another_network_is_refused(
    write: Callable[[MeDUET, Path], Path], change: dict[str, Any], message: str, source: MeDUET,
    tiny_config: PretrainConfig, tmp_path: Path,
) -> None:  # fmt: skip
    with torch.device("meta"):
        other = MeDUET(replace(tiny_config.model, **change))
    with pytest.raises(UserError, match=message):
        read_initial(write(source, tmp_path), other)


def test_published_widths_have_published_heads(tmp_path: Path) -> None:
    config = MeDUETConfig(latent_size=8, depth=1, decoder_depth=1)
    with torch.device("meta"):
        own = MeDUET(config).to_reference()
    state = {key: torch.zeros(1).expand(value.shape) for key, value in own.items()}
    torch.save(state, tmp_path / "a.pt")
    with torch.device("meta"):
        assert set(read_initial(tmp_path / "a.pt", MeDUET(config)).fresh) == {"siqc_log_scale"}
        with pytest.raises(UserError, match="num_heads is 16, the weights were made with 12"):
            read_initial(tmp_path / "a.pt", MeDUET(replace(config, num_heads=16)))
    state["norm.bias"] = torch.full((768,), float("inf"))
    torch.save(state, tmp_path / "a.pt")
    with pytest.raises(UserError, match=r"1 with NaN or infinite values: norm\.bias"):
        read_initial(tmp_path / "a.pt", MeDUET(config))


def test_heads_that_no_file_states_are_told(
    source: MeDUET, tiny_config: PretrainConfig, tmp_path: Path
) -> None:
    bare = dict(source.to_reference().items())
    torch.save(bare, tmp_path / "a.pt")
    rows = read_initial(tmp_path / "a.pt", source).rows()
    assert [text for _, text in rows[4:]] == [
        f"{name} not stated in the file; taken from model.{name}"
        for name in ("num_heads", "decoder_num_heads")
    ]
    torch.save({"model": bare, "num_heads": str(tiny_config.model.num_heads)}, tmp_path / "b.pt")
    assert read_initial(tmp_path / "b.pt", source).assumed == ("decoder_num_heads",)
    assert read_initial(_reference(source, tmp_path), source).assumed == ()


def test_the_dry_run_checks_it_too(tiny_store: Path, tiny_config: PretrainConfig, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"absent\.pt: no such file"):
        format_plan(tiny_config, tiny_store, init=tmp_path / "absent.pt")


def test_a_resume_goes_on_from_its_checkpoint(
    source: MeDUET, tiny_store: Path, tiny_config: PretrainConfig, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    path, run = _reference(source, tmp_path), tmp_path / "run"
    config = replace(tiny_config, steps=1, checkpoint_every=1)
    assert pretrain(tiny_store, run, config, resume=True, init=path).finished  # there is nothing yet
    began = json.loads((run / "run.json").read_text())["init"]
    assert began == {"path": str(path), "sha256": file_sha256(path), "part": ""}
    kept = run / "checkpoints" / "1" / "run.json"
    assert json.loads(kept.read_text())["init"] == began
    capsys.readouterr()
    for init in (None, path):
        assert pretrain(tiny_store, run, config, resume=True, init=init).finished
        assert ("is not read again: the run goes on from" in capsys.readouterr().err) == (init is not None)

    export_model(MeDUET(config.model), tmp_path / "other.safetensors")
    with pytest.raises(UserError, match=r"other\.safetensors: has SHA-256 .*began from .*reference\.safe"):
        pretrain(tiny_store, run, config, resume=True, init=tmp_path / "other.safetensors")
    with pytest.raises(UserError, match="holds a run already"):
        pretrain(tiny_store, run, config, init=path)
    path.unlink()
    assert pretrain(tiny_store, run, config, resume=True, init=path).finished
    kept.write_text(json.dumps({**json.loads(kept.read_text()), "init": None}))
    with pytest.raises(UserError, match="began from random weights, not from these: leave --init out"):
        pretrain(tiny_store, run, config, resume=True, init=tmp_path / "other.safetensors")


def test_processes_with_different_weights_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def gather(values: list[str], value: str, group: object) -> None:
        values[:] = [value, value, "other"]

    monkeypatch.setattr(dist, "all_gather_object", gather)
    world = World(torch.device("cpu"), size=3, store=dist.HashStore())
    with pytest.raises(UserError, match="the weights: rank 0 has mine, rank 2 has other"):
        world.require_same("the weights", "mine")
    World(torch.device("cpu")).require_same("the weights", "mine")
