"""Drop-in classes for PyTorch's own modules; ``fused_monai.py`` has those for MONAI's.

A module is swapped by giving the object another class, so its parameters, buffers, hooks, mode and every
reference to it stay what they are.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from meduet_fast.kernels import autocast_dtype, group_norm_silu, kernel_backend, patch_embed_3d, transformed


class Fused:
    """Mixed into a class derived from the one that it stands in for; has the same state.

    Attributes:
        summary: the operation that does the work.
    """

    summary: ClassVar[str]

    @staticmethod
    def fits(module: Any) -> bool:
        """Tell whether the fused forward computes what this module of the original class does.

        Asked again at every call: where an option has changed since, or a hook sits on a part that would be
        passed over, the original forward runs.
        """
        raise NotImplementedError

    @staticmethod
    def parts(module: Any) -> list[nn.Module]:
        """Return modules inside that the fused forward does not call: it is no use to swap them too."""
        return []

    def __prepare_scriptable__(self) -> nn.Module:
        """Refuse ``torch.jit.script``, which asks every module."""
        raise RuntimeError(
            f"torch.jit.script can't compile {type(self).__name__}, a module that accelerate() changed; call "
            "meduet_fast.layers.restore(model) first"
        )


def bare(*modules: nn.Module) -> bool:
    """Tell whether nobody would notice that modules are not called: no hooks, no forward of their own."""
    return not any(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in vars(module)
        for module in modules
    )


def cut_to_patches(x: Tensor, patch: tuple[int, ...]) -> Tensor:
    """Cut off the remainder at the end of each axis, which a convolution leaves out too."""
    for axis, edge in enumerate(patch, start=2):
        size = x.shape[axis]
        if size % edge:
            x = x.narrow(axis, 0, size - size % edge)
    return x


def pays(x: Tensor) -> bool:
    """Tell whether a matrix product beats the convolution: not oneDNN's on the CPU, measured 3 to 8 times.

    Within a transform of torch.func no kernel runs, and the convolution is as good.
    """
    return not transformed() and (x.device.type != "cpu" or kernel_backend() == "triton")


class PatchConv3d(Fused, nn.Conv3d):
    """A Conv3d whose kernel is its stride, as a matrix product where that is faster."""

    summary = "patch_embed_3d"

    @staticmethod
    def fits(module: Any) -> bool:
        return (
            module.kernel_size == module.stride
            and module.kernel_size != (1, 1, 1)
            and module.padding in ((0, 0, 0), "valid")
            and module.dilation == (1, 1, 1)
            and module.groups == 1
            and module.weight.is_floating_point()
        )

    def forward(self, input: Tensor) -> Tensor:
        """Convolve (B, C, X, Y, Z) to (B, D, X/p, Y/q, Z/r)."""
        fitting = input.dim() == 5 and input.shape[1] == self.in_channels
        if (
            not fitting
            or not pays(input)
            or not self.fits(self)
            or any(size < edge for size, edge in zip(input.shape[2:], self.kernel_size, strict=True))
        ):
            return super().forward(input)
        x = cut_to_patches(input, self.kernel_size)
        grid = [size // edge for size, edge in zip(x.shape[2:], self.kernel_size, strict=True)]
        tokens = patch_embed_3d(x, self.weight, self.bias)  # (B, L, D)
        y = tokens.transpose(1, 2).unflatten(2, grid)  # (B, D, X/p, Y/q, Z/r)
        last = not input.is_contiguous() and input.is_contiguous(memory_format=torch.channels_last_3d)
        return y if last else y.contiguous()


class FusedSequential(Fused, nn.Sequential):
    """A Sequential with GroupNorm and SiLU next to each other: one pass for both on 3D feature maps."""

    summary = "group_norm_silu"

    @staticmethod
    def fits(module: Any) -> bool:
        return any(_is_pair(*pair) for pair in pairwise(module))

    def forward(self, input: Tensor) -> Tensor:
        """Run the modules in their order, like the original."""
        children = list(self)
        position = 0
        while position < len(children):
            module, following = children[position], children[position + 1 : position + 3]
            if following and _is_pair(module, following[0]) and _may_fuse(input, following[1:]):
                input = norm_silu(module, input)
                position += 2
            else:
                input = module(input)
                position += 1
        return input


def norm_silu(norm: Any, x: Tensor) -> Tensor:
    """Apply a GroupNorm module and SiLU, in one pass."""
    return group_norm_silu(x, norm.num_groups, norm.weight, norm.bias, norm.eps)


def _is_pair(norm: nn.Module, activation: nn.Module) -> bool:
    return type(norm) is nn.GroupNorm and type(activation) is nn.SiLU and bare(norm, activation)


def _may_fuse(x: Any, following: list[nn.Module]) -> bool:
    """Tell whether x is a 3D map; under autocast, one that goes into a convolution, which casts it anyway."""
    if not isinstance(x, Tensor) or x.dim() != 5 or not x.is_floating_point():
        return False
    if autocast_dtype(x) is None or x.dtype in (torch.float32, torch.float64):
        return True
    if not following:
        return False
    first = next(item for item in following[0].modules() if not any(item.children()))
    return isinstance(first, nn.Conv3d)


RULES: dict[type[nn.Module], type[Fused]] = {nn.Conv3d: PatchConv3d, nn.Sequential: FusedSequential}
