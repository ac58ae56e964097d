"""Networks that begin with a pretrained encoder: equal block by block, whatever the weights come from."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

pytest.importorskip("diffusers", reason="diffusers is not installed")

from meduet_fast.engine.dry_run import format_rows
from meduet_fast.errors import UserError
from meduet_fast.files import file_sha256
from meduet_fast.models import MeDUET, MeDUETConfig
from meduet_fast.models.conditioning import linear_prediction
from meduet_fast.models.export import export_model
from meduet_fast.models.transformer3d import MeDUETTransformer3D
from meduet_fast.models.unet3d import MeDUETUNet3D
from meduet_fast.synthesis.transfer import transfer

GOLDEN = Path(__file__).parents[1] / "golden" / "meduet_reference_tiny.safetensors"
ENCODER = MeDUETConfig(
    latent_size=8, patch_size=2, embed_dim=24, depth=3, num_heads=2, decoder_embed_dim=12, decoder_depth=1,
    decoder_num_heads=1, num_domains=3,
)  # fmt: skip
TOLERANCES = {torch.float32: 1e-5, torch.float64: 1e-10}


def make_encoder(config: MeDUETConfig = ENCODER, dtype: torch.dtype = torch.float32) -> MeDUET:
    """An encoder none of whose weights, of norms among them, is what it was at first."""
    torch.manual_seed(1)
    encoder = MeDUET(config).requires_grad_(False)
    for parameter in encoder.parameters():
        parameter.add_(0.2 * torch.randn_like(parameter))
    return encoder.to(dtype)


def make_network(encoder: MeDUETConfig = ENCODER, **changes: Any) -> MeDUETTransformer3D:
    """A network of the encoder's sizes, for latents whose channels differ in mean and deviation."""
    torch.manual_seed(2)
    settings = {
        "in_channels": encoder.in_channels, "sample_size": (encoder.latent_size,) * 3,
        "content_dim": encoder.embed_dim, "style_dim": encoder.style_dim,
        "latents_mean": (0.5, -1.0, 0.0, 0.2), "latents_std": (1.8, 0.3, 0.4, 0.25),
        "patch_size": encoder.patch_size, "hidden_size": encoder.embed_dim, "depth": encoder.depth,
        "num_heads": encoder.num_heads, "mlp_ratio": encoder.mlp_ratio, "gelu": "exact",
    }  # fmt: skip
    return MeDUETTransformer3D(**settings | changes).requires_grad_(False)


def make_unet(**changes: Any) -> MeDUETUNet3D:
    """A U-Net whose first level has the encoder's patches and width, and attention."""
    torch.manual_seed(2)
    settings = {
        "in_channels": 4, "sample_size": (8, 8, 8), "content_dim": 24, "style_dim": 6,
        "latents_mean": (0.5, -1.0, 0.0, 0.2), "latents_std": (1.8, 0.3, 0.4, 0.25),
        "patch_size": 2, "num_channels": (24, 36), "num_res_blocks": 1, "attention_levels": (True, True),
        "num_heads": 2, "norm_num_groups": 12, "features_patch": 2,
    }  # fmt: skip
    return MeDUETUNet3D(**settings | changes).requires_grad_(False)


def through_blocks(network: MeDUETTransformer3D, x: Tensor, number: int | None = None) -> Tensor:
    """Tokens (B, L, W) after one of the blocks, or all, with open gates and without modulation."""
    conditions = torch.randn(3, len(x), x.shape[2], dtype=x.dtype)  # (3, B, W)
    for block in network.blocks if number is None else [network.blocks[number]]:
        nn.init.ones_(block.gates[1].bias)
        x = block(x, *conditions)
    return x


def normalised(network: MeDUETTransformer3D | MeDUETUNet3D, latents: Tensor) -> Tensor:
    mean, deviation = (
        torch.tensor(values, dtype=latents.dtype).view(-1, 1, 1, 1)
        for values in (network.config.latents_mean, network.config.latents_std)
    )
    return (latents - mean) / deviation


