"""Hold the sizes of the network, and check that they fit together."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from meduet_fast.settings import POSITIVE, check_numbers

# Heads of the published network, by width of its blocks.
PUBLISHED_HEADS: dict[str, dict[int, int]] = {"num_heads": {768: 12}, "decoder_num_heads": {384: 12}}
# Settings that leave no trace in the weights, and their types.
TRACELESS: dict[str, Any] = {"num_heads": int, "decoder_num_heads": int, "layer_norm_eps": float}
# The weight that shows a size, the axis that does, and how many axes it has.
SHOWN_BY = {
    "embed_dim": ("embed_layer.proj.weight", 0, 5),
    "in_channels": ("embed_layer.proj.weight", 1, 5),
    "patch_size": ("embed_layer.proj.weight", 2, 5),
    "latent_size": ("pos_embed", 1, 3),
    "depth": ("blocks.0.norm1.weight", 0, 1),
    "mlp_ratio": ("blocks.0.mlp.fc1.weight", 0, 2),
    "decoder_embed_dim": ("decoder_embed.weight", 0, 2),
    "decoder_depth": ("decoder_blocks.0.norm1.weight", 0, 1),
    "num_domains": ("domain_classifier.domain_classifier_c.4.bias", 0, 1),
    "style_ratio": ("disentangled_factorizer.proj_s.weight", 0, 3),
}


@dataclass(frozen=True)
class MeDUETConfig:
    """Sizes of the network; the defaults are the published ViT-B (MeDUET section "Network").

    Attributes:
        latent_size: edge of the cubic latent crop, in latent voxels.
        patch_size: edge of a cubic patch, in latent voxels.
        in_channels: channels of the latent.
        embed_dim: width of the encoder and of the content factor.
        depth: encoder blocks.
        num_heads: attention heads of the encoder.
        decoder_embed_dim: width of the decoder.
        decoder_depth: decoder blocks.
        decoder_num_heads: attention heads of the decoder.
        mlp_ratio: hidden width of an MLP over the block's width.
        num_domains: data sets that the domain classifiers tell apart.
        style_ratio: width of the style factor over embed_dim.
        layer_norm_eps: epsilon of every LayerNorm with weights.
    """

    latent_size: int = 24
    patch_size: int = 4
    in_channels: int = 4
    embed_dim: int = 768
    depth: int = 12
    num_heads: int = 12
    decoder_embed_dim: int = 384
    decoder_depth: int = 8
    decoder_num_heads: int = 12
    mlp_ratio: float = 4.0
    num_domains: int = 10
    style_ratio: float = 0.25
    layer_norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        check_numbers(self, POSITIVE, *vars(self))
        if self.latent_size % self.patch_size:
            raise ValueError(
                f"latent_size {self.latent_size} is not a multiple of patch_size {self.patch_size}"
            )
        if self.num_tokens % 2:
            raise ValueError(
                f"latent_size {self.latent_size} and patch_size {self.patch_size} give "
                f"{self.num_tokens} tokens, expected an even number: half of them are mixed"
            )
        for prefix in ("", "decoder_"):
            width, heads = getattr(self, f"{prefix}embed_dim"), getattr(self, f"{prefix}num_heads")
            if width % heads:
                raise ValueError(f"{prefix}embed_dim {width} is not a multiple of {prefix}num_heads {heads}")
            if width % 6:
                raise ValueError(
                    f"{prefix}embed_dim {width} is not a multiple of 6, as 3D sine-cosine positions need"
                )
        if self.style_dim < 1:
            raise ValueError(f"style_ratio {self.style_ratio} of embed_dim {self.embed_dim} leaves no style")

    @property
    def num_tokens(self) -> int:
        """Return the tokens of a crop, without CLS."""
        return (self.latent_size // self.patch_size) ** 3

    @property
    def style_dim(self) -> int:
        """Return the width of the style factor."""
        return int(self.embed_dim * self.style_ratio)

    @property
    def token_dim(self) -> int:
        """Return the values in a patch: patch_size^3 * in_channels."""
        return self.patch_size**3 * self.in_channels

    @classmethod
    def from_state_dict(
        cls,
        state: Mapping[str, Tensor],
        beside: Mapping[str, Any] | None = None,
        num_heads: int | None = None,
        decoder_num_heads: int | None = None,
    ) -> MeDUETConfig:
        """Read the sizes off a state dict with the published names, and what stands beside it.

        Heads leave no trace in weights. Where they are neither given nor beside, 768 and 384 wide blocks have
        the published 12 and 12, and no others have any.

        Args:
            state: the state dict.
            beside: plain values that were saved with it, under dotted names; see :func:`stated`.
            num_heads: of the encoder.
            decoder_num_heads: of the decoder.

        Raises:
            ValueError: naming the first missing key, sizes that do not fit together, or heads that are not
                certain or contradict each other.
        """
        sizes = read_sizes(state)
        for name, (key, _, _) in SHOWN_BY.items():
            if name not in sizes:
                raise ValueError(f"not a MeDUET state dict: {key!r} is missing")
        said = stated(beside or {}, sizes)
        sizes |= {name: min(values) for name, values in said.items() if len(values) == 1}
        given = {"num_heads": num_heads, "decoder_num_heads": decoder_num_heads}
        sizes |= {name: value for name, value in given.items() if value is not None}
        unknown = {}
        for name, published in PUBLISHED_HEADS.items():
            width = sizes[name.replace("num_heads", "embed_dim")]
            if name not in sizes and name not in said and width in published:
                sizes[name] = published[width]
            elif name not in sizes:
                choice = f" ({' or '.join(map(str, sorted(said[name])))}?)" if said.get(name) else ""
                unknown[name] = f"{name} of {width} wide blocks{choice}"
        if unknown:
            raise ValueError(
                "heads leave no trace in weights, and nothing saved with these settles "
                f"{' and '.join(unknown.values())}: give {' and '.join(f'{name}=' for name in unknown)}"
            )
        config = cls(**sizes)
        config.check_stated(said)
        return config

    def check_stated(self, said: Mapping[str, set[Any]]) -> None:
        """Refuse weights that were made with something else.

        Args:
            said: see :func:`stated`.

        Raises:
            ValueError: naming both values.
        """
        for name, values in said.items():
            if values and getattr(self, name) not in values:
                made = " or ".join(map(str, sorted(values)))
                raise ValueError(f"{name} is {getattr(self, name)}, the weights were made with {made}")


def read_sizes(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Read what sizes a state dict with the published names shows, perhaps of the encoder alone.

    Returns:
        Values by the names of :class:`MeDUETConfig`, without those whose weights are not there.

    Raises:
        ValueError: if there is no patch embedding, a block is missing, or a weight can't be what its name
            says.
    """
    sizes: dict[str, Any] = {}
    for name, (key, axis, dimensions) in SHOWN_BY.items():
        if key in state:
            if state[key].ndim != dimensions or 0 in state[key].shape:
                raise ValueError(f"{key} has shape {tuple(state[key].shape)}, expected {dimensions} axes")
            sizes[name] = state[key].shape[axis]
    if "embed_dim" not in sizes:
        raise ValueError(f"not a MeDUET state dict: {SHOWN_BY['embed_dim'][0]!r} is missing")
    for name in {"mlp_ratio", "style_ratio"} & sizes.keys():
        sizes[name] /= sizes["embed_dim"]
    if "latent_size" in sizes:
        positions = sizes["latent_size"] - 1
        grid = round(positions ** (1 / 3))
        if grid**3 != positions:
            raise ValueError(f"pos_embed has {positions} positions after CLS, expected a cubic number")
        sizes["latent_size"] = grid * sizes["patch_size"]
    for name, blocks in (("depth", "blocks"), ("decoder_depth", "decoder_blocks")):
        found = {key.split(".")[1] for key in state if key.startswith(f"{blocks}.")}
        if found != {str(index) for index in range(len(found))}:
            raise ValueError(f"not a MeDUET state dict: {blocks}.N found for N in {sorted(found)}")
        if found:
            sizes[name] = len(found)
    return sizes


