"""Features: each crop's own, whatever its size and company; strange networks are refused in one line."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from meduet_fast.autoencoder.autoencoder import Architecture, Tokenizer
from meduet_fast.encoding.encode import encode_latents
from meduet_fast.errors import UserError
from meduet_fast.models import MeDUET, MeDUETConfig
from meduet_fast.synthesis.features import SliceFeatures, TokenizerFeatures, crop_factors

from .fakes import KnownFactors

IMAGES = list(torch.rand(3, 8, 12, 16, generator=torch.Generator().manual_seed(0)))  # (N, X, Y, Z)


@pytest.mark.parametrize("shape", [(4, 4, 4), (6, 10, 4)])
def test_factors_of_crops_are_those_of_their_encoding_alone(shape: tuple[int, int, int]) -> None:
    torch.manual_seed(0)
    config = MeDUETConfig(
        latent_size=4, patch_size=2, embed_dim=24, depth=1, num_heads=2, decoder_embed_dim=12,
        decoder_depth=1, decoder_num_heads=2, num_domains=3,
    )  # fmt: skip
    model, crops = MeDUET(config).eval(), torch.randn(5, 4, *shape)
    found = crop_factors(model, crops, batch_size=3)
    for crop, content, style in zip(crops, found.content, found.style, strict=True):
        maps = encode_latents(model, crop)
        torch.testing.assert_close(torch.from_numpy(content), maps.content.mean((0, 1, 2)))
        torch.testing.assert_close(torch.from_numpy(style), maps.style.mean((0, 1, 2)))


def test_the_style_of_the_known_network_is_the_mean_of_the_channels() -> None:
    crops = torch.randn(2, 4, 8, 6, 4)
    style = crop_factors(KnownFactors(), crops).style
    np.testing.assert_allclose(style, crops.mean((2, 3, 4)).numpy(), atol=1e-6)


def test_the_tokenizers_features_do_not_depend_on_how_an_image_is_cut() -> None:
    architecture = Architecture((4, 4, 4), (1, 1, 1), 2)
    tokenizer = Tokenizer(architecture, architecture.build(), "t")
    features = TokenizerFeatures(tokenizer)(IMAGES)
    assert features.shape == (3, 1, 4)
    assert len(np.unique(features, axis=0)) == 3
    tokenizer.window = 8  # two windows along two axes
    pieces = TokenizerFeatures(tokenizer)([IMAGES[0][:, :8, :8]])
    parts = TokenizerFeatures(tokenizer)([IMAGES[0][:, a : a + 8, b : b + 8] for a in (0,) for b in (0, 8)])
    np.testing.assert_allclose(TokenizerFeatures(tokenizer)([IMAGES[0][:, :8]])[0], parts.mean(0), rtol=1e-5)
    np.testing.assert_allclose(pieces[0], parts[0], rtol=1e-6)


class Moments(nn.Module):
    """Mean and corner of a slice: tells its orientation."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([x.mean((1, 2, 3)), x[:, 0, 0, 0], x[:, 1, 0, -1]], 1)


class Maps(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x


class Infinite(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1) / 0


class Fails(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.view(-1, 7)


def script(network: nn.Module, path: Path) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.save(torch.jit.script(network), str(path))
    return path


def test_slices_of_three_planes_go_through_a_users_network(tmp_path: Path) -> None:
    features = SliceFeatures(script(Moments(), tmp_path / "moments.pt"))
    found = features(IMAGES)
    assert (found.shape, features.name) == ((3, 3, 3), "moments")
    axial, coronal, sagittal = found[0]
    image = IMAGES[0]
    assert axial.tolist() == pytest.approx([image[:, :, 8].mean(), image[0, -1, 8], image[-1, -1, 8]])
    assert coronal.tolist() == pytest.approx([image[:, 6].mean(), image[0, 6, -1], image[-1, 6, -1]])
    assert sagittal.tolist() == pytest.approx([image[4].mean(), image[4, 0, -1], image[4, -1, -1]])


@pytest.mark.parametrize(
    ("network", "found"),
    [(Maps(), r"found \(3, 3, 12, 8\)"), (Infinite(), "not finite"), (Fails(), "invalid for input")],
)
def test_networks_that_do_not_fit_are_refused_in_one_line(
    tmp_path: Path, network: nn.Module, found: str
) -> None:
    path = script(network, tmp_path / "network.pt")
    with pytest.raises(UserError, match=rf"{path}: expected \(3, F\) numbers.*{found}") as error:
        SliceFeatures(path)(IMAGES)
    assert "\n" not in str(error.value)


def test_what_is_no_network_is_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "text.pt").write_text("no network")
    for path in (tmp_path / "text.pt", tmp_path / "absent.pt"):
        with pytest.raises(UserError, match=f"{path}: expected a TorchScript network") as error:
            SliceFeatures(path)
        assert "\n" not in str(error.value)