def save_run(encoder: MeDUET, folder: Path) -> Path:
    for step in (5, 40):
        (folder / "checkpoints" / str(step)).mkdir(parents=True)
    MeDUET(encoder.config).save_pretrained(folder / "checkpoints" / "5" / "teacher.safetensors")
    save_checkpoint(encoder, folder / "checkpoints" / "40")
    return folder


def save_checkpoint(encoder: MeDUET, folder: Path) -> Path:
    encoder.save_pretrained(folder / "teacher.safetensors")
    return folder / "teacher.safetensors"


def save_published(encoder: MeDUET, folder: Path) -> Path:
    """As the published code saves it, from a compiled network under DDP, an optimizer beside it."""
    state = {f"module._orig_mod.{key}": value for key, value in encoder.to_reference().items()}
    moments = {"state": {0: {"exp_avg": torch.zeros(5)}}}
    file = folder / "checkpoint_7.pth"
    torch.save({"model": state, "optimizer": moments, "num_heads": encoder.config.num_heads}, file)
    return file


SOURCES: dict[str, Callable[[MeDUET, Path], Path]] = {
    "run": save_run,
    "checkpoint": save_checkpoint,
    "meduet": lambda encoder, folder: export_model(encoder, folder / "export")[0].parent,
    "reference": lambda encoder, folder: export_model(encoder, folder / "a.safetensors", "reference")[0],
    "published": save_published,
}


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_transferred_blocks_equal_the_pretrained(dtype: torch.dtype, tmp_path: Path) -> None:
    """Each alone, the patch embedding on normalised latents, and all together."""
    encoder, network = make_encoder(dtype=dtype), make_network().to(dtype)
    transfer(network, save_checkpoint(encoder, tmp_path))
    close = {"rtol": 0, "atol": TOLERANCES[dtype]}
    x = torch.randn(2, 7, 24, dtype=dtype)  # (B, L, W)
    for number, block in enumerate(encoder.blocks):
        torch.testing.assert_close(through_blocks(network, x, number), block(x), **close)  # type: ignore[arg-type]

    latents = 2 * torch.randn(2, 4, 8, 8, 8, dtype=dtype) + 1
    tokens = encoder.embed(latents)[:, 1:]  # (B, L, W)
    own = network.patch_embed(normalised(network, latents))  # (B, L, W)
    torch.testing.assert_close(own, tokens, **close)  # type: ignore[arg-type]
    for block in encoder.blocks:
        tokens = block(tokens)
    torch.testing.assert_close(through_blocks(network, own), tokens, rtol=TOLERANCES[dtype], atol=1e-5)


def test_closed_gates_make_every_block_the_identity(tmp_path: Path) -> None:
    """What is transferred acts when the gates open."""
    network = make_network()
    transfer(network, save_checkpoint(make_encoder(), tmp_path))
    x, conditions = torch.randn(2, 7, 24), torch.randn(3, 2, 24)
    assert torch.equal(network.blocks[0](x, *conditions), x)


def test_what_the_published_code_encoded(tmp_path: Path) -> None:
    """Its own output, from its own weights, by the network's blocks with CLS and the last norm added."""
    with safe_open(GOLDEN, "pt") as file:
        settings = json.loads(file.metadata()["config"])
        golden = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    student = {name.removeprefix("student/"): x for name, x in golden.items() if name.startswith("student/")}
    torch.save({"model": student, "config": settings}, tmp_path / "published.pth")
    encoder = MeDUET.from_reference(tmp_path / "published.pth").requires_grad_(False)
    network = make_network(encoder.config)
    found = transfer(network, tmp_path / "published.pth")
    assert not found.heads_assumed
    tokens = network.patch_embed(normalised(network, golden["input/x"]))  # (B, L, W)
    cls = encoder.embed(golden["input/x"])[:, :1]  # (B, 1, W)
    encoded = encoder.norm(through_blocks(network, torch.cat([cls, tokens], 1)))  # (B, 1+L, W)
    factors = encoder.factorize(encoded)
    for name, factor in (("content", factors.content), ("style", factors.style), ("cls", factors.cls)):
        expected = golden[f"out/encode_full_{name}"]
        assert (factor - expected).norm() < 1e-5 * expected.norm(), name


