"""The VAE between image voxels and latents; knows no model."""

from .base import Tokenizer, load_tokenizer

__all__ = ["Tokenizer", "load_tokenizer"]
