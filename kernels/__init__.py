"""The fast operations, each with its eager reference; needs torch and triton alone, knows no trainer."""

from .backend import kernel_backend, set_kernel_backend, transformed
from .contrast import quadruplet_contrast, quadruplet_identities, supervised_contrast
from .decoder_streams import assemble_streams
from .dtypes import at_least_float32, autocast_dtype
from .group_norm import group_norm_silu
from .mix_index import MixIndex, build_mix_index, check_mask, random_mix_mask
from .patch_embed import patch_embed_3d, patch_embed_tokens
from .patchify import patch_grid, patchify_3d, unpatchify_3d
from .pool import pooled_layer_norm, token_mean
from .reconstruction import dual_reconstruction_loss
from .style_conv import style_convolution
from .token_mixing import demix_tokens, mix_tokens, remix_tokens

__all__ = [
    "MixIndex",
    "assemble_streams",
    "at_least_float32",
    "autocast_dtype",
    "build_mix_index",
    "check_mask",
    "demix_tokens",
    "dual_reconstruction_loss",
    "group_norm_silu",
    "kernel_backend",
    "mix_tokens",
    "patch_embed_3d",
    "patch_embed_tokens",
    "patch_grid",
    "patchify_3d",
    "pooled_layer_norm",
    "quadruplet_contrast",
    "quadruplet_identities",
    "random_mix_mask",
    "remix_tokens",
    "set_kernel_backend",
    "style_convolution",
    "supervised_contrast",
    "token_mean",
    "transformed",
    "unpatchify_3d",
]
