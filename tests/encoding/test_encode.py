"""Whole scans become maps of tokens, averaged where windows overlap."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from meduet_fast.data import LatentStore, find_volumes
from meduet_fast.data.sources import VolumeEntry
from meduet_fast.data.transforms import TransformConfig, load_volume
from meduet_fast.encoding import EncodeConfig, Encoder, encode_latents
from meduet_fast.errors import UserError, VolumeError
from meduet_fast.files import file_sha256
from meduet_fast.models import MeDUET
from meduet_fast.models.export import export_model
from meduet_fast.prepare.prepare import PrepareConfig, prepare_volumes

from .conftest import CONFIG, RULE, PoolingTokenizer, network, write_scan, write_tokenizer


def by_definition(model: MeDUET, latents: Tensor, stride: int) -> tuple[Tensor, Tensor]:
    """The mean of all that windows say of a patch, window by window and token by token."""
    crop, patch = model.config.latent_size, model.config.patch_size
    grid = [edge // patch for edge in latents.shape[1:]]
    begin = [(edge - patch * count) // 2 for edge, count in zip(latents.shape[1:], grid, strict=True)]
    starts = [
        [
            start
            for start in range(0, patch * count, patch)
            if start % stride == 0 and start + crop <= patch * count
        ]
        for count in grid
    ]
    for axis, count in zip(starts, grid, strict=True):
        if axis[-1] + crop < patch * count:
            axis.append(patch * count - crop)
    said: dict[tuple[int, ...], list[tuple[Tensor, Tensor]]] = {}
    for corner in product(*starts):
        x, y, z = (slice(at + start, at + start + crop) for at, start in zip(begin, corner, strict=True))
        factors = model(latents[None, :, x, y, z])
        places = product(*(range(start // patch, (start + crop) // patch) for start in corner))
        for place, content, style in zip(places, factors.content[0], factors.style[0], strict=True):
            said.setdefault(place, []).append((content, style))
    maps = [
        torch.full((*grid, width), torch.nan) for width in (model.config.embed_dim, model.config.style_dim)
    ]
    for place, tokens in said.items():
        for whole, parts in zip(maps, zip(*tokens, strict=True), strict=True):
            whole[place] = torch.stack(parts).mean(0)
    return maps[0], maps[1]


@pytest.fixture
def latents() -> Tensor:
    return torch.randn(4, 21, 14, 8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("patch", "stride", "grid"), [(2, 2, (10, 7, 4)), (2, 6, (10, 7, 4)), (4, 4, (5, 3, 2))]
)
def test_a_token_is_the_mean_over_its_windows(
    latents: Tensor, patch: int, stride: int, grid: tuple[int, int, int]
) -> None:
    model = network(replace(CONFIG, patch_size=patch))
    found = encode_latents(model, latents, stride, batch_size=3)
    assert found.content.shape == (*grid, 24)
    assert found.style.shape == (*grid, 6)
    for maps, expected in zip(found[:2], by_definition(model, latents, stride), strict=True):
        torch.testing.assert_close(maps, expected, rtol=1e-5, atol=1e-5)


def test_one_window_is_what_the_network_says(latents: Tensor) -> None:
    model = network()
    found = encode_latents(model, latents[:, :8, 3:11])
    factors = model(latents[None, :, :8, 3:11])
    assert torch.equal(found.content, factors.content[0].unflatten(0, (4, 4, 4)))
    assert torch.equal(found.style, factors.style[0].unflatten(0, (4, 4, 4)))
    assert (found.first, found.windows) == ((0, 0, 0), 1)


def test_a_head_can_be_trained_on_tokens(latents: Tensor) -> None:
    head = torch.nn.Linear(6, 1)
    head(encode_latents(network(), latents).style).sum().backward()
    assert head.weight.grad is not None


def test_windows_overlap_by_half_and_batches_make_no_difference(latents: Tensor) -> None:
    model, told = network(), []
    found = encode_latents(model, latents.bfloat16(), batch_size=4, show=lambda *counts: told.append(counts))
    assert found.windows == 4 * 3  # at 0, 4, 8 and 12 of 20, at 0, 4 and 6 of 14, at 0
    assert told == [(4, 12)] * 3
    other = encode_latents(model, latents.bfloat16(), stride=4, batch_size=12)
    torch.testing.assert_close(found.content, other.content, rtol=1e-5, atol=1e-6)


def test_patches_lie_in_the_middle_of_a_volume(latents: Tensor) -> None:
    model = network(replace(CONFIG, patch_size=4))
    volume = torch.nn.functional.pad(latents, (0, 3, 0, 0, 0, 2))  # (4, 23, 14, 11)
    found = encode_latents(model, volume)
    assert found.first == (1, 1, 1)
    assert torch.equal(found.content, encode_latents(model, volume[:, 1:21, 1:13, 1:9]).content)


@pytest.mark.parametrize("stride", [0, 3, 10, -2])
def test_a_stride_beside_the_patches_is_refused(latents: Tensor, stride: int) -> None:
    expected = (
        f"stride: found {stride}, expected a multiple of the network's patch size, 2, up to its crop size, 8"
    )
    with pytest.raises(ValueError, match=expected):
        encode_latents(network(), latents, stride)
    with pytest.raises(UserError, match=expected):
        Encoder(network(), PoolingTokenizer(), stride=stride)


def test_less_than_a_crop_of_latents_is_refused(latents: Tensor) -> None:
    with pytest.raises(ValueError, match=r"shape \(4, 21, 7, 8\), expected edges of 8 or more"):
        encode_latents(network(), latents[:, :, :7])


def scan_of(path: Path, size: tuple[int, int, int], affine: np.ndarray | None = None) -> VolumeEntry:
    write_scan(path, size, affine=affine)
    [entry] = find_volumes(path, intensity=RULE).volumes
    return entry


def test_a_scan_is_encoded_whole_and_in_its_place(tmp_path: Path) -> None:
    """In LPS order and of 3 mm along z; what `prepare` makes of it is encoded, and no air is added."""
    affine = np.diag([-1.5, -1.5, 3.0, 1.0])
    affine[:3, 3] = (90.0, 30.0, -24.0)
    entry = scan_of(tmp_path / "scan.nii.gz", (60, 45, 18), affine)
    encoder = Encoder(network(), PoolingTokenizer())
    scan = encoder.encode(entry)
    assert scan.name == "scan"
    assert (scan.content.shape, scan.style.shape) == ((7, 6, 4, 24), (7, 6, 4, 6))
    assert scan.windows == 3 * 2

    volume = load_volume(entry, TransformConfig(min_size=32))
    assert volume.voxels.shape == (60, 48, 36)
    assert volume.voxels[:, 1:-2, :-1].all()
    latents = PoolingTokenizer().encode(volume.image[None])[0]  # (4, 15, 12, 9)
    maps = encode_latents(encoder.model, latents)
    assert torch.equal(scan.content, maps.content)
    torch.testing.assert_close(scan.pooled_content, maps.content.flatten(0, 2).mean(0))
    torch.testing.assert_close(scan.pooled_style, maps.style.flatten(0, 2).mean(0))
    # A patch has 8 voxels of 1.5 mm; the middle of the first lies 3.5 voxels behind the grid's first voxel.
    assert np.allclose(scan.affine[:3, :3], 12 * np.eye(3))
    assert np.allclose(scan.affine[:3, 3], volume.affine[:3, 3] + 3.5 * 1.5)


def test_patches_in_the_middle_have_their_place(tmp_path: Path) -> None:
    entry = scan_of(tmp_path / "scan.nii", (44, 40, 32))
    scan = Encoder(network(replace(CONFIG, patch_size=4)), PoolingTokenizer()).encode(entry)
    assert scan.content.shape == (2, 2, 2, 24)
    # 11, 10 and 8 latent voxels: the patches begin at 1, 1 and 0, of 4 image voxels each, and have 16.
    assert np.allclose(scan.affine[:3, 3], np.array([4 + 7.5, 4 + 7.5, 7.5]) * 1.5)


def test_a_scan_smaller_than_a_crop_is_filled_up_and_its_means_leave_that_out(tmp_path: Path) -> None:
    entry = scan_of(tmp_path / "scan.nii", (40, 12, 9))
    encoder = Encoder(network(), PoolingTokenizer())
    scan = encoder.encode(entry)
    assert scan.content.shape == (5, 4, 4, 24)
    # The scan has the voxels 10 to 22 of 32 along y and 11 to 20 along z: patches 1 and 2 of four.
    shown = scan.content[:, 1:3, 1:3]
    torch.testing.assert_close(scan.pooled_content, shown.flatten(0, 2).mean(0))
    torch.testing.assert_close(scan.pooled_style, scan.style[:, 1:3, 1:3].flatten(0, 2).mean(0))
    assert not torch.allclose(scan.pooled_content, scan.content.flatten(0, 2).mean(0), rtol=1e-3)


def test_a_long_scan_is_not_cut(tmp_path: Path) -> None:
    """`prepare` takes 768 voxels along z; a whole body has more."""
    scan = Encoder(network(), PoolingTokenizer()).encode(scan_of(tmp_path / "scan.nii", (32, 32, 800)))
    assert scan.content.shape[:3] == (4, 4, 100)


def test_latents_of_a_store_give_the_same(tmp_path: Path) -> None:
    entry = scan_of(tmp_path / "scan.nii", (50, 41, 36))
    config = PrepareConfig(transform=TransformConfig(min_size=32), workers=0)
    prepare_volumes([entry], tmp_path / "store", PoolingTokenizer(), config)
    encoder = Encoder(network(), PoolingTokenizer())
    scan = encoder.encode(entry)
    stored = encode_latents(encoder.model, LatentStore.open(tmp_path / "store").read_volume(0))
    torch.testing.assert_close(scan.content, stored.content, rtol=0.02, atol=0.02)  # stored in bfloat16
    torch.testing.assert_close(scan.style, stored.style, rtol=0.02, atol=0.02)


class Damaging(PoolingTokenizer):
    """Fails as some scans make a tokenizer fail."""

    def __init__(self, how: str) -> None:
        self.how = how

    def encode(self, volume: Tensor, *_: object) -> Tensor:
        if self.how == "memory":
            raise torch.OutOfMemoryError("no more")
        return super().encode(volume) * torch.nan


@pytest.mark.parametrize(
    ("how", "reason"),
    [("memory", "does not fit into the memory of cpu: no more"), ("nan", "its latents are not finite")],
)
def test_a_scan_that_can_not_be_encoded_is_named(tmp_path: Path, how: str, reason: str) -> None:
    entry = scan_of(tmp_path / "scan.nii", (32, 32, 32))
    with pytest.raises(VolumeError, match=f"scan.nii: {reason}"):
        Encoder(network(), Damaging(how)).encode(entry)


def test_a_tokenizer_of_other_channels_is_refused() -> None:
    with pytest.raises(UserError, match="pooling-1 makes latents of 4 channels, the network takes 3"):
        Encoder(network(replace(CONFIG, in_channels=3)), PoolingTokenizer())


def test_weights_of_every_kind_give_the_same_network(tmp_path: Path) -> None:
    model = network()
    own, reference, published = (
        tmp_path / name for name in ("own", "reference.safetensors", "published.pth")
    )
    export_model(model, own)
    export_model(model, reference, "reference")
    torch.save({"model": model.to_reference()}, published)
    for path in (own, own / "model.safetensors", reference, published):
        encoder = Encoder.load(path, EncodeConfig(device="cpu"))
        assert encoder.about["tokenizer_from"] == "the built-in one, as no run's store is known"
        assert encoder.tokenizer.identity.startswith("builtin-")
        assert encoder.model.config == CONFIG
        for name, value in model.to_reference().items():
            assert torch.equal(encoder.model.state_dict()[name], value), (path, name)
    export_model(model, tmp_path / "vit", "monai-vit")
    with pytest.raises(UserError, match="the names are MONAI's"):
        Encoder.load(tmp_path / "vit")


def test_a_run_brings_its_last_teacher_its_tokenizer_and_its_spacing(
    tmp_path: Path, make_run: Callable[..., Path]
) -> None:
    spec = str(tmp_path / "tokenizer.safetensors")
    identity = write_tokenizer(Path(spec))
    run = make_run(identity, spec, spacing=2.0)
    encoder = Encoder.load(str(run))
    weights = run / "checkpoints" / "12" / "teacher.safetensors"
    assert encoder.record() == {
        "tokenizer": identity,
        "tokenizer_from": f"that of {tmp_path / 'store'}",
        "weights": str(weights),
        "weights_sha256": file_sha256(weights),
        "spacing": "2",
        "crop": "8",
        "patch": "2",
        "stride": "4",
    }
    (run / "checkpoints" / "4" / "teacher.safetensors").write_bytes(weights.read_bytes())
    assert Encoder.load(run / "checkpoints" / "4" / "teacher.safetensors").tokenizer.identity == identity
    assert Encoder.load(run, EncodeConfig(tokenizer=spec, spacing=1.0)).transform.spacing == 1.0
    with pytest.raises(
        UserError, match=rf"'builtin' is builtin-\w+, .* on latents of {identity} \(.*store\)"
    ):
        Encoder.load(run, EncodeConfig(tokenizer="builtin"))
    write_tokenizer(Path(spec), seed=1)
    with pytest.raises(UserError, match=rf"tokenizer '{spec}' is trained-\w+, .* on latents of {identity}"):
        Encoder.load(run)


def test_a_run_without_its_store_gets_the_built_in_tokenizer(
    tmp_path: Path, make_run: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run("test", "test")
    (tmp_path / "store").rename(tmp_path / "moved")
    encoder = Encoder.load(run)
    assert "warning: the tokenizer is the built-in one" in capsys.readouterr().err
    assert encoder.about["tokenizer_from"] == f"the built-in one, as {tmp_path / 'store'} is not there"
    assert encoder.transform.spacing == 1.5


def test_imported_latents_do_not_tell_their_tokenizer(make_run: Callable[..., Path]) -> None:
    run = make_run("reference-cache", "reference-cache")
    with pytest.raises(UserError, match=r"store: its latents were imported, .* with --tokenizer"):
        Encoder.load(run)
    assert Encoder.load(run, EncodeConfig(tokenizer="builtin")).about["tokenizer_from"] == "as asked for"


def test_data_offers_its_door_and_begins_without_torch() -> None:
    import meduet_fast.data
    from meduet_fast.data import store

    assert meduet_fast.data.LatentStore is store.LatentStore
    with pytest.raises(AttributeError, match=r"module 'meduet_fast\.data' has no attribute 'LatentSore'"):
        meduet_fast.data.LatentSore  # noqa: B018
    program = "import sys; from meduet_fast.data import find_volumes; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
