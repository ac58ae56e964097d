"""Standard calls of every operation: what is inspected, held to its definition on a GPU, and timed.

Functions make a :class:`Workload` of any size; the lists at the end are those that matter.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .contrast import (
    Identity,
    quadruplet_contrast,
    quadruplet_contrast_eager,
    supervised_contrast,
    supervised_contrast_eager,
)
from .decoder_streams import assemble_streams, assemble_streams_reference
from .group_norm import group_norm_silu, group_norm_silu_reference
from .mix_index import build_mix_index, build_mix_index_reference
from .patch_embed import (
    patch_embed_3d,
    patch_embed_3d_reference,
    patch_embed_tokens,
    patch_embed_tokens_reference,
)
from .patchify import Triple, patch_grid, triple
from .pool import pooled_layer_norm, pooled_layer_norm_reference
from .reconstruction import Pairing, dual_reconstruction_loss, dual_reconstruction_loss_reference
from .style_conv import style_convolution, style_convolution_reference
from .token_mixing import (
    demix_tokens,
    demix_tokens_reference,
    mix_tokens,
    mix_tokens_reference,
    remix_tokens,
    remix_tokens_reference,
)

Inputs = dict[str, Any]
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class Cost(NamedTuple):
    """What one call must do at least: bytes to and from memory, floating-point operations."""

    bytes: int
    flops: int


class Workload(NamedTuple):
    """A standard call of an operation.

    Attributes:
        op: name of the operation.
        label: its sizes, for tables.
        inputs: (device, dtype) -> keyword arguments; on the device "meta" they take no memory.
        run: the public function; takes the inputs, returns a tensor or a tuple of them.
        reference: the eager definition, called like ``run``.
        cost: bytes per element -> least cost of forward and of backward.
        matrix: whether the kernels must use tensor cores, on 16-bit inputs.
        dtypes: which inputs it makes; where ``inputs`` decides by itself, that one.
    """

    op: str
    label: str
    inputs: Callable[[str, torch.dtype], Inputs]
    run: Callable[..., Any]
    reference: Callable[..., Any]
    cost: Callable[[int], tuple[Cost, Cost]]
    matrix: bool = False
    dtypes: tuple[torch.dtype, ...] = DTYPES


def balanced_mask(batch: int, length: int, device: str) -> Tensor:
    """Return a random mask (B, L) bool with L//2 ones in every row."""
    return torch.rand(batch, length, device=device).argsort(1) < length // 2


