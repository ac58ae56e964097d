"""Put the fast operations into a model that exists already, and take them out again."""

from __future__ import annotations

import warnings
from importlib import import_module
from importlib.metadata import version
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


def _rules(model: nn.Module) -> dict[type[nn.Module], type[fused.Fused]]:
    """Return the fused class of every class that has one, of libraries whose modules the model has."""
    rules = dict(fused.RULES)
    bases = {base for module in model.modules() for base in type(module).__mro__}
    libraries = {base.__module__.partition(".")[0] for base in bases}
    for library, least in (("monai", "1.6"), ("diffusers", "0.42")):
        if library in libraries:
            try:
                rules |= import_module(f"{__package__}.fused_{library}").RULES
            except ImportError as error:
                warnings.warn(
                    f"modules of {library} {version(library)} are left as they are: known are those of "
                    f"{least} and later ({error})",
                    stacklevel=3,
                )
    return rules


def accelerate(model: nn.Module) -> list[Swap]:
    """Replace slow modules of MONAI, diffusers and PyTorch by fused ones, in place.

    Replaced are MONAI's PatchEmbeddingBlock, SABlock, CrossAttentionBlock and Swin's WindowAttention, the
    residual blocks of DiffusionModelUNet, AutoencoderKL and AutoencoderKlMaisi, MaisiGroupNorm3D; residual
    blocks that normalise by groups in diffusers' U-Nets and 3D autoencoders; PyTorch's Conv3d whose kernel is
    its stride, and GroupNorm followed by SiLU in a Sequential. Outputs and gradients are the same up to
    rounding. Everything else, subclasses of these, options that the fused forms lack (saved or relative
    attention, float16 norms) and attention that is fused already are left alone.

    A module stays the object that it is and only changes its class: names in the state dict, hooks, mode,
    devices, optimizers that hold its parameters stay. A second call finds nothing to do. Call it before
    ``torch.compile`` and ``fully_shard``. :func:`restore` undoes it, which ``torch.jit.script`` wants.

    Within transforms of torch.func (jvp, vmap and so on) plain PyTorch runs. Second derivatives are right,
    too; those of attention PyTorch refuses, unless its definition was chosen with
    ``torch.nn.attention.sdpa_kernel(SDPBackend.MATH)``.

    Args:
        model: any module; MONAI and diffusers are imported only if it has modules of theirs.

    Returns:
        What was replaced, in the order of ``model.named_modules()``.

    Raises:
        UserError: for a model of a diffusers that lacks some of the classes.
    """
    rules = _rules(model)
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


def restore(model: nn.Module) -> list[str]:
    """Undo :func:`accelerate`, in place: every module computes as its own class does.

    Parameters, hooks and all else stay; a model that was not accelerated, or was in part, is right, too. Call
    it before ``fully_shard``.

    Args:
        model: any module.

    Returns:
        Paths of the modules that changed, in the order of ``model.named_modules()``.

    Raises:
        ValueError: for a module of a class that was derived from a fused one, as ``fully_shard`` does;
            nothing has changed then.
    """
    originals = {faster: original for original, faster in _rules(model).items()}
    modules = [(path, item) for path, item in model.named_modules() if isinstance(item, fused.Fused)]
    for path, module in modules:
        if type(module) not in originals:
            raise ValueError(
                f"module {path!r} is a {type(module).__name__}, derived from an accelerated class; restore a "
                "model before fully_shard"
            )
    for _, module in modules:
        module.__class__ = originals[type(module)]  # type: ignore[assignment]
    return [path for path, _ in modules]
