"""Training a tokenizer: it learns, says how well, repeats exactly, and writes a file that loads."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch

from meduet_fast.autoencoder import load_tokenizer
from meduet_fast.autoencoder import train as train_module
from meduet_fast.autoencoder.autoencoder import Architecture, Tokenizer
from meduet_fast.autoencoder.identity_init import pass_images_through
from meduet_fast.autoencoder.train import (
    AutoencoderTraining,
    TokenizerTrainingConfig,
    VolumeCrops,
    _crop,
    _standardise,
    _Volume,
    format_metrics,
    held_out_crops,
    train_tokenizer,
)
from meduet_fast.errors import UserError, VolumeError
from meduet_fast.lock import LOCK
from meduet_fast.weight_files import METADATA, read_file

TINY = TokenizerTrainingConfig(
    steps=30, crop_size=16, num_channels=(8, 8, 8), num_res_blocks=(1, 1, 1), learning_rate=1e-3, device="cpu"
)


def image(size: int = 48, seed: int = 0) -> torch.Tensor:
    """(1, size, size, size) float32 in [0, 1]: blobs of all sizes, as tissue has."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(1, 1, size // 8, size // 8, size // 8, generator=generator)
    blobs = torch.nn.functional.interpolate(coarse, size=(size,) * 3, mode="trilinear")[0]
    return (blobs + 0.1 * torch.rand(1, size, size, size, generator=generator)).clamp(0, 1)


@pytest.fixture(scope="module")
def volumes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Manifest of two domains with a small CT-like volume each."""
    folder = tmp_path_factory.mktemp("volumes")
    for name in "ab":
        voxels = image(40, seed=ord(name))[0].numpy() * 400 - 170
        nib.save(
            nib.Nifti1Image(voxels.astype(np.float32), np.diag([1.5, 1.5, 1.5, 1])), folder / f"{name}.nii"
        )
    manifest = folder / "manifest.yaml"
    manifest.write_text("datasets:\n- {name: a, path: a.nii}\n- {name: b, path: b.nii}\n")
    return manifest


@pytest.fixture
def small_gains() -> Iterator[None]:
    """What latents do to the image is measured on few of them: on all it takes longer than the training."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_module, "GAIN_CROP", 6)
        yield


