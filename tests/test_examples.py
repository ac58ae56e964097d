"""The examples run as their first lines say."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

from meduet_fast.autoencoder import load_tokenizer
from meduet_fast.data.sources import find_volumes
from meduet_fast.data.transforms import TransformConfig, load_volume
from meduet_fast.models import MeDUET, MeDUETConfig

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


def run(name: str, *arguments: object) -> str:
    command = [sys.executable, str(EXAMPLES / name), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_encode_scan(tmp_path: Path) -> None:
    """A scan of two crops, in LPS order and 3 mm along z; one crop is encoded by hand."""
    rng = np.random.default_rng(0)
    voxels = rng.uniform(-100, 200, (60, 30, 16)).astype(np.float32)
    affine = np.diag([-1.5, -1.5, 3.0, 1.0])
    affine[:3, 3] = (90.0, 30.0, -24.0)
    scan = tmp_path / "scan.nii.gz"
    nib.nifti1.save(nib.nifti1.Nifti1Image(voxels, affine), scan)

    config = MeDUETConfig(
        latent_size=8, patch_size=2, embed_dim=24, depth=1, num_heads=2, decoder_embed_dim=12,
        decoder_depth=1, decoder_num_heads=2, num_domains=2,
    )  # fmt: skip
    model = MeDUET(config).eval()
    model.save_pretrained(tmp_path / "exported" / "model.safetensors")
    printed = run("encode_scan.py", scan, "--model", tmp_path / "exported", "--output", tmp_path / "scan.npz")
    assert "content (8, 4, 4, 24), style (8, 4, 4, 6)" in printed

    found = np.load(tmp_path / "scan.npz")
    [entry] = find_volumes(scan).volumes
    volume = load_volume(entry, TransformConfig(max_size=(64, 32, 32), min_size=32, multiple=32))
    with torch.inference_mode():
        latents = load_tokenizer().encode(volume.image[None])
        factors = model(latents[:, :, 8:16])
    for name, expected in (("content", factors.content), ("style", factors.style)):
        torch.testing.assert_close(
            torch.from_numpy(found[name][4:].copy()),
            expected[0].unflatten(0, (4, 4, 4)),
            rtol=1e-4,
            atol=1e-5,
        )
    # Patches are 8 voxels of 1.5 mm; the last one's centre lies 3.5 voxels before the grid's last voxel.
    assert np.allclose(np.abs(np.diag(found["affine"]))[:3], 12.0)
    last_patch, last_voxel = found["affine"] @ [7, 3, 3, 1], volume.affine @ [63, 31, 31, 1]
    assert np.allclose(last_voxel - last_patch, [5.25, 5.25, 5.25, 0])


@pytest.mark.slow
def test_fast_layers() -> None:
    pytest.importorskip("einops")
    printed = run("fast_layers.py", "--batch", 1, "--width", 48, "--layers", 2, "--calls", 2)
    assert "patch_embedding: monai.networks.blocks.patchembedding.PatchEmbeddingBlock -> " in printed
    assert "blocks.1.attn: monai.networks.blocks.selfattention.SABlock -> " in printed
    assert "outputs equal" in printed
    assert "ms after" in printed
