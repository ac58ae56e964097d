"""Tokenizer files: what loads, and how everything else is refused."""

from __future__ import annotations

import json
import pickle
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
from monai.apps.generation.maisi.networks.autoencoderkl_maisi import AutoencoderKlMaisi
from safetensors.torch import load_file, save_file
from torch import Tensor

from meduet_fast.autoencoder import load_tokenizer
from meduet_fast.autoencoder.autoencoder import Architecture
from meduet_fast.autoencoder.weights import BUILTIN_WEIGHTS, save_safetensors
from meduet_fast.errors import UserError
from meduet_fast.weight_files import METADATA, read_file


@pytest.fixture(scope="module")
def maisi_weights() -> dict[str, Tensor]:
    """Weights of MONAI's own network with the published sizes (spec section 1), not built by the package."""
    torch.manual_seed(0)
    network = AutoencoderKlMaisi(
        spatial_dims=3,
        in_channels=1,
        out_channels=1,
        latent_channels=4,
        num_channels=[64, 128, 256],
        num_res_blocks=[2, 2, 2],
        norm_num_groups=32,
        norm_eps=1e-6,
        attention_levels=[False, False, False],
    )
    return dict(network.state_dict())


@pytest.mark.parametrize("wrapper", [None, "unet_state_dict", "module", "safetensors"])
def test_maisi_loads(tmp_path: Path, maisi_weights: dict[str, Tensor], wrapper: str | None) -> None:
    path = tmp_path / "autoencoder.pt"
    if wrapper == "safetensors":
        save_file({f"autoencoder._orig_mod.{key}": value for key, value in maisi_weights.items()}, path)
    else:
        torch.save(maisi_weights if wrapper is None else {"epoch": 3, wrapper: maisi_weights}, path)
    tokenizer = load_tokenizer(str(path))
    assert (tokenizer.channels, tokenizer.compression, tokenizer.scale) == (4, 4, 1.0)
    assert tokenizer.identity.startswith("maisi-")
    loaded = tokenizer.network.state_dict()  # type: ignore[attr-defined]
    assert len(loaded) == 130
    assert sum(tensor.numel() for tensor in loaded.values()) == pytest.approx(20.9e6, rel=0.01)
    assert all(torch.equal(loaded[key], value) for key, value in maisi_weights.items())


def test_maisi_encodes(tmp_path: Path, maisi_weights: dict[str, Tensor]) -> None:
    path = tmp_path / "autoencoder.pt"
    torch.save(maisi_weights, path)
    tokenizer = load_tokenizer(str(path))
    latents = tokenizer.encode(torch.rand(1, 1, 16, 16, 16))
    assert latents.shape == (1, 4, 4, 4, 4)
    assert tokenizer.decode(latents).shape == (1, 1, 16, 16, 16)


def refused(path: Path) -> str:
    """The one line with which a file is refused; it names the file."""
    with pytest.raises(UserError) as error:
        load_tokenizer(str(path))
    message = str(error.value)
    assert str(path) in message
    assert "\n" not in message
    return message


def test_maisi_with_wrong_keys(tmp_path: Path, maisi_weights: dict[str, Tensor]) -> None:
    wrong: dict[str, Any] = dict(maisi_weights)
    del wrong["quant_conv_mu.conv.bias"]
    wrong["decoder.extra.weight"] = torch.zeros(3)
    wrong["post_quant_conv.conv.bias"] = torch.zeros(7)
    wrong["encoder.blocks.0.conv.conv.bias"] = torch.full((64,), float("nan"))
    path = tmp_path / "autoencoder.pt"
    torch.save(wrong, path)
    message = refused(path)
    assert "1 missing: quant_conv_mu.conv.bias" in message
    assert "1 unexpected: decoder.extra.weight" in message
    assert "post_quant_conv.conv.bias has shape (7,), expected (4,)" in message
    assert "1 with NaN or infinite values: encoder.blocks.0.conv.conv.bias" in message


def test_another_network_lists_only_the_first_keys(tmp_path: Path) -> None:
    path = tmp_path / "unet.pt"
    torch.save(torch.nn.Linear(2, 3).state_dict(), path)
    message = refused(path)
    assert "130 missing" in message
    assert "2 unexpected: weight, bias" in message
    assert len(message) < 600


