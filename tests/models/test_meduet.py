"""The network outside of parity: saving, loading, compiling, precision, sizes that do not fit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from meduet_fast.errors import UserError
from meduet_fast.models import MeDUET, MeDUETConfig
from meduet_fast.pretraining import pretraining_losses, random_mix_mask

SMALL = MeDUETConfig(
    latent_size=8, patch_size=2, embed_dim=24, depth=1, num_heads=2, decoder_embed_dim=12, decoder_depth=1,
    decoder_num_heads=2, num_domains=3,
)  # fmt: skip


def test_the_published_size() -> None:
    with torch.device("meta"):
        model = MeDUET()
    assert sum(item.numel() for item in model.parameters()) == pytest.approx(105e6, rel=0.01)
    assert (model.config.num_tokens, model.config.style_dim, model.config.token_dim) == (216, 192, 256)


def test_encoding_shapes() -> None:
    factors = MeDUET(SMALL)(torch.randn(3, 4, 8, 8, 8))
    assert [tuple(part.shape) for part in factors] == [(3, 1, 24), (3, 64, 24), (3, 64, 6)]


def test_save_and_load(tmp_path: Path) -> None:
    model = MeDUET(SMALL)
    model.save_pretrained(tmp_path / "model.safetensors")
    loaded = MeDUET.from_pretrained(tmp_path / "model.safetensors")
    assert loaded.config == SMALL
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), loaded.state_dict().values()))  # noqa: B905


def test_files_that_are_no_model_are_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    with pytest.raises(UserError, match=r"model\.safetensors"):
        MeDUET.from_pretrained(path)
    path.write_bytes(b"not a model at all")
    with pytest.raises(UserError, match=r"model\.safetensors: text \('not a model at all'\)"):
        MeDUET.from_pretrained(path)
    MeDUET(SMALL).save_pretrained(path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match="a damaged or cut-off safetensors file"):
        MeDUET.from_pretrained(path)
    from safetensors.torch import save_file

    save_file({"x": torch.zeros(1)}, path)
    with pytest.raises(UserError, match="not a MeDUET model"):
        MeDUET.from_pretrained(path)


def test_sizes_that_do_not_fit() -> None:
    for wrong, message in (
        ({"patch_size": 5}, "latent_size 24 is not a multiple of patch_size 5"),
        ({"latent_size": 12}, "27 tokens, expected an even number"),
        ({"num_heads": 7}, "embed_dim 768 is not a multiple of num_heads 7"),
        ({"embed_dim": 32, "num_heads": 4}, "embed_dim 32 is not a multiple of 6"),
        ({"depth": 0}, "depth: found 0, expected more than 0"),
        ({"style_ratio": 1e-9}, "leaves no style"),
    ):
        with pytest.raises(ValueError, match=message):
            MeDUETConfig(**wrong)  # type: ignore[arg-type]


def test_losses_under_bf16_autocast_stay_close() -> None:
    torch.manual_seed(0)
    student, teacher = MeDUET(SMALL), MeDUET(SMALL)
    latents, domain = torch.randn(4, 4, 8, 8, 8), torch.tensor([0, 1, 2, 0])
    mask = random_mix_mask(4, 64, torch.Generator().manual_seed(0))
    exact = pretraining_losses(student, teacher, latents, domain, mask)
    with torch.autocast("cpu", torch.bfloat16):
        narrow = pretraining_losses(student, teacher, latents, domain, mask)
    for name, loss in narrow.items():
        assert loss.dtype == torch.float32, name
        assert loss.item() == pytest.approx(exact[name].item(), rel=0.02), name
    narrow["total"].backward()
    assert all(torch.isfinite(item.grad).all() for item in student.parameters() if item.grad is not None)


@pytest.mark.slow
def test_the_whole_objective_compiles_without_graph_breaks() -> None:
    torch.manual_seed(0)
    student, teacher = MeDUET(SMALL), MeDUET(SMALL).requires_grad_(False)
    latents, domain = torch.randn(4, 4, 8, 8, 8), torch.tensor([0, 1, 2, 0])
    mask = random_mix_mask(4, 64, torch.Generator().manual_seed(0))
    compiled = torch.compile(pretraining_losses, fullgraph=True, backend="aot_eager")
    expected = pretraining_losses(student, teacher, latents, domain, mask)
    found = compiled(student, teacher, latents, domain, mask, None, check_values=False)
    for name, loss in found.items():
        assert loss.item() == pytest.approx(expected[name].item(), rel=1e-5), name
    found["total"].backward()
    assert student.cls_token.grad is not None
