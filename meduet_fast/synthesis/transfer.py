"""Begin a network with what pretraining has learnt: patch embedding, attention and MLP of the encoder.

The latents of a network are normalised, which is folded into the patch embedding. The transformer's norms
have no weights: those of an encoder's LayerNorm are folded into the map behind it. A block of the transformer
with open gates and without modulation then computes what it did in the encoder, up to rounding and to its
GELU; so does an attention block of the U-Net, as long as cross-attention adds nothing, as at the start.
CLS, positions, the last LayerNorm and all that follows it have no place in the networks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from meduet_fast.encoding.encode import teacher_file
from meduet_fast.engine.beginning import Beginning
from meduet_fast.engine.dry_run import Rows, count_tensors
from meduet_fast.errors import UserError
from meduet_fast.files import file_sha256
from meduet_fast.models.config import read_sizes, stated_or_published
from meduet_fast.models.published import read_published
from meduet_fast.models.transformer3d import LAYER_NORM_EPS, MeDUETTransformer3D
from meduet_fast.models.unet3d import NORM_EPS, ContextBlock, MeDUETUNet3D
from meduet_fast.weight_files import misfit

_EMBEDDING = "embed_layer.proj"  # of the encoder
_KINDS = ("weight", "bias")


class _Map(NamedTuple):
    """A module of the encoder and what it becomes in a network, by name.

    Attributes:
        source: in the encoder.
        target: in the network.
        norm: in the encoder, before it; None if that is not folded in.
    """

    source: str
    target: str
    norm: str | None = None

    def within(self, source: str, target: str) -> _Map:
        """Return the same of a block."""
        norm = self.norm and f"{source}.{self.norm}"
        return _Map(f"{source}.{self.source}", f"{target}.{self.target}", norm)


_OF_TRANSFORMER = [
    _Map("attn.qkv", "attn.qkv", "norm1"),
    _Map("attn.proj", "attn.proj"),
    _Map("mlp.fc1", "mlp.fc1", "norm2"),
    _Map("mlp.fc2", "mlp.fc2"),
]
_OF_UNET = [
    _Map("norm1", "norm1"),
    _Map("attn.qkv", "attn.qkv"),
    _Map("attn.proj", "attn.proj"),
    _Map("norm2", "norm3"),
    _Map("mlp.fc1", "mlp.fc1"),
    _Map("mlp.fc2", "mlp.fc2"),
]


@dataclass(frozen=True)
class Transferred:
    """What a network begins with.

    Attributes:
        file: of the pretrained weights.
        sha256: of the file.
        part: which of several networks in it, the prefix of its names.
        blocks: how many were transferred, how many the encoder has, and how many of the network could be.
        copied: tensors of the network that are the encoder's, by the network's names.
        folded: those that are computed from several of the encoder's.
        new: the network's others, as they were.
        taken: what of the file was copied or folded, by the file's names.
        unused: all else in it.
        heads_assumed: whether nothing in the file states the encoder's heads.
    """

    file: Path
    sha256: str
    part: str
    blocks: tuple[int, int, int]
    copied: Mapping[str, Tensor]
    folded: Mapping[str, Tensor]
    new: Mapping[str, Tensor]
    taken: Mapping[str, Tensor]
    unused: Mapping[str, Tensor]
    heads_assumed: bool

    def beginning(self) -> Beginning:
        """Return it as what the engine's runs begin from; the network has the weights already."""
        return Beginning(self.record(), rows=self.rows())

    def record(self) -> dict[str, Any]:
        """Return what ``run.json`` keeps of it, as JSON."""
        kinds = ("copied", "folded", "new", "taken", "unused")
        return {
            "path": str(self.file.resolve()),
            "sha256": self.sha256,
            "part": self.part,
            "blocks": self.blocks[0],
            "tensors": {kind: len(getattr(self, kind)) for kind in kinds},
        }

    def rows(self) -> Rows:
        """Return a table of what is transferred, new and unused, in tensors and parameters."""
        named = f", {self.part!r} in it" if self.part else ""
        blocks, of_encoder, of_network = self.blocks
        texts = [
            f"{self.file}{named}, SHA-256 {self.sha256[:12]}...",
            f"the first {blocks} of the encoder's {of_encoder} blocks, for the first of {of_network} "
            "that fit",
            count_tensors("copied", self.copied),
            count_tensors("folded", self.folded),
            count_tensors("new", self.new),
            count_tensors("taken", self.taken),
            count_tensors("unused", self.unused),
        ]
        if self.heads_assumed:
            texts.append("heads of the encoder not stated in the file; taken to be the network's")
        return [("transfer", text) for text in texts]