@pytest.mark.parametrize("source", SOURCES)
def test_every_source_gives_the_same(source: str, tmp_path: Path) -> None:
    encoder = make_encoder()
    expected, network = make_network(), make_network()
    (tmp_path / "plain").mkdir()
    transfer(expected, save_checkpoint(encoder, tmp_path / "plain"))
    found = transfer(network, SOURCES[source](encoder, tmp_path))
    assert found.file.is_file()
    record = found.record()
    assert (record["path"], record["sha256"]) == (str(found.file), file_sha256(found.file))
    assert (record["part"], record["blocks"]) == ("model." if source == "published" else "", 3)
    own = network.state_dict()
    assert all(torch.equal(value, own[name]) for name, value in expected.state_dict().items())
    assert {"optimizer.state.0.exp_avg"} & found.unused.keys() == (
        {"optimizer.state.0.exp_avg"} if source == "published" else set()
    )


def test_every_tensor_of_both_sides_is_listed(tmp_path: Path) -> None:
    encoder, network, before = make_encoder(), make_network(), make_network().state_dict()
    found = transfer(network, save_checkpoint(encoder, tmp_path))
    own = network.state_dict()
    kinds = [set(found.copied), set(found.folded), set(found.new)]
    assert set.union(*kinds) == set(own)
    assert sum(map(len, kinds)) == len(own)
    changed = {name for name, value in own.items() if not torch.equal(value, before[name])}
    assert changed == kinds[0] | kinds[1]
    assert found.taken.keys() | found.unused.keys() == encoder.state_dict().keys()
    assert not found.taken.keys() & found.unused.keys()
    # Two embeddings; of every block four maps of two tensors, half of them behind a norm of two.
    assert (len(found.copied), len(found.folded), len(found.taken)) == (3 * 4, 2 + 3 * 4, 2 + 3 * 12)
    assert found.record()["tensors"] == {
        "copied": 12, "folded": 14, "new": len(own) - 26, "taken": 38, "unused": len(found.unused),
    }  # fmt: skip
    values = sum(value.numel() for value in found.copied.values())
    text = format_rows(found.rows())
    assert f"copied      12 tensors, {values / 1000:.4g} k parameters: blocks\n" in text
    assert "folded      14 tensors" in text
    assert "the first 3 of the encoder's 3 blocks, for the first of 3 that fit" in text
    assert "not stated" not in text


@pytest.mark.parametrize(("depth", "asked", "blocks"), [(2, None, 2), (5, None, 3), (5, 1, 1), (3, 3, 3)])
def test_depths_may_differ(depth: int, asked: int | None, blocks: int, tmp_path: Path) -> None:
    """The encoder's first blocks are taken, for the network's first; the others stay as they were."""
    encoder, network, fresh = make_encoder(), make_network(depth=depth), make_network(depth=depth)
    found = transfer(network, save_checkpoint(encoder, tmp_path), asked)
    assert found.blocks == (blocks, 3, depth)
    x = torch.randn(2, 7, 24)
    for number in range(depth):
        same = encoder.blocks[number](x) if number < blocks else through_blocks(fresh, x, number)
        torch.testing.assert_close(through_blocks(network, x, number), same, rtol=0, atol=1e-5)


def test_nothing_is_written_on_meta(tmp_path: Path) -> None:
    """As a dry run asks."""
    with torch.device("meta"):
        network = make_network()
    found = transfer(network, save_checkpoint(make_encoder(), tmp_path))
    assert len(found.copied) == 12
    assert all(value.is_meta for value in network.state_dict().values())


