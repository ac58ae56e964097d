"""Checkpoints of the published code and of ours in its names: wrappings, heads, and what is refused."""

from __future__ import annotations

import copy
import json
from argparse import Namespace
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from meduet_fast.errors import UserError
from meduet_fast.models import MeDUET, MeDUETConfig
from meduet_fast.models.export import export_model

SMALL = MeDUETConfig(
    latent_size=4, patch_size=2, embed_dim=24, depth=1, num_heads=2, decoder_embed_dim=12, decoder_depth=1,
    decoder_num_heads=1, num_domains=3, layer_norm_eps=1e-5,
)  # fmt: skip
HEADS = {"num_heads": 2, "decoder_num_heads": 1}


@pytest.fixture(scope="module")
def model() -> MeDUET:
    torch.manual_seed(0)
    return MeDUET(SMALL)


@pytest.fixture(scope="module")
def bare(model: MeDUET) -> dict[str, Tensor]:
    """The weights and nothing else, as safetensors keep them."""
    return dict(model.to_reference().items())


def same(found: MeDUET, model: MeDUET, config: MeDUETConfig = SMALL) -> bool:
    own = model.to_reference()
    return found.config == config and all(
        torch.equal(value, own[key]) for key, value in found.to_reference().items()
    )


STATED: dict[str, Callable[[dict[str, Tensor]], Mapping[str, Any]]] = {
    "config": lambda state: {"state_dict": state, "config": asdict(SMALL)},
    "flat": lambda state: {**state, **HEADS, "layer_norm_eps": 1e-5},
    "arguments": lambda state: {"model": state, "args": Namespace(**asdict(SMALL), patch=[96, 96, 96])},
    "prefixed": lambda state: {
        "state_dict": {f"model._orig_mod.{key}": value for key, value in state.items()},
        "hyper_parameters": {"model": asdict(SMALL)},
    },
}


@pytest.mark.parametrize("how", STATED)
def test_heads_beside_the_weights_are_read(how: str, model: MeDUET, bare: dict[str, Tensor]) -> None:
    assert same(MeDUET.from_reference(STATED[how](bare)), model)


def test_our_own_state_dict_says_its_sizes(model: MeDUET, tmp_path: Path) -> None:
    assert same(MeDUET.from_reference(model.to_reference()), model)
    torch.save(model.to_reference(), tmp_path / "a.pt")
    torch.save({"model": model.to_reference()}, tmp_path / "b.pt")
    for name in ("a.pt", "b.pt"):
        assert same(MeDUET.from_reference(torch.load(tmp_path / name, weights_only=True)), model)
        assert same(MeDUET.from_reference(tmp_path / name), model)
    whole = {"config": asdict(SMALL), "state_dict": model.state_dict()}  # with what no published one has
    assert torch.equal(MeDUET.from_reference(whole).siqc_log_scale, model.siqc_log_scale)
    other = MeDUET(SMALL)
    other.load_state_dict(model.to_reference(), strict=False)  # what they say bothers nobody
    assert torch.equal(other.cls_token, model.cls_token)


