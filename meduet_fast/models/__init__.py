"""The MeDUET network: a ViT over latent patches, split into content and style."""

from .config import MeDUETConfig
from .meduet import Factors, MeDUET

__all__ = ["Factors", "MeDUET", "MeDUETConfig"]