@pytest.mark.parametrize(("changes", "message"), [
    ({"hidden_size": 48}, r"embed_dim 24 \(the network's hidden_size is 48\)$"),
    ({"patch_size": 4}, r"patch_size 2 \(the network's patch_size is 4\)$"),
    (
        {"in_channels": 3, "latents_mean": (0.0,) * 3, "latents_std": (1.0,) * 3},
        r"in_channels 4 \(the network's in_channels is 3\)$",
    ),
    ({"num_heads": 4}, r"made with num_heads 2, the network's is 4$"),
    ({"mlp_ratio": 2.0}, r"blocks\.0\.mlp\.fc1\.weight has shape \(96, 24\), expected \(48, 24\)"),
    ({"qk_norm": True}, "without norms of queries and keys, the network has them"),
])  # fmt: skip
@pytest.mark.parametrize("source", ["checkpoint", "reference"])
def test_another_network_is_refused(
    source: str, changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    network, untouched = make_network(**changes), make_network(**changes).state_dict()
    with pytest.raises(UserError, match=message) as error:
        transfer(network, SOURCES[source](make_encoder(), tmp_path))
    assert str(error.value).startswith(str(tmp_path))
    assert "\n" not in str(error.value)
    assert all(torch.equal(value, untouched[name]) for name, value in network.state_dict().items())


# Of a U-Net: settings, the stages whose attentions take an encoder's blocks, whether its first layer fits.
UNETS: dict[str, tuple[dict[str, Any], list[str], bool]] = {
    "first level": ({}, ["down_blocks.0.stages.0", "up_blocks.1.stages.0", "up_blocks.1.stages.1"], True),
    "lowest level": (
        {"patch_size": 1, "num_channels": (12, 24), "attention_levels": (False, True)},
        ["down_blocks.1.stages.0", "mid_block.0", "up_blocks.0.stages.0", "up_blocks.0.stages.1"],
        False,
    ),
    "middle level": (
        {"patch_size": 1, "num_channels": (12, 24, 24), "attention_levels": (False, True, False)},
        ["down_blocks.1.stages.0", "up_blocks.1.stages.0", "up_blocks.1.stages.1"],
        False,
    ),
    "no attention on the way": (
        {"patch_size": 1, "num_channels": (12, 24), "attention_levels": (False, False)},
        ["mid_block.0"],
        False,
    ),
}  # fmt: skip


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("kind", UNETS)
def test_attentions_of_a_unet_equal_the_pretrained(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """As long as cross-attention adds nothing, on tokens without CLS."""
    changes, names, embeds = UNETS[kind]
    encoder, network = make_encoder(dtype=dtype), make_unet(**changes).to(dtype)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    found = transfer(network, save_checkpoint(encoder, tmp_path))
    close: dict[str, Any] = {"rtol": 0, "atol": TOLERANCES[dtype]}
    x = torch.randn(2, 24, 4, 4, 4, dtype=dtype)  # (B, W, X, Y, Z)
    context = torch.randn(2, 1, 4 * network.config.num_channels[0], dtype=dtype)
    blocks = min(3, len(names))
    assert found.blocks == (blocks, 3, len(names))
    for name, block in zip(names, encoder.blocks, strict=False):  # the U-Net may have more
        attention = network.get_submodule(f"{name}.attention")
        attention.mlp.approximate = "none"  # type: ignore[union-attr, assignment]
        expected = block(x.flatten(2).mT).mT.unflatten(2, (4, 4, 4))
        torch.testing.assert_close(attention(x, context, None), expected, **close)
    if embeds:
        latents = 2 * torch.randn(2, 4, 8, 8, 8, dtype=dtype) + 1
        tokens = encoder.embed_layer.proj(latents)[:, 1:]  # (B, L, W), without positions
        own_tokens = network.conv_in(normalised(network, latents)).flatten(2).mT  # (B, L, W)
        torch.testing.assert_close(own_tokens, tokens, **close)

    own = network.state_dict()
    changed = {name for name, value in own.items() if not torch.equal(value, before[name])}
    assert changed == found.copied.keys() | found.folded.keys()
    assert set(own) == changed | found.new.keys()
    assert found.taken.keys() | found.unused.keys() == encoder.state_dict().keys()
    assert len(found.copied) == 12 * blocks
    assert len(found.folded) == 2 * embeds
    # The rest of the network starts as ever: it adds 0 to what is linear.
    factors = torch.randn(2, 24, dtype=dtype), torch.randn(2, 6, dtype=dtype)
    sample = torch.randn(2, 4, 8, 8, 8, dtype=dtype)
    times = 1000 * torch.rand(2, dtype=dtype)
    assert torch.equal(network(sample, times, *factors), linear_prediction(sample, times, "flow"))


@pytest.mark.parametrize(("changes", "message"), [
    (
        {"num_channels": (36, 48)},
        "patches of 2 embedded 24 wide, expected a level of the U-Net with attention, as wide and with "
        "voxels of this size: its levels are 36 wide at 2, 48 wide at 4$",
    ),
    ({"patch_size": 1, "num_channels": (24, 36)}, "its levels are 24 wide at 1, 36 wide at 2$"),
    ({"attention_levels": (False, True)}, "with attention, .* its levels are 24 wide at 2, 36 wide at 4$"),
    ({"num_heads": 4}, "made with num_heads 2, the network's is 4$"),
    (
        {"in_channels": 3, "latents_mean": (0.0,) * 3, "latents_std": (1.0,) * 3},
        r"in_channels 4 \(the network's in_channels is 3\)$",
    ),
])  # fmt: skip
def test_a_unet_without_a_place_is_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message) as error:
        transfer(make_unet(**changes), save_checkpoint(make_encoder(), tmp_path))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("depth", "asked", "message"), [
    (3, 4, "4 blocks to transfer, the encoder has 3 and the network takes 3"),
    (5, 5, "5 blocks to transfer, the encoder has 3 and the network takes 5"),
    (2, 3, "3 blocks to transfer, the encoder has 3 and the network takes 2"),
    (3, 0, "0 blocks to transfer, the encoder has 3 and the network takes 3"),
])  # fmt: skip
def test_fewer_blocks_than_asked_for_are_an_error(
    depth: int, asked: int, message: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=f"teacher.safetensors: {message}$"):
        transfer(make_network(depth=depth), save_checkpoint(make_encoder(), tmp_path), asked)