class _Runs:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[Path]]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize(
    "save", [torch.save, lambda value, path: path.write_bytes(pickle.dumps(value, protocol=2))]
)
def test_a_pickle_with_code_is_refused_and_not_run(tmp_path: Path, save: Any) -> None:
    path, proof = tmp_path / "autoencoder.pt", tmp_path / "executed"
    save({"state_dict": _Runs(proof)}, path)
    assert "nothing but weights" in refused(path)
    assert not proof.exists()


@pytest.mark.parametrize("name", ["autoencoder.pt", "tokenizer.safetensors"])
@pytest.mark.parametrize("content", [b"", b"\x93random bytes \x00\xff" * 50])
def test_junk_is_refused(tmp_path: Path, name: str, content: bytes) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    refused(path)


def test_a_tensor_is_no_state_dict(tmp_path: Path) -> None:
    path = tmp_path / "autoencoder.pt"
    torch.save(torch.zeros(3), path)
    assert "expected a dict with weights, found Tensor" in refused(path)


def test_an_absent_file_and_a_misspelt_name(tmp_path: Path) -> None:
    refused(tmp_path / "absent.pt")
    refused(tmp_path)  # a folder
    for spec in ("buildin", "~nobody-of-that-name/a.pt"):
        with pytest.raises(UserError, match=f"'{spec}': expected 'builtin' or the path of a file"):
            load_tokenizer(spec)


def test_a_closed_folder(tmp_path: Path, as_nobody: AbstractContextManager[None]) -> None:
    (tmp_path / "closed").mkdir(mode=0)
    with as_nobody:
        assert "Permission denied" in refused(tmp_path / "closed" / "autoencoder.pt")


def test_saved_tokenizer_loads_with_its_description(tmp_path: Path) -> None:
    architecture = Architecture((8, 8, 16), (1, 1, 1), 1)
    network = architecture.build()
    path = tmp_path / "own.safetensors"
    save_safetensors(path, architecture, network, {"psnr_db": {"mean": 20.5}}, {"steps": 3})
    tokenizer = load_tokenizer(str(path))
    assert tokenizer.identity.startswith("trained-")
    image = torch.rand(1, 1, 16, 16, 16)
    with torch.no_grad():
        assert torch.equal(tokenizer.encode(image), network.encode(image)[0])
    metadata = read_file(path)[METADATA]
    assert metadata["metrics"] == {"psnr_db": {"mean": 20.5}}
    assert metadata["training"] == {"steps": 3}


def test_builtin_says_how_it_was_made_and_how_good_it_is() -> None:
    metadata = read_file(BUILTIN_WEIGHTS)[METADATA]
    assert metadata["training"]["steps"] > 0
    kinds = {"ct", "ct_thick", "ct_soft", "ct_shifted", "mr_t1", "mr_head", "mean"}
    assert set(metadata["metrics"]["psnr_db"]) == kinds


def edited(path: Path, metadata: dict[str, str] | None = None, drop: str | None = None) -> Path:
    """The built-in tokenizer with another header, or without one of its tensors."""
    weights = load_file(BUILTIN_WEIGHTS)
    if drop:
        del weights[drop]
    header = read_file(BUILTIN_WEIGHTS)[METADATA] | (metadata or {})
    strings = {key: value if isinstance(value, str) else json.dumps(value) for key, value in header.items()}
    save_file(weights, path, strings)
    return path


def test_damaged_safetensors_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.safetensors"
    assert "1 missing: quant_conv_mu.conv.bias" in refused(edited(path, drop="quant_conv_mu.conv.bias"))
    assert "nor has it the header of train-tokenizer" in refused(edited(path, {"format": "other"}))
    assert "architecture" in refused(edited(path, {"architecture": "{"}))
    assert "architecture" in refused(edited(path, {"architecture": "{}"}))
    sizes = read_file(BUILTIN_WEIGHTS)[METADATA]["architecture"]
    for change in (
        {"norm_num_groups": 3},
        {"norm_num_groups": 0},
        {"num_channels": "abc"},
        {"num_res_blocks": [1]},
    ):
        assert "architecture" in refused(edited(path, {"architecture": json.dumps(sizes | change)}))
    larger = json.dumps(sizes | {"latent_channels": 8})
    assert "of another shape: " in refused(edited(path, {"architecture": larger}))
    path.write_bytes(BUILTIN_WEIGHTS.read_bytes()[:-100])
    refused(path)
    save_file({"latent": torch.zeros(3)}, path)
    assert "nor has it the header of train-tokenizer): 130 missing" in refused(path)