@pytest.mark.usefixtures("small_gains")
def test_training_lowers_the_loss_and_writes_a_tokenizer(
    volumes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "new" / "own.safetensors"
    locked: list[bool] = []
    remove = shutil.rmtree

    def watched(folder: Path, **given: Any) -> None:
        if folder == output.with_suffix(".run"):
            locked.append((folder / LOCK).exists())
        remove(folder, **given)

    monkeypatch.setattr(shutil, "rmtree", watched)
    metrics = train_tokenizer(volumes, output, TINY)
    assert metrics["loss"]["last"] < 0.9 * metrics["loss"]["first"]
    assert set(metrics["psnr_db"]) == set(metrics["ssim"]) == {"a", "b", "mean"}
    assert metrics["psnr_db"]["mean"] == pytest.approx(
        (metrics["psnr_db"]["a"] + metrics["psnr_db"]["b"]) / 2, abs=1e-3
    )
    assert "mean" in format_metrics(metrics)
    tokenizer = load_tokenizer(str(output))
    latents = tokenizer.encode(image()[None])
    assert latents.shape == (1, 4, 12, 12, 12)
    assert tokenizer.decode(latents).shape == (1, 1, 48, 48, 48)
    assert read_file(output)[METADATA]["training"]["steps"] == 30
    assert list(output.parent.iterdir()) == [output]
    assert locked == [False]  # NFS could not remove a folder with an open file


def test_a_strange_volume_is_named(volumes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise KeyError("what")

    monkeypatch.setattr(train_module, "load_volume", fail)
    with pytest.raises(VolumeError, match=r"a\.nii: unexpected KeyError in test_train\.py:\d+: 'what'"):
        VolumeCrops(volumes, TINY, 4)


@pytest.mark.usefixtures("small_gains")
def test_same_seed_same_weights(volumes: Path, tmp_path: Path) -> None:
    short = replace(TINY, steps=3, batch_size=2)
    for name, config in (("a", short), ("b", short), ("c", replace(short, seed=1))):
        metrics = train_tokenizer(volumes, tmp_path / f"{name}.safetensors", config)
        assert isinstance(metrics, dict)
        assert "loss" not in metrics  # three steps log none
        assert "mean" in format_metrics(metrics)
    a, b, c = (load_tokenizer(str(tmp_path / f"{name}.safetensors")).identity for name in "abc")
    assert a == b != c


@pytest.mark.usefixtures("small_gains")
def test_a_stopped_training_goes_on_as_if_it_had_not_been(
    volumes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed between two checkpoints; the file is then that of a training never stopped."""
    config = replace(TINY, steps=6, batch_size=2, checkpoint_every=2, log_every=1)
    train_tokenizer(volumes, tmp_path / "whole.safetensors", config)
    forward, calls = AutoencoderTraining.forward, 0

    def interrupted(self: AutoencoderTraining, *given: Any) -> dict[str, torch.Tensor]:
        nonlocal calls
        calls += 1
        if calls == 6:
            raise KeyboardInterrupt
        return forward(self, *given)

    monkeypatch.setattr(AutoencoderTraining, "forward", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train_tokenizer(volumes, tmp_path / "own.safetensors", config)
    monkeypatch.undo()
    assert not (tmp_path / "own.safetensors").exists()
    with pytest.raises(UserError, match="holds a run already"):
        train_tokenizer(volumes, tmp_path / "own.safetensors", config)
    train_tokenizer(volumes, tmp_path / "own.safetensors", config, resume=True)
    own, whole = (load_tokenizer(str(tmp_path / f"{name}.safetensors")) for name in ("own", "whole"))
    assert own.identity == whole.identity
    assert not list(tmp_path.glob("*.run"))


def test_standardised_latents_reconstruct_the_same() -> None:
    torch.manual_seed(0)
    architecture = Architecture((8, 8, 8), (1, 1, 1), 1)
    network = architecture.build()
    pass_images_through(network)
    tokenizer = Tokenizer(architecture, network, "test")
    volume = _Volume("a", image(40), 40)
    before, spread = network.encode(volume.image[None])
    decoded = tokenizer.decode(before)
    _standardise(tokenizer, [volume])
    after, new_spread = network.encode(volume.image[None])
    flat = after[0].flatten(1)
    torch.testing.assert_close(flat.mean(dim=1), torch.zeros(4), atol=1e-4, rtol=0)
    deviation = flat.std(dim=1)
    torch.testing.assert_close(deviation.square().mean(), torch.tensor(1.0), atol=1e-4, rtol=0)
    torch.testing.assert_close(tokenizer.decode(after), decoded, atol=1e-4, rtol=0)
    factor = (before[0].flatten(1).std(dim=1) / deviation).view(4, 1, 1, 1)
    torch.testing.assert_close(new_spread[0] * factor, spread[0], atol=1e-4, rtol=1e-3)
    # A change of equal size moves the image alike, whatever the channel.
    moved = []
    for channel in range(4):
        other = after.clone()
        other[:, channel] += 0.1 * torch.randn(after.shape[2:], generator=torch.Generator().manual_seed(1))
        moved.append(float((network.decode(other) - network.decode(after)).std()))
    assert max(moved) < 1.5 * min(moved)  # it was measured with other noise


def test_the_start_is_an_autoencoder_already() -> None:
    torch.manual_seed(0)
    network = Architecture((16, 16, 32), (1, 2, 2), 1).build()
    pass_images_through(network)
    original = image()[None]
    with torch.no_grad():
        latents, spread = network.encode(original)
        decoded = network.decode(latents)
    assert latents[:, 0].std() > 0.1
    assert spread.max() < 0.05
    means = torch.nn.functional.avg_pool3d(original, 4)
    assert torch.corrcoef(torch.stack([latents[:, 0].flatten(), means.flatten()]))[0, 1] > 0.99
    slopes = (means.roll(-1, dims=2) - means.roll(1, dims=2))[:, :, 1:-1]
    inner = latents[:, 1:2, 1:-1]
    assert torch.corrcoef(torch.stack([inner.flatten(), slopes.flatten()]))[0, 1] > 0.5
    assert torch.corrcoef(torch.stack([decoded.flatten(), original.flatten()]))[0, 1] > 0.9


def test_crops_keep_to_their_side_of_the_volume() -> None:
    marked = image().clone()
    marked[:, 30:] = 2
    generator = torch.Generator().manual_seed(0)
    assert max(float(_crop(marked, 0, 30, 16, generator).max()) for _ in range(200)) <= 1
    marked[:, :32] = -1
    crops = held_out_crops(marked, 32, 16)
    assert crops.shape == (8, 1, 16, 16, 16)
    assert crops.min() >= 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, "steps: found 0"),
        ({"batch_size": 0}, "batch_size: found 0"),
        ({"crop_size": 18}, "crop_size: found 18, expected a multiple of 4"),
        ({"crop_size": 0}, "crop_size: found 0"),
        ({"held_out_fraction": 1.0}, "held_out_fraction: found 1, expected 0 < value < 1"),
        ({"learning_rate": math.inf}, "learning_rate: found inf"),
        ({"num_channels": (4, 4, 4)}, "6 channels in every normalised group"),
        ({"num_channels": (8, 8)}, "num_res_blocks"),
        ({"norm_num_groups": 3}, "norm_num_groups"),
        ({"device": "abacus"}, "abacus"),
        ({"crop_size": 64}, "a.nii"),
    ],
)
def test_bad_settings_are_named(volumes: Path, tmp_path: Path, change: dict, message: str) -> None:
    output = tmp_path / "own.safetensors"
    with pytest.raises(UserError) as error:
        train_tokenizer(volumes, output, replace(TINY, **change))
    assert message in str(error.value)
    assert not output.exists()


def test_the_output_must_be_told_by_its_name(volumes: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"own\.pt.*\.safetensors"):
        train_tokenizer(volumes, tmp_path / "own.pt", TINY)


def test_a_folder_that_cannot_be_written_is_told_before_training(
    volumes: Path, tmp_path: Path, as_nobody: AbstractContextManager[None]
) -> None:
    tmp_path.chmod(0o555)
    with as_nobody, pytest.raises(UserError, match=r"own\.safetensors: cannot be written: Permission denied"):
        train_tokenizer(volumes, tmp_path / "own.safetensors", TINY)