@torch.no_grad()
def transfer(
    network: MeDUETTransformer3D | MeDUETUNet3D, path: Path, blocks: int | None = None
) -> Transferred:
    """Write a pretrained encoder's patch embedding and first blocks into a network.

    The first, because they stand nearest to the patch embedding. They become the first blocks of the
    transformer; a deeper one's others stay as they are. Of the U-Net they become the first attentions at the
    level of the encoder's width whose voxels are its patches, in the order of a pass; the patch embedding
    becomes its own, if that is of this patch and width.

    Args:
        network: on any device; on "meta" nothing is written. Its ``latents_mean`` and ``latents_std`` are
            those that its latents will be normalised by.
        path: folder of a run, of whose last checkpoint the teacher is taken; a checkpoint's file; what
            ``meduet-fast export`` made of one ("meduet" or "reference"); or a published checkpoint.
        blocks: how many; by default as many as both have.

    Raises:
        UserError: naming the file, if it can't be read, lacks some of the encoder's weights, has fewer blocks
            than asked for, or does not compute as the network's blocks do.
    """
    file, weights = read_published(teacher_file(path))
    own, source = network.state_dict(), weights.tensors
    config: Any = network.config
    try:
        sizes = read_sizes(source)
        said = stated_or_published(weights.beside, sizes)
        if isinstance(network, MeDUETUNet3D):
            maps, places, inner, eps = *_of_unet(network, sizes), _OF_UNET, NORM_EPS
        else:
            maps, places, inner, eps = *_of_transformer(network, sizes), _OF_TRANSFORMER, LAYER_NORM_EPS
        _check_traceless(said, config.num_heads, eps)
        found = (sizes.get("depth", 0), len(places))
        blocks = min(found) if blocks is None else blocks
        if not 1 <= blocks <= min(found):
            raise ValueError(
                f"{blocks} blocks to transfer, the encoder has {found[0]} and the network takes {found[1]}"
            )
        for number in range(blocks):
            maps += [item.within(f"blocks.{number}", places[number]) for item in inner]
        expected = {f"{item.source}.{kind}": own[f"{item.target}.{kind}"] for item in maps for kind in _KINDS}
        expected |= {
            f"{item.norm}.{kind}": own[f"{item.target}.weight"][0]  # (W,)
            for item in maps if item.norm for kind in _KINDS
        }  # fmt: skip
        taken = {name: source[name] for name in expected if name in source}
        if problems := misfit(taken, expected):
            raise ValueError(f"weights that do not fit: {problems}")
    except ValueError as error:
        raise UserError(f"{file}: {error}{weights.described()}") from error
    mean, deviation = (
        torch.tensor(values, dtype=torch.float64)  # (C,)
        for values in (config.latents_mean, config.latents_std)
    )
    copied, folded = _put_together(maps, taken, mean, deviation)
    for name, value in (copied | folded).items():
        own[name].copy_(value)
    return Transferred(
        file,
        file_sha256(file),
        weights.part,
        (blocks, *found),
        {name: own[name] for name in copied},
        {name: own[name] for name in folded},
        {name: value for name, value in own.items() if name not in copied and name not in folded},
        taken,
        {name: value for name, value in source.items() if name not in taken} | weights.others,
        not said.get("num_heads"),
    )