def test_exports_say_their_sizes(model: MeDUET, bare: dict[str, Tensor], tmp_path: Path) -> None:
    """In the file's metadata, and in config.json for a file that has none."""
    export_model(model, tmp_path / "folder", "reference")
    export_model(model, tmp_path / "one.safetensors", "reference")
    assert same(MeDUET.from_reference(tmp_path / "folder"), model)
    assert same(MeDUET.from_reference(str(tmp_path / "one.safetensors")), model)
    save_file(bare, tmp_path / "folder" / "model.safetensors")
    assert same(MeDUET.from_reference(tmp_path / "folder"), model)
    (tmp_path / "folder" / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json: beside model\.safetensors, and not readable as JSON"):
        MeDUET.from_reference(tmp_path / "folder")


@pytest.fixture(scope="module")
def wide() -> dict[str, Tensor]:
    """Weights of the published widths, without values or heads."""
    with torch.device("meta"):
        return dict(MeDUET(MeDUETConfig(latent_size=8, depth=1, decoder_depth=1)).to_reference().items())


@pytest.mark.parametrize("heads", [8, "8", 8.0, "8.0"])
def test_heads_are_whole_numbers_however_written(heads: Any, wide: dict[str, Tensor]) -> None:
    beside = {"args.num_heads": heads, "args.embed_dim": "768"}
    config = MeDUETConfig.from_state_dict(wide, beside)
    assert (config.num_heads, config.decoder_num_heads) == (8, 12)


@pytest.mark.parametrize(
    ("beside", "unsettled"),
    [
        ({"num_heads": "eight"}, "num_heads of 768 wide blocks: give num_heads=$"),
        ({"num_heads": None}, "num_heads of 768 wide blocks: give num_heads=$"),
        ({"decoder_num_heads": 8.5}, "decoder_num_heads of 384 wide blocks: give decoder_num_heads=$"),
        ({"model.decoder_heads": 8}, "decoder_num_heads of 384 wide blocks: give decoder_num_heads=$"),
        ({"num_attention_heads": 8}, "give num_heads= and decoder_num_heads=$"),
        ({"config.heads": 8}, "give num_heads= and decoder_num_heads=$"),
        ({"encoder_num_heads": 8}, "give num_heads= and decoder_num_heads=$"),
        ({"args": ["--embed_dim", "768", "--num_heads", "8"]}, "give num_heads= and decoder_num_heads=$"),
        ({"args": "--num_heads=8"}, "give num_heads= and decoder_num_heads=$"),
    ],
)
def test_heads_that_are_not_understood_are_not_the_published_ones(
    beside: dict[str, Any], unsettled: str, wide: dict[str, Tensor]
) -> None:
    with pytest.raises(ValueError, match=unsettled):
        MeDUETConfig.from_state_dict(wide, beside)
    assert MeDUETConfig.from_state_dict(wide, beside, 8, 8).num_heads == 8
    assert MeDUETConfig.from_state_dict(wide, {"epoch": 3, "args": ["--head", 3]}).num_heads == 12


def test_config_json_of_any_program(model: MeDUET, bare: dict[str, Tensor], tmp_path: Path) -> None:
    save_file(bare, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(asdict(SMALL)), encoding="utf-8-sig")
    assert same(MeDUET.from_reference(tmp_path), model)
    for text in (100_000 * "[", 100 * '{"a": ' + "1" + 100 * "}"):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(UserError, match=r"config\.json: beside model\.safetensors, and not readable"):
            MeDUET.from_reference(tmp_path)


def test_metadata_that_is_none(bare: dict[str, Tensor], tmp_path: Path) -> None:
    torch.save({**bare, "__metadata__": None}, tmp_path / "a.pt")
    with pytest.raises(UserError, match=r"a\.pt: not a MeDUET model"):
        MeDUET.from_pretrained(tmp_path / "a.pt")


def test_wrapped_blocks_leave_no_trace_in_names(model: MeDUET, tmp_path: Path) -> None:
    """Blocks compiled one by one, as a user may: what is written has the published names."""
    wrapped = copy.deepcopy(model)
    wrapped.blocks[0] = torch.compile(wrapped.blocks[0], backend="eager")  # type: ignore[assignment]
    assert any("_orig_mod" in key for key in wrapped.state_dict())
    assert wrapped.to_reference().keys() == model.to_reference().keys()
    assert same(MeDUET.from_reference(wrapped.to_reference()), model)
    wrapped.save_pretrained(tmp_path / "a.safetensors")
    assert same(MeDUET.from_pretrained(tmp_path / "a.safetensors"), model)
    # As those were written before.
    tensors = {key: value.clone() for key, value in wrapped.state_dict().items()}
    save_file(tensors, tmp_path / "b.safetensors", {"meduet_config": json.dumps(asdict(SMALL))})
    assert same(MeDUET.from_pretrained(tmp_path / "b.safetensors"), model)


def test_heads_that_nobody_states_are_refused(model: MeDUET, bare: dict[str, Tensor], tmp_path: Path) -> None:
    both = "settles num_heads of 24 wide blocks and decoder_num_heads of 12 wide blocks: give num_heads= and"
    with pytest.raises(ValueError, match=both):
        MeDUET.from_reference(bare)
    with pytest.raises(ValueError, match=r"settles decoder_num_heads of 12 .*: give decoder_num_heads=$"):
        MeDUET.from_reference(bare, num_heads=2)
    with pytest.raises(ValueError, match=r"names read without 'module\.'"):
        MeDUET.from_reference({f"module.{key}": value for key, value in bare.items()})
    save_file(bare, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match=r"a\.safetensors: heads leave no trace in weights"):
        MeDUET.from_reference(tmp_path / "a.safetensors")
    eps = replace(SMALL, layer_norm_eps=1e-6)
    assert same(MeDUET.from_reference(bare, **HEADS), model, eps)
    assert same(MeDUET.from_reference(bare, SMALL), model)


def test_the_published_widths_have_the_published_heads() -> None:
    published = MeDUETConfig(latent_size=8, depth=1, decoder_depth=1)
    with torch.device("meta"):
        assert MeDUETConfig.from_state_dict(MeDUET(published).to_reference()) == published
    for change in ({"embed_dim": 960, "num_heads": 15}, {"embed_dim": 384, "num_heads": 6}):
        with torch.device("meta"):
            state = MeDUET(replace(published, **change)).to_reference()  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=r"give num_heads=$"):
            MeDUETConfig.from_state_dict(state)
        assert MeDUETConfig.from_state_dict(state, {}, change["num_heads"]).num_heads == change["num_heads"]


