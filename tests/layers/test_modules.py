"""The modules: as the functions that they hold, and as PyTorch's."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import nn

from meduet_fast.kernels import mix_tokens, quadruplet_contrast
from meduet_fast.layers import PatchEmbed3d, QuadrupletContrast, TokenMixer, sincos_positions_3d
from meduet_fast.models import MeDUET, MeDUETConfig
from meduet_fast.models.blocks import sincos_positions


def test_patch_embedding_loads_a_convolution() -> None:
    conv = nn.Conv3d(2, 12, (2, 3, 4), (2, 3, 4))
    embed = PatchEmbed3d(in_channels=2, hidden_size=12, patch_size=(2, 3, 4), num_prefix_tokens=1)
    embed.load_state_dict(conv.state_dict())
    x = torch.randn(2, 2, 4, 6, 8)
    tokens = embed(x)
    assert torch.allclose(tokens[:, 1:], conv(x).flatten(2).transpose(1, 2), atol=1e-6)
    assert (tokens[:, 0] == 0).all()
    torch.manual_seed(0)
    first = PatchEmbed3d(2, 12, 2)
    torch.manual_seed(0)
    assert torch.equal(first.weight, nn.Conv3d(2, 12, 2, 2).weight)


def test_patch_embedding_adds_positions() -> None:
    x = torch.randn(2, 1, 4, 2, 6)
    plain, fixed, learnt = (
        PatchEmbed3d(1, 12, 2, img_size=(4, 2, 6), position=position, bias=False)  # type: ignore[arg-type]
        for position in ("none", "sincos", "learnable")
    )
    for embed in (fixed, learnt):
        embed.load_state_dict(plain.state_dict(), strict=False)
        assert torch.allclose(embed(x), plain(x) + embed.position, atol=1e-6)
    assert list(fixed.state_dict()) == ["weight"]
    assert list(learnt.state_dict()) == ["weight", "position"]
    learnt(x).sum().backward()
    assert learnt.position.grad is not None
    mask = torch.rand(2, 6) < 0.5
    assert torch.allclose(fixed(x, mask), mix_tokens(fixed(x), mask), atol=1e-6)
    with pytest.raises(ValueError, match="position"):
        fixed(torch.randn(2, 1, 4, 4, 6))


@pytest.mark.parametrize("way", ["to_empty", "assign", "context", "reset", "moved", "again"])
def test_positions_survive_the_meta_device(way: str) -> None:
    options: dict[str, Any] = {"img_size": (4, 2, 6), "position": "sincos", "dtype": torch.float64}
    real = PatchEmbed3d(1, 12, 2, **options)
    with torch.device("meta" if way == "context" else "cpu"):
        on = "cpu" if way == "again" else None if way == "context" else "meta"
        late = nn.Sequential(PatchEmbed3d(1, 12, 2, **options, device=on))
        if way == "moved":
            late.half().double()
        if way not in ("assign", "context"):
            late.to_empty(device="cpu")
        if way == "reset":
            late[0].position.zero_()
            late[0].reset_parameters()
        state = {f"0.{key}": value for key, value in real.state_dict().items()}
        late.load_state_dict(state, assign=way in ("assign", "context"))
    x = torch.randn(1, 1, 4, 2, 6, dtype=torch.float64)
    assert late[0].position.dtype == torch.float64
    assert torch.equal(late(x), real(x))
    assert torch.equal(copy.deepcopy(late).to(torch.float32)[0].position, real.position.float())


def test_model_on_the_meta_device() -> None:
    config = MeDUETConfig(
        latent_size=4, patch_size=2, embed_dim=24, depth=1, num_heads=2, decoder_embed_dim=24,
        decoder_depth=1, decoder_num_heads=2, num_domains=2,
    )  # fmt: skip
    torch.manual_seed(0)
    real = MeDUET(config)
    with torch.device("meta"):
        late = MeDUET(config)
    late.to_empty(device="cpu")
    for tensor in [*late.parameters(), *late.buffers()]:
        tensor.detach().fill_(float("nan"))
    late.reset_parameters()
    assert torch.equal(late.pos_embed, real.pos_embed)
    assert torch.equal(late.siqc_log_scale, real.siqc_log_scale)
    assert all(tensor.isfinite().all() for tensor in [*late.parameters(), *late.buffers()])
    late.load_state_dict(real.state_dict())
    x = torch.randn(2, 4, 4, 4, 4)
    assert all(map(torch.equal, late(x), real(x)))


def test_positions_are_the_models() -> None:
    assert torch.equal(sincos_positions_3d(24, (3, 3, 3)), sincos_positions(24, 3)[0, 1:])
    table = sincos_positions_3d(6, (2, 3, 1)).view(2, 3, 6)
    assert torch.allclose(table[1, 2, [0, 1]], torch.tensor([math.sin(1), math.cos(1)]))
    assert torch.allclose(table[1, 2, [2, 3]], torch.tensor([math.sin(2), math.cos(2)]))


def test_contrast() -> None:
    queries, keys = torch.randn(8, 6), torch.randn(8, 6)
    contrast = QuadrupletContrast("style", temperature=0.1)
    expected = quadruplet_contrast(queries, keys, torch.tensor(math.log(10)), "style")
    assert torch.allclose(contrast(queries, keys), expected)
    contrast(queries, keys).backward()
    assert contrast.log_scale.grad is not None
    assert not QuadrupletContrast("content", learnable=False).log_scale.requires_grad


@pytest.mark.parametrize("num_second", [None, 2])
def test_mixer(num_second: int | None) -> None:
    mixer = TokenMixer(num_second)
    mask = torch.rand(2, 6).argsort(1) < (num_second or 3)
    x = torch.randn(2, 6, 4)
    mixed = mixer(x, mask)
    assert torch.equal(mixed, torch.where(mask[..., None], x.flip(0), x))
    own, other = mixer.demix(mixed, mask)
    assert other.shape == (2, num_second or 3, 4)
    assert torch.equal(own[0], x[0, ~mask[0]])
    assert torch.equal(other[0], x[1, mask[0]])
    assert torch.equal(mixer.remix(own, other, mask), mixed)


def test_refusals() -> None:
    with pytest.raises(ValueError, match="position is 'fourier'"):
        PatchEmbed3d(1, 12, 2, position="fourier")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="img_size is None"):
        PatchEmbed3d(1, 12, 2, position="sincos")
    with pytest.raises(ValueError, match="width is 8"):
        PatchEmbed3d(1, 8, 2, img_size=4, position="sincos")
    with pytest.raises(ValueError, match="spatial axis 0 has size 5"):
        PatchEmbed3d(1, 12, 2, img_size=5, position="learnable")
    with pytest.raises(ValueError, match="identity is 'organ'"):
        QuadrupletContrast("organ")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="temperature is 0"):
        QuadrupletContrast("style", temperature=0)
