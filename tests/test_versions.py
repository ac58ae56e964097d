"""The supported range is checked at import, with a message that says what was found."""

from __future__ import annotations

import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import meduet_fast


@pytest.mark.parametrize("torch_version", ["2.11.0", "2.13.0+cpu", "2.15.3"])
@pytest.mark.parametrize("python", [(3, 10), (3, 13)])
def test_supported(python: tuple[int, int], torch_version: str) -> None:
    meduet_fast._check_versions(python, torch_version)


@pytest.mark.parametrize("torch_version", ["2.10.1", "2.16.0", "3.0.0", "1.13.1"])
def test_other_torch_releases_are_refused(torch_version: str) -> None:
    with pytest.raises(ImportError, match=rf"supports torch 2\.11 to 2\.15, found {torch_version}"):
        meduet_fast._check_versions((3, 11), torch_version)


@pytest.mark.parametrize("python", [(3, 9), (3, 14)])
def test_other_pythons_are_refused(python: tuple[int, int]) -> None:
    with pytest.raises(ImportError, match=rf"supports Python 3\.10 to 3\.13, found 3\.{python[1]}"):
        meduet_fast._check_versions(python, "2.13.0")


@pytest.mark.parametrize("missing", ["torch", "triton"])
def test_import_without(missing: str) -> None:
    """Without torch the message says so; without triton everything imports and runs eagerly."""
    code = f"""
import sys
sys.modules[{missing!r}] = None
try:
    import meduet_fast
except ImportError as error:
    print("refused:", error)
else:
    import torch
    from meduet_fast.models import MeDUET, MeDUETConfig
    assert "torch._dynamo" not in sys.modules, "a second at every start"
    model = MeDUET(MeDUETConfig(embed_dim=12, depth=1, num_heads=2, decoder_embed_dim=12, decoder_depth=1,
                   decoder_num_heads=2, latent_size=8))
    print("content", tuple(model(torch.zeros(1, 4, 8, 8, 8)).content.shape))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    )
    expected = {
        "torch": "refused: meduet_fast needs torch 2.11 to 2.15, and torch is not installed",
        "triton": "content (1, 8, 12)",
    }
    assert done.stdout.strip() == expected[missing]


@pytest.mark.parametrize("metadata", ["", "Metadata-Version: 2.1\nName: torch\n"])
def test_metadata_without_a_version_do_not_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, metadata: str
) -> None:
    """As an installation that was broken off leaves behind."""
    (tmp_path / "torch-9.dist-info").mkdir()
    (tmp_path / "torch-9.dist-info" / "METADATA").write_text(metadata)
    monkeypatch.syspath_prepend(tmp_path)
    # Asked of torch itself, and not of the whole installation further on the path.
    assert runpy.run_path(meduet_fast.__file__)["_torch_version"] is torch.__version__
