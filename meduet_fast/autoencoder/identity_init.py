"""Start training with a network that passes images through: a small one then needs far fewer steps."""

from __future__ import annotations

import math
from typing import Any

import torch
from monai.apps.generation.maisi.networks.autoencoderkl_maisi import (
    AutoencoderKlMaisi,
    MaisiDownsample,
    MaisiResBlock,
    MaisiUpsample,
)
from torch import nn

# What the first channels carry through every layer:
_MEAN = 0  # the local mean of the image,
_SLOPES = (1, 2, 3)  # its differences along x, y, z,
_CONSTANTS = {4: 2.0, 5: -2.0}  # and constants, so large that a group norm divides by the same everywhere.
_CARRIED = (_MEAN, *_SLOPES, *_CONSTANTS)
_SLOPE_GAIN = 4.0
_LOG_VARIANCE = -8.0
_NOISE = 0.1


@torch.no_grad()
def pass_images_through(network: AutoencoderKlMaisi) -> None:
    """Make a newly built autoencoder one of block means and slopes.

    The latents start as the mean and the three slopes of every block of voxels (the four strongest principal
    components of small image blocks), with little posterior noise; the decoder starts as interpolation of
    the means. Residual branches start at zero, everything else stays random.

    Args:
        network: with four latent channels, and at least six channels in every group of its group norms.

    Raises:
        ValueError: if it has fewer.
    """
    parts: list[Any] = [network.encoder, network.decoder]
    norms = [module for part in parts for module in part.modules() if isinstance(module, nn.GroupNorm)]
    if network.latent_channels != 4 or any(n.num_channels // n.num_groups < len(_CARRIED) for n in norms):
        raise ValueError(
            "a small tokenizer needs 4 latent channels, and 6 channels in every normalised group"
        )
    for part in parts:
        blocks = list(part.blocks)
        _enter(_convolution(blocks[0]))
        for block in blocks:
            if isinstance(block, MaisiDownsample):
                _halve(_convolution(block))
            elif isinstance(block, MaisiUpsample):
                _carry(_convolution(block))
            elif isinstance(block, MaisiResBlock):
                nn.init.zeros_(_convolution(block.conv2).weight)
                nn.init.zeros_(_convolution(block.conv2).bias)
                if block.in_channels != block.out_channels:
                    _carry(_convolution(block.nin_shortcut))
        _leave(_convolution(blocks[-1]), blocks[-2])
    for module in (network.quant_conv_mu, network.post_quant_conv):
        nn.init.dirac_(_convolution(module).weight)
        nn.init.zeros_(_convolution(module).bias)
    nn.init.zeros_(_convolution(network.quant_conv_log_sigma).weight)
    nn.init.constant_(_convolution(network.quant_conv_log_sigma).bias, _LOG_VARIANCE)


def _convolution(module: nn.Module) -> Any:
    """Return the one convolution inside MONAI's wrappers."""
    (found,) = (inner for inner in module.modules() if isinstance(inner, nn.Conv3d))
    return found


def _enter(convolution: Any) -> None:
    """Lead image or latents to the carried channels; the others see detail, without its mean."""
    weight = convolution.weight  # (C, 1 or 4, 3, 3, 3)
    weight -= weight.mean(dim=(2, 3, 4), keepdim=True)
    nn.init.zeros_(convolution.bias)
    weight[list(_CARRIED)] = 0
    for channel in range(weight.shape[1]):
        weight[channel, channel, 1, 1, 1] = 1
    for channel, value in _CONSTANTS.items():
        convolution.bias[channel] = value


def _carry(convolution: Any) -> None:
    """Lead every carried channel to itself."""
    weight = convolution.weight  # (C out, C in, k, k, k), k 1 or 3
    nn.init.zeros_(convolution.bias)
    weight[:, [_MEAN, *_CONSTANTS]] = 0
    weight[list(_CARRIED)] = 0
    middle = weight.shape[-1] // 2
    for channel in _CARRIED:
        weight[channel, channel, middle, middle, middle] = 1


def _halve(convolution: Any) -> None:
    """Take means, and slopes, of blocks of 2 x 2 x 2 (MONAI pads at the end: taps 0 and 1 are the block)."""
    _carry(convolution)
    weight = convolution.weight  # (C, C, 3, 3, 3)
    for channel in (_MEAN, *_SLOPES):
        weight[channel] = 0
        weight[channel, channel, :2, :2, :2] = 1 / 8
    for axis, channel in enumerate(_SLOPES):
        weight[channel] /= 2  # the slopes within the halves count half of the step between them
        step = weight[channel, _MEAN].movedim(axis, 0)  # (3, 3, 3), ``axis`` first
        step[0, :2, :2] = -1 / 8
        step[1, :2, :2] = 1 / 8


def _leave(convolution: Any, norm: nn.GroupNorm) -> None:
    """Lead the carried channels, as they were before the last group norm, to latents or image."""
    weight = convolution.weight  # (4 or 1, C, 3, 3, 3)
    nn.init.zeros_(convolution.bias)
    weight *= _NOISE
    weight[:, list(_CONSTANTS)] = 0
    width = norm.num_channels // norm.num_groups
    deviation = math.sqrt(sum(value**2 for value in _CONSTANTS.values()) / width)
    for channel in range(weight.shape[0]):
        weight[channel, channel, 1, 1, 1] = deviation * (1 if channel == _MEAN else _SLOPE_GAIN)
