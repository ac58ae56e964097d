"""The MeDUET network: a ViT over latent patches, split into content and style."""

from meduet_fast.errors import needs_extra

with needs_extra("train"):
    from .config import MeDUETConfig
    from .meduet import Factors, MeDUET

__all__ = ["Factors", "MeDUET", "MeDUETConfig"]
