"""Name the encoder as MONAI 1.6's ``ViT`` and ``UNETR`` do, and back. MONAI itself is not imported here.

Both order tokens, queries, keys, values and heads as this package does. What differs, besides names:

- Their LayerNorms have an epsilon of 1e-5 and no argument for it, MeDUET's 1e-6. Set it, and outputs agree to
  rounding: ``for m in net.modules(): if isinstance(m, torch.nn.LayerNorm): m.eps = 1e-6``.
- Every block has a ``norm_cross_attn`` that nothing runs through.
- ``ViT`` has a CLS token in front only if it classifies. The exported head is the identity: ``net(latents)``
  returns the CLS encoding (B, D) and the hidden states, of which ``net.norm(states[-1])`` is all tokens', CLS
  first.
- ``UNETR`` has no CLS token, so its tokens miss what they would have read from it; and its patches have 16
  voxels along each edge, whatever is asked for. The exported projection takes latents enlarged to that by
  repetition, ``interpolate(latents, scale_factor=16 // patch_size, mode="nearest")``, and gives the same
  tokens; segmentations come out at that size.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from meduet_fast.errors import UserError

from .config import MeDUETConfig
from .meduet import MeDUET

UNETR_PATCH, UNETR_DEPTH = 16, 12

# MeDUET's part of a parameter's name -> MONAI's.
_NAMES = (
    ("embed_layer.proj.", "patch_embedding.patch_embeddings."),
    (".attn.proj.", ".attn.out_proj."),
    (".mlp.fc1.", ".mlp.linear1."),
    (".mlp.fc2.", ".mlp.linear2."),
)
_ENCODER = ("embed_layer.", "blocks.", "norm.", "cls_token")
_PATCHES = "patch_embedding.patch_embeddings.weight"
_POSITIONS = "patch_embedding.position_embeddings"


def to_monai_vit(
    state: Mapping[str, Tensor], config: MeDUETConfig
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Turn a state dict of MeDUET into state dict and arguments of ``monai.networks.nets.ViT``.

    Args:
        state: the published names.
        config: its sizes.
    """
    tensors = {}
    for key, value in state.items():
        if key.startswith(_ENCODER):
            for own, monai in _NAMES:
                key = key.replace(own, monai)
            tensors[key] = value
    tensors[_POSITIONS] = state["pos_embed"][:, 1:]
    for index in range(config.depth):
        tensors[f"blocks.{index}.norm_cross_attn.weight"] = torch.ones(config.embed_dim)
        tensors[f"blocks.{index}.norm_cross_attn.bias"] = torch.zeros(config.embed_dim)
    tensors["classification_head.weight"] = torch.eye(config.embed_dim)
    tensors["classification_head.bias"] = torch.zeros(config.embed_dim)
    arguments = {
        "in_channels": config.in_channels,
        "img_size": [config.latent_size] * 3,
        "patch_size": [config.patch_size] * 3,
        "hidden_size": config.embed_dim,
        "mlp_dim": int(config.embed_dim * config.mlp_ratio),
        "num_layers": config.depth,
        "num_heads": config.num_heads,
        "classification": True,
        "num_classes": config.embed_dim,
        "post_activation": "none",
        "qkv_bias": True,
    }
    return tensors, arguments


def to_monai_unetr(
    state: Mapping[str, Tensor], config: MeDUETConfig
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Turn a state dict of MeDUET into ``vit.`` of one of ``monai.networks.nets.UNETR``, and arguments.

    The argument ``out_channels`` is left to whoever segments.

    Raises:
        UserError: if the encoder has not the 12 blocks of a UNETR, or its patches do not divide 16.
    """
    if config.depth != UNETR_DEPTH or UNETR_PATCH % config.patch_size:
        raise UserError(
            f"a MONAI UNETR has {UNETR_DEPTH} blocks and patches of {UNETR_PATCH}; this encoder has "
            f"{config.depth} blocks and patches of {config.patch_size}, which must divide {UNETR_PATCH}"
        )
    vit, arguments = to_monai_vit(state, config)
    scale = UNETR_PATCH // config.patch_size
    for axis in (2, 3, 4):
        # Each voxel's weight is shared among its repetitions; scale is a power of two, so that this is exact.
        vit[_PATCHES] = vit[_PATCHES].repeat_interleave(scale, axis) / scale
    tensors = {
        f"vit.{key}": value for key, value in vit.items() if not key.startswith(("cls_", "classification_"))
    }
    shared = ("in_channels", "hidden_size", "mlp_dim", "num_heads", "qkv_bias")
    unetr = {name: arguments[name] for name in shared}
    return tensors, {**unetr, "img_size": [config.latent_size * scale] * 3}


def from_monai(state: Mapping[str, Tensor], config: MeDUETConfig) -> dict[str, Tensor]:
    """Turn a state dict of a MONAI ``ViT`` or ``UNETR``, perhaps trained on, into the encoder's of MeDUET.

    Args:
        state: the net's state dict, whole.
        config: sizes of the MeDUET that it is for.

    Returns:
        Tensors for ``MeDUET(config).load_state_dict(tensors, strict=False)``: encoder and positions, and CLS
        from a ViT.

    Raises:
        ValueError: naming a key that is missing.
    """
    unetr = any(key.startswith("vit.") for key in state)
    if unetr:
        state = {key[4:]: value for key, value in state.items() if key.startswith("vit.")}
    tensors = {}
    for key, value in state.items():
        for own, monai in _NAMES:
            key = key.replace(monai, own)
        if key.startswith(_ENCODER) and "cross_attn" not in key:
            tensors[key] = value
    with torch.device("meta"):
        expected = [key for key, _ in MeDUET(config).named_parameters() if key.startswith(_ENCODER[:3])]
    missing = [key for key in expected if key not in tensors] + [_POSITIONS] * (_POSITIONS not in state)
    if missing:
        raise ValueError(f"not a MONAI ViT or UNETR for this configuration: nothing for {missing[0]}")
    if unetr:
        scale = UNETR_PATCH // config.patch_size
        weight = tensors["embed_layer.proj.weight"]
        whole = weight.double()  # in which equal shares add up exactly
        for axis in (2, 3, 4):
            whole = whole.unflatten(axis, (-1, scale)).sum(axis + 1)  # in the end (D, C, p, p, p)
        tensors["embed_layer.proj.weight"] = whole.to(weight.dtype)
    tensors["pos_embed"] = F.pad(state[_POSITIONS], (0, 0, 1, 0))  # CLS has none
    return tensors
