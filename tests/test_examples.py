"""The examples run as their first lines say."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from meduet_fast.data import find_volumes
from meduet_fast.encoding import Encoder
from meduet_fast.models import MeDUET, MeDUETConfig

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """``run("encode_scan.py", argument, ...)`` gives what it prints."""

    def of(name: str, *arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    return of


def test_encode_scan(tmp_path: Path, run: Callable[..., str]) -> None:
    """Maps lie where the scan's tokens do, and have their greatest variances."""
    voxels = np.random.default_rng(0).uniform(-100, 200, (60, 40, 16)).astype(np.float32)
    scan = tmp_path / "scan.nii.gz"
    nib.nifti1.save(nib.nifti1.Nifti1Image(voxels, np.diag([-1.5, -1.5, 3.0, 1.0])), scan)
    config = MeDUETConfig(
        latent_size=8, patch_size=2, embed_dim=24, depth=1, num_heads=2, decoder_embed_dim=12,
        decoder_depth=1, decoder_num_heads=2, num_domains=2,
    )  # fmt: skip
    MeDUET(config).save_pretrained(tmp_path / "exported" / "model.safetensors")
    printed = run("encode_scan.py", tmp_path / "exported", scan, "--output", tmp_path / "maps")
    [entry] = find_volumes(scan).volumes
    expected = Encoder.load(tmp_path / "exported").encode(entry)
    for kind, tokens in (("content", expected.content), ("style", expected.style)):
        assert f"scan_{kind}.nii.gz: (140, {tokens.shape[3]}) tokens" in printed
        found = nib.nifti1.load(tmp_path / "maps" / f"scan_{kind}.nii.gz")
        assert found.shape == (7, 5, 4, 3)
        assert np.allclose(found.affine, expected.affine)
        variances = np.cov(found.get_fdata().reshape(-1, 3).T)
        assert np.allclose(variances, np.diag(np.diag(variances)), atol=1e-3 * variances[0, 0])
        greatest = np.linalg.eigvalsh(np.cov(tokens.flatten(0, 2).double().numpy().T))[::-1][:3]
        assert np.allclose(np.diag(variances), greatest, rtol=1e-2)


def test_fast_layers(run: Callable[..., str]) -> None:
    pytest.importorskip("einops")
    printed = run("fast_layers.py", "--batch", 1, "--width", 48, "--layers", 2, "--calls", 2)
    assert "patch_embedding: monai.networks.blocks.patchembedding.PatchEmbeddingBlock -> " in printed
    assert "blocks.1.attn: monai.networks.blocks.selfattention.SABlock -> " in printed
    assert "outputs equal" in printed
    assert "ms after" in printed