def _leaf(device: str, dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.randn(shape, device=device, dtype=dtype, requires_grad=True)


def _parameter(device: str, dtype: torch.dtype, *shape: int) -> Tensor:
    """Return random values as a parameter has them under autocast: float32 at least."""
    return _leaf(device, torch.promote_types(dtype, torch.float32), *shape)


# 1. Contrast


def _contrast_inputs(rows: int, keys: Tensor) -> Inputs:
    """Make queries that resemble the keys, a quarter of them in every block, and the published scale."""
    device, dtype = keys.device, keys.dtype
    alike = keys.unflatten(0, (4, -1))[:, : rows // 4].reshape(rows, -1)  # (rows, D)
    queries = 0.5 * alike + torch.randn(alike.shape, device=device, dtype=dtype)
    log_scale = torch.full((), 2.66, device=device, requires_grad=True)
    return {"queries": queries.requires_grad_(), "keys": keys, "log_scale": log_scale}


def _contrast_cost(rows: int, key_rows: int, width: int, passes: int, size: int) -> tuple[Cost, Cost]:
    elements = rows * width
    return (
        Cost((rows + key_rows) * width * size + elements * 4, 2 * passes * rows * key_rows * width),
        Cost(elements * (4 + size), elements),
    )


def quadruplet_workload(
    rows: int, key_rows: int, width: int, identity: Identity, always: torch.dtype | None = None
) -> Workload:
    """Contrast quadruplets; ``always`` is the inputs' dtype, whatever the caller asks for."""

    def inputs(device: str, dtype: torch.dtype) -> Inputs:
        keys = torch.randn(key_rows, width, device=device, dtype=always or dtype)
        return {**_contrast_inputs(rows, keys), "identity": identity}

    def cost(size: int) -> tuple[Cost, Cost]:
        return _contrast_cost(rows, key_rows, width, 2, always.itemsize if always else size)

    return Workload(
        "quadruplet_contrast", f"{rows}x{key_rows}x{width} {identity}{' float32' if always else ''}",
        inputs, quadruplet_contrast, quadruplet_contrast_eager, cost,
        matrix=always is None, dtypes=(always,) if always else DTYPES,
    )  # fmt: skip


def supervised_workload(rows: int, key_rows: int, width: int, itself: bool) -> Workload:
    """Contrast by labels, about eight keys each; with ``itself`` a query's own key takes no part."""

    def inputs(device: str, dtype: torch.dtype) -> Inputs:
        keys = torch.randn(key_rows, width, device=device, dtype=dtype)
        made = _contrast_inputs(rows, keys)
        classes = max(key_rows // 8, 1)
        made["query_labels"] = torch.arange(rows, device=device) % classes  # (rows,)
        made["key_labels"] = torch.arange(key_rows, device=device) % classes  # (key_rows,)
        made["self_index"] = torch.arange(rows, device=device) if itself else None
        return made

    return Workload(
        "supervised_contrast", f"{rows}x{key_rows}x{width}{' without itself' if itself else ''}",
        inputs, supervised_contrast, supervised_contrast_eager,
        lambda size: _contrast_cost(rows, key_rows, width, 3, size), matrix=True,
    )  # fmt: skip


# 2. Sources: index, mixing, style, decoder streams


def mix_index_workload(batch: int, length: int) -> Workload:
    """Build the index of a mask (batch, length)."""
    cost = Cost(batch * length * (1 + 4 * 8), 0)
    return Workload(
        "mix_index",
        f"{batch}x{length}",
        lambda device, dtype: {"mask": balanced_mask(batch, length, device)},
        lambda mask: tuple(build_mix_index(mask)[1:]),
        lambda mask: tuple(build_mix_index_reference(mask)[1:]),
        lambda size: (cost, Cost(0, 0)),
        dtypes=(torch.bfloat16,),  # nothing has one
    )


def mixing_workloads(batch: int, length: int = 216, width: int = 768) -> list[Workload]:
    """Mix, demix and remix tokens (batch, length, width), half and half."""
    half = length // 2

    def make(op: str, run: Callable[..., Any], reference: Callable[..., Any], **tokens: int) -> Workload:
        def inputs(device: str, dtype: torch.dtype) -> Inputs:
            leaves = {name: _leaf(device, dtype, batch, count, width) for name, count in tokens.items()}
            return {"mask": balanced_mask(batch, length, device), **leaves}

        def cost(size: int) -> tuple[Cost, Cost]:
            least = Cost(2 * batch * length * width * size + batch * length, 0)
            return least, least

        return Workload(op, f"{batch}x{length}x{width}", inputs, run, reference, cost)

    return [
        make("mix_tokens", mix_tokens, mix_tokens_reference, x=length),
        make("demix_tokens", demix_tokens, demix_tokens_reference, x=length),
        make("remix_tokens", remix_tokens, remix_tokens_reference, z1=length - half, z2=half),
    ]


def style_workload(batch: int, length: int, width: int, mixed: bool) -> Workload:
    """Convolve style (batch, length, width), along each source if ``mixed``."""

    def inputs(device: str, dtype: torch.dtype) -> Inputs:
        mask = balanced_mask(batch, length, device)
        return {
            "style": _leaf(device, dtype, batch, length, width),
            "weight": _parameter(device, dtype, width, 1, 3),
            "index": build_mix_index_reference(mask) if mixed else None,
        }

    def cost(size: int) -> tuple[Cost, Cost]:
        elements = batch * length * width
        extra = width * 3 * 4 + (2 * 8 * batch * length if mixed else 0)
        return (
            Cost(2 * elements * size + extra, 5 * elements),
            Cost(3 * elements * size + extra + width * 3 * 4, 11 * elements),
        )

    label = f"{batch}x{length}x{width}{' by source' if mixed else ''}"
    return Workload("style_convolution", label, inputs, style_convolution, style_convolution_reference, cost)


def streams_workload(
    batch: int, length: int, width: int, straight: bool = True, swapped: bool = True
) -> Workload:
    """Assemble the decoder's two or four streams of (batch, length, width), behind one prefix row."""

    def inputs(device: str, dtype: torch.dtype) -> Inputs:
        return {
            "content": _leaf(device, dtype, batch, length, width),
            "style": _leaf(device, dtype, batch, length, width),
            "prefix": _leaf(device, dtype, batch, 1, width),
            "mask_token": _parameter(device, dtype, width),
            "position": _parameter(device, dtype, 1 + length, width).detach(),
            "index": build_mix_index_reference(balanced_mask(batch, length, device)),
            "straight": straight,
            "swapped": swapped,
        }

    def cost(size: int) -> tuple[Cost, Cost]:
        streams = 2 * (straight + swapped)
        tokens, rows = batch * length * width, batch * (1 + length) * width
        moved = (2 * tokens + streams * rows) * size + batch * width * size + width * 4 + batch * length * 9
        adds = streams * 2 * tokens
        return Cost(moved + (1 + length) * width * 4, adds), Cost(moved, adds)

    kinds = " and ".join(name for name, on in (("straight", straight), ("swapped", swapped)) if on)
    label = f"{batch}x{length}x{width} {kinds}"
    return Workload("assemble_streams", label, inputs, assemble_streams, assemble_streams_reference, cost)


# 3. Pooling, reconstruction, group normalisation


def pool_workload(batch: int, length: int, width: int, masked: bool) -> Workload:
    """Pool (batch, length, width), by source if ``masked``."""

    def inputs(device: str, dtype: torch.dtype) -> Inputs:
        x = _leaf(device, dtype, batch, length, width)
        return {"x": x, "mask": balanced_mask(batch, length, device) if masked else None}

    def cost(size: int) -> tuple[Cost, Cost]:
        elements, outputs = batch * length * width, 2 * batch * width * (2 if masked else 1)
        extra = outputs * 4 + (batch * length if masked else 0)
        return Cost(elements * size + extra, 9 * elements), Cost(2 * elements * size + extra, 14 * elements)

    label = f"{batch}x{length}x{width}{' by source' if masked else ''}"
    return Workload("pooled_layer_norm", label, inputs, pooled_layer_norm, pooled_layer_norm_reference, cost)


def reconstruction_workload(
    batch: int, channels: int, size: int, patch: int, pairing: Pairing = "source"
) -> Workload:
    """Compute the loss of ``batch`` volumes of edge ``size`` with patches of edge ``patch``."""
    length, width = (size // patch) ** 3, channels * patch**3

    def inputs(device: str, dtype: torch.dtype) -> Inputs:
        return {
            "prediction": _leaf(device, dtype, 2 * batch, length, width),
            "target": torch.randn(batch, channels, size, size, size, device=device, dtype=dtype),
            "mask": balanced_mask(batch, length, device),
            "patch_size": patch,
            "pairing": pairing,
        }

    def cost(size: int) -> tuple[Cost, Cost]:
        # Half of the tokens of each stream is supervised; a quarter of the target by neither stream.
        elements = batch * length * width
        read = int(1.75 * elements) * size + batch * length
        return Cost(read + 4, 3 * elements), Cost(read + 2 * elements * size + 4, 2 * elements)

    label = f"{batch}x{channels}x{size}^3 patch {patch}{'' if pairing == 'source' else ' as published'}"
    run, reference = dual_reconstruction_loss, dual_reconstruction_loss_reference
    return Workload("dual_reconstruction_loss", label, inputs, run, reference, cost)


def group_norm_workload(
    batch: int, channels: int, size: int | Triple, last: bool, adaptive: bool = False
) -> Workload:
    """Normalise maps (batch, channels, X, Y, Z) in 32 groups.

    Args:
        size: X, Y and Z, or the edge of a cube.
        last: channels-last input.
        adaptive: weight and bias of each sample, the bias half of a projection.
    """

    def inputs(device: str, dtype: torch.dtype) -> Inputs:
        x = torch.randn(batch, channels, *triple(size), device=device, dtype=dtype)
        memory_format = torch.channels_last_3d if last else torch.contiguous_format
        weight, bias = _leaf(device, dtype, channels), _leaf(device, dtype, channels)
        if adaptive:
            projection = torch.randn(batch, 2 * channels, device=device, dtype=dtype)
            weight, bias = 1 + projection[:, :channels], projection[:, channels:]  # (B, C) each
        return {
            "x": x.contiguous(memory_format=memory_format).requires_grad_(),
            "num_groups": 32,
            "weight": weight.requires_grad_(),
            "bias": bias.requires_grad_(),
        }

    def cost(element: int) -> tuple[Cost, Cost]:
        # The kernels read a map twice, since the statistics must come first; a cache may hold it.
        elements = batch * channels * math.prod(triple(size))
        return Cost(2 * elements * element, 12 * elements), Cost(3 * elements * element, 30 * elements)

    shape = f"{size}^3" if isinstance(size, int) else "x".join(map(str, size))
    notes = [note for note, on in (("adaptive", adaptive), ("channels last", last)) if on]
    label = " ".join([f"{batch}x{channels}x{shape}", *notes])
    return Workload("group_norm_silu", label, inputs, group_norm_silu, group_norm_silu_reference, cost)


# 4. Patch embedding


def _embed_workload(
    label: str,
    run: Callable[..., Tensor],
    reference: Callable[..., Tensor],
    inputs: Callable[[str, torch.dtype], Inputs],
    autocast: torch.dtype | None = None,
) -> Workload:
    """Make a workload of either public function; its first input decides which gradients flow."""

    def within(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(**values: Any) -> Tensor:
            weight = values["weight"]
            with torch.autocast("cpu" if weight.is_meta else weight.device.type, autocast):
                return function(**values)

        return function if autocast is None else call

    def cost(size: int) -> tuple[Cost, Cost]:
        values = inputs("meta", torch.bfloat16)
        weight, mask = values["weight"], values.get("source_mask")
        x = values["x"] if "x" in values else values["tokens"]
        rows, width = x.numel() // weight[0].numel(), weight.shape[0]
        wide = size if autocast is None else 4
        marks = 0 if mask is None else mask.numel()
        factors = (weight.numel() + width) * wide
        out = (rows + x.shape[0] * values["num_prefix_tokens"]) * width * size
        product = 2 * rows * weight.numel()
        read = x.numel() * wide + marks + factors
        grad_x = x.numel() * wide + weight.numel() * wide if x.requires_grad else 0
        return (
            Cost(read + values["position"].numel() * wide + out, product),
            Cost(rows * width * size + read + grad_x, product * (2 if x.requires_grad else 1)),
        )

    dtypes = DTYPES if autocast is None else (autocast,)
    return Workload(
        "patch_embed", label, inputs, within(run), within(reference), cost, matrix=True, dtypes=dtypes
    )


def _embed_parameters(
    device: str, dtype: torch.dtype, length: int, channels: int, patch: int, width: int
) -> Inputs:
    weight = torch.randn(width, channels, patch, patch, patch, device=device, dtype=dtype)
    return {
        "weight": (weight * (channels * patch**3) ** -0.5).requires_grad_(),
        "bias": _leaf(device, dtype, width),
        "position": torch.randn(length, width, device=device, dtype=dtype),
        "num_prefix_tokens": 1,
    }


def volume_workload(
    batch: int,
    channels: int,
    size: Triple,
    patch: int,
    masked: bool = False,
    last: bool = False,
    autocast: torch.dtype | None = None,
    width: int = 768,
    differentiate: bool = False,
) -> Workload:
    """Embed a batch of volumes of this size.

    Args:
        masked: every other token comes from the partner.
        last: channels-last input.
        autocast: float32 inputs under autocast to this.
        width: of a token.
        differentiate: the volumes get a gradient.
    """
    length = math.prod(patch_grid(size, patch))

    def inputs(device: str, dtype: torch.dtype) -> Inputs:
        dtype = torch.float32 if autocast else dtype
        x = torch.randn(batch, channels, *size, device=device, dtype=dtype)
        x = x.contiguous(memory_format=torch.channels_last_3d) if last else x
        values = {"x": x.requires_grad_(differentiate)}
        values |= _embed_parameters(device, dtype, length, channels, patch, width)
        if masked:
            values["source_mask"] = balanced_mask(batch, length, device)
        return values

    notes = [note for note, on in (("mixed", masked), ("last", last), ("autocast", autocast)) if on]
    label = " ".join([f"{batch}x{channels}x{'x'.join(map(str, size))} p{patch}", *notes])
    return _embed_workload(label, patch_embed_3d, patch_embed_3d_reference, inputs, autocast)


def token_workload(batch: int, length: int, channels: int, patch: int, width: int = 768) -> Workload:
    """Embed predicted tokens (batch, length, patch^3*channels)."""

    def inputs(device: str, dtype: torch.dtype) -> Inputs:
        tokens = _leaf(device, dtype, batch, length, channels * patch**3)
        return {"tokens": tokens, **_embed_parameters(device, dtype, length, channels, patch, width)}

    label = f"{batch}x{length}x{channels * patch**3} tokens"
    return _embed_workload(label, patch_embed_tokens, patch_embed_tokens_reference, inputs)


# 5. All of them


def standard_workloads() -> list[Workload]:
    """List the sizes of ViT-B steps, of large batches, and of other models."""
    latents: Triple = (24, 24, 24)
    return [
        # In training the pooled queries and keys are float32, which tensor cores do not multiply.
        quadruplet_workload(256, 256, 768, "content", torch.float32),
        quadruplet_workload(256, 256, 192, "style", torch.float32),
        quadruplet_workload(16384, 16384, 768, "content", torch.float32),
        quadruplet_workload(256, 256, 768, "content"),
        quadruplet_workload(256, 256, 192, "style"),
        quadruplet_workload(256, 2048, 768, "content"),
        quadruplet_workload(16384, 16384, 768, "content"),
        streams_workload(64, 216, 384),
        streams_workload(64, 216, 384, straight=False),
        *(group_norm_workload(*size, last) for size in ((1, 64, 64), (4, 256, 16)) for last in (False, True)),
        *(group_norm_workload(4, 256, (16, 16, 8), last, adaptive=True) for last in (False, True)),
        *mixing_workloads(64),
        pool_workload(64, 216, 768, masked=True),
        pool_workload(64, 216, 192, masked=True),
        pool_workload(128, 216, 768, masked=False),
        reconstruction_workload(64, 4, 24, 4),
        reconstruction_workload(16, 4, 24, 2),
        style_workload(64, 216, 192, mixed=True),
        style_workload(64, 216, 192, mixed=False),
        mix_index_workload(64, 216),
        mix_index_workload(4, 13824),
        volume_workload(64, 4, latents, 4, masked=True),
        volume_workload(64, 4, latents, 4, masked=True, autocast=torch.bfloat16),
        volume_workload(64, 4, latents, 4),
        volume_workload(64, 4, latents, 4, last=True),
        volume_workload(16, 4, latents, 2),
        volume_workload(8, 4, (64, 64, 32), 4),
        volume_workload(8, 1, (96, 96, 96), 16),
        volume_workload(8, 1, (96, 96, 96), 8),
        token_workload(256, 216, 4, 4),
    ]


def further_workloads() -> list[Workload]:
    """List what training does not use: labels, other options, and sizes that no block divides."""
    return [
        quadruplet_workload(5900, 5900, 700, "style"),
        supervised_workload(256, 2048, 768, itself=False),
        supervised_workload(16384, 16384, 768, itself=True),
        supervised_workload(5900, 7300, 700, itself=True),
        streams_workload(3, 210, 300, swapped=False),
        *(group_norm_workload(3, 96, 15, last) for last in (False, True)),
        *(group_norm_workload(3, 96, (9, 5, 7), last, adaptive=True) for last in (False, True)),
        *mixing_workloads(3, 215, 700),
        pool_workload(3, 215, 700, masked=True),
        reconstruction_workload(3, 3, 15, 3, "reference"),
        style_workload(3, 214, 100, mixed=True),
        mix_index_workload(3, 1002),
        volume_workload(3, 3, (15, 21, 9), 3, masked=True, width=500, differentiate=True),
        token_workload(5, 35, 3, 3, width=500),
    ]


def heavy_workloads() -> list[Workload]:
    """List what takes many seconds by its definition, even on a GPU."""
    return [quadruplet_workload(131072, 131072, 768, "content")]


def workloads() -> list[Workload]:
    """List all of them."""
    return standard_workloads() + further_workloads() + heavy_workloads()
