"""Put the fast operations into a model that exists already."""

from __future__ import annotations

import sys
from typing import NamedTuple

from torch import nn

from . import fused


class Swap(NamedTuple):
    """One module that computes differently now.

    Attributes:
        path: of the module in the model, "" for the model itself.
        before: its class.
        after: the operation that took its place.
    """

    path: str
    before: str
    after: str


def accelerate(model: nn.Module) -> list[Swap]:
    """Replace slow modules of MONAI and PyTorch by fused ones, in place.

    Replaced are MONAI's PatchEmbeddingBlock, SABlock and CrossAttentionBlock, the residual blocks of
    DiffusionModelUNet, AutoencoderKL and AutoencoderKlMaisi, MaisiGroupNorm3D; PyTorch's Conv3d whose kernel
    is its stride, and GroupNorm followed by SiLU in a Sequential. Outputs and gradients are the same up to
    rounding. Everything else, subclasses of these, options that the fused forms lack (saved or relative
    attention, float16 norms) and attention that is fused already are left alone.

    A module stays the object that it is and only changes its class: names in the state dict, hooks, mode,
    devices, optimizers that hold its parameters stay. A second call finds nothing to do. Call it before
    ``torch.compile`` and ``fully_shard``.

    Args:
        model: any module; MONAI is imported only if the process uses it.

    Returns:
        What was replaced, in the order of ``model.named_modules()``.
    """
    rules: dict[type[nn.Module], type[fused.Fused]] = dict(fused.RULES)
    if "monai" in sys.modules:
        from . import fused_monai

        rules.update(fused_monai.RULES)
    swaps: list[Swap] = []
    passed_over: set[nn.Module] = set()
    for path, module in list(model.named_modules()):
        before = type(module)
        faster = rules.get(before)
        known = faster is not None and "forward" not in vars(module) and module not in passed_over
        if faster is not None and known and faster.fits(module):
            module.__class__ = faster
            swaps.append(Swap(path, f"{before.__module__}.{before.__qualname__}", faster.summary))
        if isinstance(module, fused.Fused):
            passed_over.update(module.parts(module))
    return swaps
