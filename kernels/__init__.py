"""The fast operations, each with its eager reference; needs torch and triton alone, knows no trainer."""

from .backend import kernel_backend, set_kernel_backend
from .contrast import quadruplet_contrast, quadruplet_identities
from .demix import MixTables, assemble_streams, check_mask, mix_tables, style_convolution
from .pool import pooled_layer_norm, token_mean
from .precision import at_least_float32
from .reconstruction import dual_reconstruction_loss
from .tokenize import patch_embed_3d, patch_embed_tokens, patch_grid, patchify_3d, unpatchify_3d

__all__ = [
    "MixTables",
    "assemble_streams",
    "at_least_float32",
    "check_mask",
    "dual_reconstruction_loss",
    "kernel_backend",
    "mix_tables",
    "patch_embed_3d",
    "patch_embed_tokens",
    "patch_grid",
    "patchify_3d",
    "pooled_layer_norm",
    "quadruplet_contrast",
    "quadruplet_identities",
    "set_kernel_backend",
    "style_convolution",
    "token_mean",
    "unpatchify_3d",
]
