"""Generate latents from two factors: the anatomy of one scan, as the scanner of another would show it."""

from meduet_fast.errors import needs_extra

with needs_extra("train"):
    from .guidance import Guidance, GuidanceMode

__all__ = ["Guidance", "GuidanceMode"]
