"""Weights in other people's names: loaded strictly, the same encoding, and back to the last bit."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from monai.networks.nets import UNETR, ViT
from safetensors.torch import load_file
from torch import Tensor, nn

from meduet_fast.errors import UserError
from meduet_fast.models import MeDUET, MeDUETConfig
from meduet_fast.models.export import ExportFormat, export_model
from meduet_fast.models.monai_names import from_monai

SMALL = MeDUETConfig(
    latent_size=8, patch_size=4, embed_dim=24, depth=12, num_heads=2, decoder_embed_dim=12, decoder_depth=1,
    decoder_num_heads=2, num_domains=3,
)  # fmt: skip


@pytest.fixture
def model() -> MeDUET:
    """Every parameter is away from its first value, so that none can be forgotten."""
    torch.manual_seed(0)
    model = MeDUET(SMALL)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.requires_grad_(False)


@pytest.fixture
def latents() -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, 4, 8, 8, 8, generator=generator, dtype=torch.float64)


def _exported(model: MeDUET, folder: Path, form: ExportFormat) -> tuple[dict[str, Tensor], dict[str, Any]]:
    files = export_model(model, folder / "out", form, {"step": 5})
    assert files == [folder / "out" / "model.safetensors", folder / "out" / "config.json"]
    assert sorted((folder / "out").iterdir()) == sorted(files)
    config = json.loads(files[1].read_text())
    assert (config["format"], config["step"]) == (form, 5)
    return load_file(files[0]), config


def _with_eps(net: nn.Module, eps: float) -> nn.Module:
    for module in net.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = eps
    return net.eval()


def _encoder_is_back(model: MeDUET, tensors: dict[str, Tensor]) -> None:
    torch.manual_seed(7)
    other = MeDUET(model.config)
    unknown = other.load_state_dict(tensors, strict=False).unexpected_keys
    assert unknown == []
    for name, value in model.state_dict().items():
        if name.startswith(("embed_layer.", "blocks.", "norm.", "pos_embed")):
            assert torch.equal(other.state_dict()[name], value), name


def test_our_own_form_is_loaded_from_file_and_folder(model: MeDUET, tmp_path: Path) -> None:
    _, config = _exported(model, tmp_path, "meduet")
    assert MeDUETConfig(**config["arguments"]) == SMALL
    single = tmp_path / "sub" / "one.safetensors"
    assert export_model(model, single) == [single]
    assert list(single.parent.iterdir()) == [single]
    for path in (tmp_path / "out", single):
        loaded = MeDUET.from_pretrained(path)
        assert loaded.config == SMALL
        for name, value in model.state_dict().items():
            assert torch.equal(loaded.state_dict()[name], value), name


def test_the_published_names(model: MeDUET, tmp_path: Path) -> None:
    tensors, config = _exported(model, tmp_path, "reference")
    loaded = MeDUET.from_reference(tensors, MeDUETConfig(**config["arguments"]))
    for name, value in model.to_reference().items():
        assert torch.equal(loaded.state_dict()[name], value), name


def test_monai_vit(model: MeDUET, latents: Tensor, tmp_path: Path) -> None:
    tensors, config = _exported(model, tmp_path, "monai-vit")
    net = ViT(**config["arguments"])
    net.load_state_dict(tensors, strict=True)
    back = from_monai(net.state_dict(), SMALL)
    assert torch.equal(back["cls_token"], model.cls_token)
    _encoder_is_back(model, back)

    # In float64, where only true differences are left.
    expected = model.double().encode(model.embed(latents))
    with torch.no_grad():
        _, states = net.double().eval()(latents)
        as_it_is = net.norm(states[-1])
        cls, states = _with_eps(net, config["layer_norm_eps"])(latents)
        encoded = net.norm(states[-1])
    torch.testing.assert_close(encoded, expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(cls, expected[:, 0], rtol=1e-10, atol=1e-10)
    assert 1e-8 < (as_it_is - expected).norm() / expected.norm() < 1e-3  # their epsilon


def test_monai_unetr(model: MeDUET, latents: Tensor, tmp_path: Path) -> None:
    """The same tokens as our blocks give without CLS, at every depth that UNETR reads."""
    tensors, config = _exported(model, tmp_path, "unetr")
    net = UNETR(**config["arguments"], out_channels=2, feature_size=4)
    assert tensors.keys() == {name for name in net.state_dict() if name.startswith("vit.")}
    assert net.load_state_dict(tensors, strict=False).unexpected_keys == []
    _encoder_is_back(model, from_monai(net.state_dict(), SMALL))

    model.double()
    large = F.interpolate(latents, scale_factor=config["latents_repeated"], mode="nearest")
    expected, tokens = [], model.embed(latents)[:, 1:]
    for block in model.blocks:
        tokens = block(tokens)
        expected.append(tokens)
    with torch.no_grad():
        encoded, states = _with_eps(net.double(), config["layer_norm_eps"]).vit(large)
        assert net(large).shape == (2, 2, 32, 32, 32)
    torch.testing.assert_close(encoded, model.norm(tokens), rtol=1e-10, atol=1e-10)
    for state, tokens in zip(states, expected, strict=True):
        torch.testing.assert_close(state, tokens, rtol=1e-10, atol=1e-10)


def test_what_does_not_fit_is_refused(model: MeDUET, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="UNETR has 12 blocks and patches of 16; this encoder has 1 blocks"):
        export_model(MeDUET(replace(SMALL, depth=1)), tmp_path / "out", "unetr")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match=r"file: can't be written"):
        export_model(model, tmp_path / "file", "reference")
    assert (tmp_path / "file").read_text() == "mine"
    with pytest.raises(ValueError, match=r"nothing for embed_layer\.proj\.weight"):
        from_monai({}, SMALL)
