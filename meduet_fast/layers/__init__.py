"""The fast operations as modules, and :func:`accelerate`, which puts them into models that exist already.

:func:`restore` takes them out again.

MeDUET itself is built of ``PatchEmbed3d``, ``sincos_positions_3d`` and the attention chosen here.
``TokenMixer`` and ``QuadrupletContrast`` are for models and losses of one's own.
"""

from .accelerate import Swap, accelerate, restore
from .attention import set_attention_backend
from .contrast import QuadrupletContrast
from .patch_embed import PatchEmbed3d
from .positions import sincos_positions_3d
from .token_mixing import TokenMixer

__all__ = [
    "PatchEmbed3d",
    "QuadrupletContrast",
    "Swap",
    "TokenMixer",
    "accelerate",
    "restore",
    "set_attention_backend",
    "sincos_positions_3d",
]
