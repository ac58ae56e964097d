"""The tokenizer's interface: shapes, determinism, sampling, windows; and the shipped weights."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from monai.apps.generation.maisi.networks.autoencoderkl_maisi import AutoencoderKlMaisi
from torch import Tensor

from meduet_fast.autoencoder import Tokenizer, load_tokenizer
from meduet_fast.autoencoder.autoencoder import Architecture, _window_edge
from meduet_fast.autoencoder.weights import BUILTIN_WEIGHTS
from meduet_fast.data.sources import find_volumes
from meduet_fast.data.transforms import TransformConfig, load_volume

SMALL = Architecture(num_channels=(8, 8, 16), num_res_blocks=(1, 1, 1), norm_num_groups=1)


@pytest.fixture(scope="module")
def builtin() -> Tokenizer:
    return load_tokenizer()


def smooth_image(*size: int) -> Tensor:
    """(1, 1, *size) with values in [0, 1] and structure at several scales."""
    generator = torch.Generator().manual_seed(0)
    image = torch.zeros(1, 1, *size)
    for factor in (4, 8, 16):
        coarse = torch.rand(1, 1, *(n // factor for n in size), generator=generator)
        image += torch.nn.functional.interpolate(coarse, size=size, mode="trilinear") / 3
    return image


def test_round_trip_keeps_shape_type_and_range(builtin: Tokenizer) -> None:
    latents = builtin.encode(torch.rand(2, 1, 16, 24, 32, dtype=torch.float64))
    assert latents.shape == (2, 4, 4, 6, 8)
    assert latents.dtype == torch.float32
    wild = 10 * torch.randn(
        latents.shape, generator=torch.Generator().manual_seed(0)
    )  # clipping has work to do
    images = builtin.decode(wild.bfloat16())
    assert images.shape == (2, 1, 16, 24, 32)
    assert images.dtype == torch.float32
    assert images.min() == 0
    assert images.max() == 1
    assert not latents.requires_grad
    assert not images.requires_grad


def test_builtin_is_what_the_package_promises(builtin: Tokenizer) -> None:
    assert (builtin.channels, builtin.compression, builtin.scale) == (4, 4, 1.0)
    assert builtin.identity.startswith("builtin-")
    assert BUILTIN_WEIGHTS.stat().st_size <= 4_000_000
    # The identity tells the weights, not the place they were read from.
    assert load_tokenizer(str(BUILTIN_WEIGHTS)).identity.split("-")[1] == builtin.identity.split("-")[1]


def test_encoding_is_deterministic(builtin: Tokenizer) -> None:
    image = smooth_image(32, 32, 32)
    assert torch.equal(builtin.encode(image), builtin.encode(image))


def test_sampling_is_mean_plus_deviation_times_noise(builtin: Tokenizer) -> None:
    image = smooth_image(32, 32, 32)
    first, again, other = (
        builtin.encode(image, sample=True, generator=torch.Generator().manual_seed(seed))
        for seed in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    with torch.no_grad():
        mu, sigma = builtin.network.encode(image)
    noise = torch.randn(mu.shape, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(first, mu + sigma * noise)


def test_scale_is_applied_and_taken_out_again() -> None:
    torch.manual_seed(0)
    network = SMALL.build()
    plain, scaled = (Tokenizer(SMALL, network, "small", scale=scale) for scale in (1.0, 0.5))
    image = smooth_image(16, 16, 16)
    torch.testing.assert_close(scaled.encode(image), plain.encode(image) * 0.5)
    torch.testing.assert_close(scaled.decode(scaled.encode(image)), plain.decode(plain.encode(image)))


def test_a_volume_of_one_window_goes_through_as_it_is(builtin: Tokenizer) -> None:
    image = smooth_image(48, 32, 32)
    with torch.no_grad():
        mu, _ = builtin.network.encode(image)
        decoded = builtin.network.decode(mu).clamp(0, 1)
    assert torch.equal(builtin.encode(image), mu)
    assert torch.equal(builtin.decode(mu), decoded)


def test_windows_fit_together(builtin: Tokenizer) -> None:
    """Small windows give nearly what the whole volume gives, and every latent voxel lies where it should."""
    tokenizer = Tokenizer(builtin.architecture, builtin.network, "windows", window=64)
    image = smooth_image(108, 64, 76)
    whole, windows = builtin.encode(image), tokenizer.encode(image)
    assert whole.shape == windows.shape == (1, 4, 27, 16, 19)
    difference = (whole - windows).square().mean().sqrt() / whole.std()
    shifted = (whole[..., 1:] - windows[..., :-1]).square().mean().sqrt() / whole.std()
    assert difference < 0.1
    assert shifted > 2 * difference
    decoded, in_windows = builtin.decode(whole), tokenizer.decode(whole)
    assert decoded.shape == in_windows.shape == image.shape
    assert (decoded - in_windows).square().mean().sqrt() < 0.02


def test_windows_cover_every_size_at_whole_latent_voxels() -> None:
    for size, (longest, overlap) in itertools.product(range(16, 700, 4), [(128, 16), (96, 16)]):
        edge = _window_edge(size, longest, overlap, 4)
        assert edge % 4 == 0
        assert edge <= longest
        if size > longest:
            fewest = -(-(size - overlap) // (longest - overlap))
            assert int(edge * (1 - (overlap - 0.5) / edge)) == edge - overlap  # the step that MONAI takes
            assert -(-(size - edge) // (edge - overlap)) + 1 == fewest


@pytest.mark.parametrize("shape", [(1, 1, 16, 16), (1, 2, 16, 16, 16), (1, 1, 16, 16, 18)])
def test_encode_refuses_other_shapes(builtin: Tokenizer, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"encode: found shape .* expected \(B, 1, X, Y, Z\)"):
        builtin.encode(torch.zeros(shape))


def test_decode_refuses_other_shapes(builtin: Tokenizer) -> None:
    with pytest.raises(ValueError, match=r"decode: found shape .* expected \(B, 4, x, y, z\)"):
        builtin.decode(torch.zeros(1, 3, 4, 4, 4))


def test_network_is_monais_with_a_faster_group_norm() -> None:
    torch.manual_seed(0)
    ours = Architecture((32, 32, 64), (1, 1, 1), 16).build()
    monais = AutoencoderKlMaisi(
        spatial_dims=3,
        in_channels=1,
        out_channels=1,
        num_res_blocks=(1, 1, 1),
        num_channels=(32, 32, 64),
        attention_levels=(False, False, False),
        latent_channels=4,
        norm_num_groups=16,
        norm_eps=1e-6,
        num_splits=1,
        save_mem=False,
    )
    monais.load_state_dict(ours.state_dict())
    image = smooth_image(16, 16, 16)
    with torch.no_grad():
        for got, expected in zip(ours.encode(image), monais.encode(image), strict=True):
            torch.testing.assert_close(got, expected)
        latents = monais.encode(image)[0]
        torch.testing.assert_close(ours.decode(latents), monais.decode(latents))


def test_builtin_on_held_out_tissue(builtin: Tokenizer, sample_data: Path) -> None:
    """A crop of the chest CT that its training never saw: right half of the body, lung and ribs in it."""
    entry = next(entry for entry in find_volumes(sample_data).volumes if entry.domain == "ct")
    volume = load_volume(entry, TransformConfig()).image
    start = volume.shape[1] - 72
    crop = volume[None, :, start : start + 64, 60:124, 80:144]
    latents = builtin.encode(crop)
    mse = (builtin.decode(latents) - crop).square().mean()
    assert crop.std() > 0.2
    assert -10 * mse.log10() > 20
    assert 0.5 < latents.std() < 2


@pytest.mark.parametrize("grid", [(9, 8, 30), (31, 9, 8), (24, 23, 22), (8, 5, 3)])
def test_parts_of_a_volume_are_the_volume(grid: tuple[int, int, int]) -> None:
    torch.manual_seed(0)
    tokenizer = Tokenizer(SMALL, SMALL.build(), "small", scale=2.0, window=40)
    latents = torch.randn(4, *grid)
    parts = list(tokenizer.decode_parts(latents))
    whole = tokenizer.decode(latents[None])[0, 0]
    axis = grid.index(max(grid))
    assert [place[axis].start for place, _ in parts] == [0, *(place[axis].stop for place, _ in parts[:-1])]
    assert len(parts) == (1 if max(grid) <= 10 else 1 + -(-(max(grid) - 10) // 6))
    put_together = torch.full(whole.shape, torch.nan)
    for place, part in parts:
        assert put_together[place].isnan().all()
        put_together[place] = part
    torch.testing.assert_close(put_together, whole, rtol=0, atol=1e-6)


def test_parts_of_another_shape_are_refused(builtin: Tokenizer) -> None:
    with pytest.raises(ValueError, match=r"found shape \(1, 4, 2, 2, 2\), expected \(4, x, y, z\)"):
        next(builtin.decode_parts(torch.zeros(1, 4, 2, 2, 2)))