def _of_transformer(network: MeDUETTransformer3D, sizes: Mapping[str, Any]) -> tuple[list[_Map], list[str]]:
    """Return where a transformer takes the patch embedding, and the names of its blocks.

    Raises:
        ValueError: naming what differs, in the encoder and in the network.
    """
    config: Any = network.config
    _check_sizes(sizes, config, {"patch_size": "patch_size", "embed_dim": "hidden_size"})
    if config.qk_norm:
        raise ValueError("made without norms of queries and keys, the network has them: expected no qk_norm")
    return [_Map(_EMBEDDING, "patch_embed")], [f"blocks.{number}" for number in range(config.depth)]


def _of_unet(network: MeDUETUNet3D, sizes: Mapping[str, Any]) -> tuple[list[_Map], list[str]]:
    """Return where a U-Net takes the patch embedding, if it does, and the names of its attentions that fit.

    Raises:
        ValueError: if no attention does, naming what there is.
    """
    config: Any = network.config
    _check_sizes(sizes, config, {})
    patch, width = sizes["patch_size"], sizes["embed_dim"]
    levels = [(config.patch_size * 2**n, own) for n, own in enumerate(config.num_channels)]  # edge, width
    places = []
    for name, module in network.named_modules():
        if isinstance(module, ContextBlock):
            part, number, *_ = name.split(".")
            level = {"down_blocks": int(number), "up_blocks": -1 - int(number)}.get(part, -1)
            places += [name] if levels[level] == (patch, width) else []
    if not places:
        there = ", ".join(f"{own} wide at {edge}" for edge, own in levels)
        raise ValueError(
            f"patches of {patch} embedded {width} wide, expected a level of the U-Net with attention, as "
            f"wide and with voxels of this size: its levels are {there}"
        )
    same = levels[0] == (patch, width) and patch > 1  # of 1 it would be another convolution
    return [_Map(_EMBEDDING, "conv_in")] if same else [], places


def _check_sizes(sizes: Mapping[str, Any], config: Mapping[str, Any], names: Mapping[str, str]) -> None:
    """Refuse an encoder of other sizes.

    Args:
        sizes: its own.
        config: the network's.
        names: which must be equal beside the channels, the encoder's name and the network's.

    Raises:
        ValueError: naming those that differ.
    """
    differing = [
        f"{name} {sizes[name]} (the network's {ours} is {config[ours]})"
        for name, ours in {"in_channels": "in_channels", **names}.items()
        if sizes[name] != config[ours]
    ]
    if differing:
        raise ValueError(f"weights of another network: {', '.join(differing)}")


def _check_traceless(said: Mapping[str, set[Any]], num_heads: int, eps: float) -> None:
    """Refuse an encoder that differs in what leaves no trace in weights, as far as something states it.

    Raises:
        ValueError: naming what it was made with, and what the network has.
    """
    for name, ours in (("num_heads", num_heads), ("layer_norm_eps", eps)):
        if said.get(name) and ours not in said[name]:
            made = " or ".join(map(str, sorted(said[name])))
            raise ValueError(f"the weights were made with {name} {made}, the network's is {ours}")


def _put_together(
    maps: list[_Map], taken: Mapping[str, Tensor], mean: Tensor, deviation: Tensor
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Compute what a network gets.

    Args:
        maps: which of its modules are made of which.
        taken: the encoder's tensors.
        mean, deviation: (C,) float64, of the channels of the network's latents.

    Returns:
        Tensors that are the encoder's, and those that norms or the normalisation are folded into.
    """
    copied, folded = dict[str, Tensor](), dict[str, Tensor]()
    for item in maps:
        weight, bias = (taken[f"{item.source}.{kind}"].double() for kind in _KINDS)
        if item.source == _EMBEDDING:
            weight, bias = (
                weight * deviation.view(-1, 1, 1, 1),  # (W, C, p, p, p)
                bias + torch.einsum("wcxyz,c->w", weight, mean),  # (W,)
            )
        if item.norm:
            scale, shift = (taken[f"{item.norm}.{kind}"].double() for kind in _KINDS)  # (M,) each
            weight, bias = weight * scale, bias + weight @ shift  # (N, M), (N,)
        made = copied if item.source != _EMBEDDING and item.norm is None else folded
        made |= {f"{item.target}.weight": weight, f"{item.target}.bias": bias}
    return copied, folded
