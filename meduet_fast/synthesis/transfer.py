"""Begin a network with what pretraining has learnt: patch embedding, attention and MLP of the encoder.

The network's norms have no weights, and its latents are normalised. So the weights of an encoder's LayerNorm
go into the map behind it, and the normalisation into the patch embedding: with open gates and without
modulation a block computes what it did in the encoder, up to rounding. CLS, positions, the last LayerNorm and
all that follows it have no place in the network.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from meduet_fast.encoding.encode import teacher_file
from meduet_fast.engine.dry_run import Rows, count_tensors
from meduet_fast.errors import UserError
from meduet_fast.files import file_sha256
from meduet_fast.models.config import read_sizes, stated_or_published
from meduet_fast.models.published import read_published
from meduet_fast.models.transformer3d import LAYER_NORM_EPS, MeDUETTransformer3D
from meduet_fast.weight_files import misfit

# The encoder's name of a size, and the network's.
_SIZES = {"in_channels": "in_channels", "patch_size": "patch_size", "embed_dim": "hidden_size"}
_EMBEDDING = "embed_layer.proj"
# Maps of a block, in the encoder and in the network, and the encoder's norm before each.
_NORM_BEFORE = {"attn.qkv": "norm1", "attn.proj": None, "mlp.fc1": "norm2", "mlp.fc2": None}
_KINDS = ("weight", "bias")


@dataclass(frozen=True)
class Transferred:
    """What a network begins with.

    Attributes:
        file: of the pretrained weights.
        sha256: of the file.
        part: which of several networks in it, the prefix of its names.
        blocks: how many were transferred, and how many the encoder and the network have.
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
            f"the first {blocks} of the encoder's {of_encoder} blocks, for the first of the network's "
            f"{of_network}",
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
def transfer(network: MeDUETTransformer3D, path: Path, blocks: int | None = None) -> Transferred:
    """Write a pretrained encoder's patch embedding and first blocks into a network.

    The first, because they stand nearest to the patch embedding; a deeper network's others stay as they are.

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
        _check_sizes(sizes, said, config)
        depths = sizes.get("depth", 0), config.depth
        blocks = min(depths) if blocks is None else blocks
        if not 1 <= blocks <= min(depths):
            raise ValueError(
                f"{blocks} blocks to transfer, the encoder has {depths[0]} and the network {depths[1]}"
            )
        block_maps = [
            (f"blocks.{number}.{name}", norm and f"blocks.{number}.{norm}")
            for number in range(blocks)
            for name, norm in _NORM_BEFORE.items()
        ]
        expected = {f"{_EMBEDDING}.{kind}": own[f"patch_embed.{kind}"] for kind in _KINDS}
        for name, norm in block_maps:
            expected |= {f"{name}.{kind}": own[f"{name}.{kind}"] for kind in _KINDS}
            if norm:
                expected |= {f"{norm}.{kind}": own[f"{name}.weight"][0] for kind in _KINDS}  # (W,)
        taken = {name: source[name] for name in expected if name in source}
        if problems := misfit(taken, expected):
            raise ValueError(f"weights that do not fit: {problems}")
    except ValueError as error:
        raise UserError(f"{file}: {error}{weights.described()}") from error

    def both(name: str) -> tuple[Tensor, Tensor]:
        """Return weight and bias, in float64."""
        return taken[f"{name}.weight"].double(), taken[f"{name}.bias"].double()

    copied, folded = dict[str, Tensor](), dict[str, Tensor]()
    mean, deviation = (
        torch.tensor(values, dtype=torch.float64).view(-1, 1, 1, 1)
        for values in (config.latents_mean, config.latents_std)
    )  # (C, 1, 1, 1) each
    weight, bias = both(_EMBEDDING)  # (W, C, p, p, p), (W,)
    folded["patch_embed.weight"] = weight * deviation  # (W, C, p, p, p)
    folded["patch_embed.bias"] = bias + (weight * mean).sum((1, 2, 3, 4))  # (W,)
    for name, norm in block_maps:
        weight, bias = both(name)  # (N, M), (N,)
        if norm:
            scale, shift = both(norm)  # (M,) each
            weight, bias = weight * scale, bias + weight @ shift  # (N, M), (N,)
        (folded if norm else copied).update({f"{name}.weight": weight, f"{name}.bias": bias})
    for name, value in (copied | folded).items():
        own[name].copy_(value)
    return Transferred(
        file,
        file_sha256(file),
        weights.part,
        (blocks, *depths),
        {name: own[name] for name in copied},
        {name: own[name] for name in folded},
        {name: value for name, value in own.items() if name not in copied and name not in folded},
        taken,
        {name: value for name, value in source.items() if name not in taken} | weights.others,
        not said.get("num_heads"),
    )


def _check_sizes(sizes: Mapping[str, Any], said: Mapping[str, set[Any]], config: Mapping[str, Any]) -> None:
    """Refuse an encoder whose blocks compute something else.

    Args:
        sizes: which its weights show.
        said: what leaves no trace in them.
        config: of the network.

    Raises:
        ValueError: naming what differs, in the encoder and in the network.
    """
    differing = [
        f"{name} {sizes[name]} (the network's {ours} is {config[ours]})"
        for name, ours in _SIZES.items()
        if sizes[name] != config[ours]
    ]
    if differing:
        raise ValueError(f"weights of another network: {', '.join(differing)}")
    for name, ours in (("num_heads", config["num_heads"]), ("layer_norm_eps", LAYER_NORM_EPS)):
        if said.get(name) and ours not in said[name]:
            made = " or ".join(map(str, sorted(said[name])))
            raise ValueError(f"the weights were made with {name} {made}, the network's is {ours}")
    if config["qk_norm"]:
        raise ValueError("made without norms of queries and keys, the network has them: expected no qk_norm")
