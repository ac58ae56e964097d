"""The transformer that makes latents, beside its formulas written out; what it starts as."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

pytest.importorskip("diffusers", reason="diffusers is not installed")

from .latent_networks import INPUTS, TRANSFORMERS, inputs, network

GOLDEN = Path(__file__).parents[1] / "golden" / "synthesis_transformer_tiny.safetensors"


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_blocks_start_as_the_identity(name: str) -> None:
    x, conditions = torch.randn(2, 5, 12), torch.randn(3, 2, 12)
    for block in network(name, started=False).transformer_blocks():
        assert torch.equal(block(x, *conditions), x)


def gelu(x: Tensor, exact: bool) -> Tensor:
    if exact:
        return x * (1 + torch.erf(x / math.sqrt(2))) / 2
    return x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2


def normed(x: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()


def silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


def plain(state: dict[str, Tensor], tokens: bool, arguments: list[Tensor]) -> Tensor:
    """Compute the whole network by its formulas, in float64."""
    w = {name: value.double() for name, value in state.items()}
    sample, times, content, style, drop_content, drop_style = arguments

    def linear(name: str, x: Tensor) -> Tensor:
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def embed(name: str, factor: Tensor, drop: Tensor) -> Tensor:
        rows = [w[f"{name}.null"] if gone else row for row, gone in zip(factor, drop, strict=True)]
        unit = torch.stack([row / row.square().sum().sqrt() for row in rows])
        return linear(f"{name}.proj", silu(unit / max(w[f"{name}.temperature"].item(), 0.01)))

    x = F.conv3d(sample.double(), w["patch_embed.weight"], w["patch_embed.bias"], stride=2)
    grid = x.shape[2:]
    x = x.flatten(2).transpose(1, 2)
    places = [(i, j, k) for i in range(grid[0]) for j in range(grid[1]) for k in range(grid[2])]
    waves = [10000 ** -(i / 2) for i in range(2)]
    x = x + torch.tensor(
        [[f(c * v) for c in place for f in (math.sin, math.cos) for v in waves] for place in places]
    )
    speeds = [10000 ** -(i / 128) for i in range(128)]
    time = torch.tensor([[f(t * v) for f in (math.cos, math.sin) for v in speeds] for t in times.tolist()])
    time = linear("time_embed.fc2", silu(linear("time_embed.fc1", time.double())))
    content = (content - w["content_mean"]) / w["content_deviation"]
    if tokens:
        narrow = linear("content_map.proj", content).flatten(1, 3)
        narrow[drop_content] = w["content_map.null"]
        x = x + linear("content_tokens", narrow)
        content = narrow.mean(1)
    e_c = embed("content_embed", content, drop_content)
    e_s = embed("style_embed", (style - w["style_mean"]) / w["style_deviation"], drop_style)
    for n in range(3):
        name = f"blocks.{n}"
        b1, a1, b2, a2 = (
            linear(f"{name}.modulation_content", e_c) + linear(f"{name}.modulation_style", e_s)
        )[:, None].split(12, -1)
        g1, g2 = linear(f"{name}.gates.1", silu(time))[:, None].split(12, -1)
        q, k, v = linear(f"{name}.attn.qkv", normed(x) * (1 + a1) + b1).split(12, -1)
        heads = []
        for h in (slice(0, 6), slice(6, 12)):
            queries, keys = q[..., h], k[..., h]
            if tokens:
                queries, keys = (
                    y
                    / (y.square().mean(-1, keepdim=True) + 1e-6).sqrt()
                    * w[f"{name}.attn.{which}_norm.weight"]
                    for y, which in ((queries, "q"), (keys, "k"))
                )
            weights = torch.exp(queries @ keys.transpose(1, 2) / math.sqrt(6))
            heads.append(weights / weights.sum(-1, keepdim=True) @ v[..., h])
        x = x + g1 * linear(f"{name}.attn.proj", torch.cat(heads, -1))
        hidden = gelu(linear(f"{name}.mlp.fc1", normed(x) * (1 + a2) + b2), exact=tokens)
        x = x + g2 * linear(f"{name}.mlp.fc2", hidden)
    b, a = linear("final.modulation.1", silu(time + e_c + e_s))[:, None].split(12, -1)
    patches = linear("final.linear", normed(x) * (1 + a) + b)
    out = torch.empty(len(sample), 3, *sample.shape[2:], dtype=torch.float64)
    for token, (i, j, k) in enumerate(places):
        cube = patches[:, token].reshape(-1, 2, 2, 2, 3)  # (B, px, py, pz, C)
        out[:, :, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2, 2 * k : 2 * k + 2] = cube.permute(0, 4, 1, 2, 3)
    return out


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_it_computes_its_formulas(name: str) -> None:
    model = network(name).double()
    arguments = [item.double() if item.is_floating_point() else item for item in inputs(name)]
    expected = plain(model.state_dict(), "tokens" in name, arguments)
    torch.testing.assert_close(model(*arguments), expected, rtol=1e-6, atol=1e-6)  # positions are float32


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_it_computes_what_it_always_did(name: str) -> None:
    golden = load_file(GOLDEN)
    model = network(name, started=False)
    model.load_state_dict({key: golden[f"{name}/weights/{key}"] for key in model.state_dict()})
    out = model(*(golden[f"{name}/input/{key}"] for key in INPUTS))
    torch.testing.assert_close(out, golden[f"{name}/out"].float(), rtol=1e-4, atol=1e-4)