@pytest.mark.parametrize(
    ("beside", "given", "message"),
    [
        ({}, {"num_heads": 0, "decoder_num_heads": 1}, "num_heads: found 0, expected more than 0"),
        ({"config": asdict(SMALL)}, {"num_heads": 4}, "num_heads is 4, the weights were made with 2"),
        (
            {"config": asdict(SMALL)},
            {"config": replace(SMALL, num_heads=4)},
            "is 4, the weights were made with 2",
        ),
        ({}, {"config": SMALL, "num_heads": 2}, "config says the heads: expected no num_heads="),
        ({}, {"config": SMALL, "decoder_num_heads": 1}, "config says the heads"),
        ({"a": HEADS, "b": {"num_heads": 4}}, {}, r"24 wide blocks \(2 or 4\?\): give num_heads="),
        ({"config": {**HEADS, "embed_dim": 48}}, {}, "stands beside embed_dim 48, .* have embed_dim 24"),
        ({"num_heads": 5, "decoder_num_heads": 1}, {}, "embed_dim 24 is not a multiple of num_heads 5"),
    ],
)
def test_contradictions_are_refused(
    beside: dict[str, Any], given: dict[str, Any], message: str, bare: dict[str, Tensor]
) -> None:
    with pytest.raises(ValueError, match=message):
        MeDUET.from_reference({"state_dict": bare, **beside}, **given)


def test_what_is_no_such_model_is_refused(model: MeDUET, bare: dict[str, Tensor], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"1 with NaN or infinite values: norm\.bias"):
        MeDUET.from_reference({**bare, "norm.bias": torch.full((24,), float("nan"))}, SMALL)
    with pytest.raises(ValueError, match=r"blocks\.N found for N in \['0', '5'\]"):
        MeDUET.from_reference({**bare, "blocks.5.norm1.bias": torch.zeros(24)}, **HEADS)
    with pytest.raises(ValueError, match=r"embed_layer\.proj\.weight has shape \(24, 32\), expected 5 axes"):
        MeDUET.from_reference({**bare, "embed_layer.proj.weight": torch.zeros(24, 32)}, **HEADS)
    export_model(model, tmp_path / "vit", "monai-vit")
    with pytest.raises(UserError, match=r"vit/model\.safetensors: the names are MONAI's"):
        MeDUET.from_reference(tmp_path / "vit")
    export_model(model, tmp_path / "ours.safetensors", "reference")
    with pytest.raises(UserError, match=r"no 'meduet_config' .* read by MeDUET\.from_reference"):
        MeDUET.from_pretrained(tmp_path / "ours.safetensors")
    assert json.loads((tmp_path / "vit" / "config.json").read_text())["arguments"]["num_heads"] == 2