def test_weights_that_are_unfit_are_refused(tmp_path: Path) -> None:
    network = make_network()
    with pytest.raises(UserError, match=r"absent\.pt: no such file"):
        transfer(network, tmp_path / "absent.pt")
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    with pytest.raises(UserError, match="checkpoints: no checkpoint found"):
        transfer(network, tmp_path / "run")
    state: dict[str, Tensor] = dict(make_encoder().to_reference().items())
    file = tmp_path / "a.pt"
    torch.save({name: value for name, value in state.items() if name != "blocks.1.norm2.bias"}, file)
    with pytest.raises(UserError, match=r"a\.pt: weights that do not fit: 1 missing: blocks\.1\.norm2\.bias"):
        transfer(network, file)
    torch.save({name: value for name, value in state.items() if not name.startswith("blocks.")}, file)
    with pytest.raises(UserError, match=r"1 blocks to transfer, the encoder has 0"):
        transfer(network, file, 1)
    torch.save(state | {"blocks.0.attn.qkv.bias": torch.full((72,), math.nan)}, file)
    with pytest.raises(UserError, match=r"1 with NaN or infinite values: blocks\.0\.attn\.qkv\.bias"):
        transfer(network, file)
    torch.save({"model": state, "config": asdict(replace(ENCODER, layer_norm_eps=1e-5))}, file)
    with pytest.raises(UserError, match="made with layer_norm_eps 1e-05, the network's is 1e-06"):
        transfer(network, file)


def test_an_encoder_alone_suffices(tmp_path: Path) -> None:
    """Of a bare state dict nothing tells the heads: they are taken to be the network's, and that is said."""
    encoder, network = make_encoder(), make_network()
    parts = ("embed_layer.", "blocks.")
    torch.save(
        {name: value for name, value in encoder.state_dict().items() if name.startswith(parts)},
        tmp_path / "a.pt",
    )
    found = transfer(network, tmp_path / "a.pt")
    assert not found.unused
    assert found.rows()[-1] == (
        "transfer",
        "heads of the encoder not stated in the file; taken to be the network's",
    )
    x = torch.randn(2, 7, 24)
    torch.testing.assert_close(through_blocks(network, x, 2), encoder.blocks[2](x), rtol=0, atol=1e-5)