def stated(beside: Mapping[str, Any], sizes: Mapping[str, Any]) -> dict[str, set[Any]]:
    """Find what leaves no trace in weights, among the plain values beside them.

    Args:
        beside: values under dotted names; where one ends in ``num_heads``, its neighbours are sizes of the
            same network.
        sizes: what the weights show.

    Returns:
        The values found of each such setting; one is certain, several contradict each other, and none means
        that something is said of heads which is not understood.

    Raises:
        ValueError: if the neighbours are those of another network.
    """
    found: dict[str, set[Any]] = {}
    for key, value in beside.items():
        name = key.rpartition(".")[2]
        number = _number(value, TRACELESS[name]) if name in TRACELESS else None
        if number is None:
            for uncertain in _may_mean(key, name, value):
                found.setdefault(uncertain, set())
            continue
        for other in ("embed_dim", "depth", "decoder_embed_dim", "decoder_depth"):
            neighbour = beside.get(key.removesuffix(name) + other, sizes.get(other))
            if other in sizes and _number(neighbour, int) != sizes[other]:
                raise ValueError(
                    f"{key} stands beside {other} {neighbour}, the weights have {other} {sizes[other]}"
                )
        found.setdefault(name, set()).add(number)
    return found


def stated_or_published(beside: Mapping[str, Any], sizes: Mapping[str, Any]) -> dict[str, set[Any]]:
    """Find what :func:`stated` finds; blocks of the published widths have the published heads if none are.

    Raises:
        ValueError: as :func:`stated`.
    """
    said = stated(beside, sizes)
    for name, published in PUBLISHED_HEADS.items():
        width = sizes.get(name.replace("num_heads", "embed_dim"))
        if width in published:
            said.setdefault(name, {published[width]})
    return said


def _number(value: Any, kind: type) -> Any:
    """Return a number, perhaps written as text or as a float, as what it should be; None if it is none."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    if kind is float:
        return number
    return int(number) if number.is_integer() else None


def _may_mean(key: str, name: str, value: Any) -> Iterable[str]:
    """Return which heads an entry may be about that is not understood, such as words of a command line."""
    if name in PUBLISHED_HEADS:
        return [name]
    words = [value] if isinstance(value, str) else value if isinstance(value, (list, tuple)) else []
    about = [word.lower() for word in (name, *words) if isinstance(word, str) and "heads" in word.lower()]
    if about and all("decoder" in word for word in about):
        return ["decoder_num_heads"]
    return PUBLISHED_HEADS if about else []
