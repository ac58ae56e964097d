"""Turn voxels into latents and back; knows no model of ours."""

from meduet_fast.errors import needs_extra

with needs_extra("train"):
    from .autoencoder import Architecture, Tokenizer
    from .identity_init import pass_images_through
    from .weights import load_tokenizer, save_safetensors

__all__ = [
    "Architecture",
    "Tokenizer",
    "load_tokenizer",
    "pass_images_through",
    "save_safetensors",
]
