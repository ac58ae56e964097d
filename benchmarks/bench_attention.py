"""Self-attention at the lengths of 3D transformers: PyTorch's backends, FlashAttention 2 and 4, xformers.

``python -m benchmarks.bench_attention [--device cpu] [--quick] [--only NAME] [--json PATH]``

"ours" is what the models call, ``scaled_dot_product_attention`` with the backend that PyTorch chooses: the
others say whether it chooses well.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from meduet_fast.errors import UserError
from meduet_fast.kernels.workloads import Cost, Workload
from meduet_fast.layers.attention import Attend, AttentionBackend, attention_backend

from .command import cases_command
from .harness import Case, Variant
from .operations import EAGER, Run, op_cases

PACKAGES: tuple[AttentionBackend, ...] = ("flash2", "flash4", "xformers")
HEADS, WIDTH = 12, 64
# ViT-B on latents of 24^3 in patches of 4 with CLS; 96^3 in patches of 8 with CLS; a usual length; 96^3 in 4.
SIZES = ((64, 217), (8, 1729), (8, 2048), (1, 13824))
# Above, the eager definition's scores would fill a GPU.
MOST_TOKENS_EAGER = 2048


def _attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    scores = query @ key.mT * query.shape[-1] ** -0.5
    return scores.softmax(-1) @ value


def tokens_first(attend: Attend, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attention of (B, H, L, d) on (B, L, H, d), which is what a projection gives."""
    return attend(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)).transpose(1, 2)


def eager(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """The definition: (B, L, H, d) each -> (B, L, H, d)."""
    return tokens_first(_attend, query, key, value)


def by_head(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """The definition, one head at a time and again in backward: what results are held to, at any length."""
    heads = zip(query.unbind(2), key.unbind(2), value.unbind(2), strict=True)
    return torch.stack([checkpoint(_attend, *head, use_reentrant=False) for head in heads], 2)


def sdpa(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """PyTorch's choice of a backend."""
    return tokens_first(F.scaled_dot_product_attention, query, key, value)


def sdpa_by(backend: SDPBackend) -> Run:
    """One backend of PyTorch's."""

    def run(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return sdpa(query, key, value)

    return run


def package(name: AttentionBackend) -> Run:
    """A backend that is a package of its own.

    Raises:
        ImportError: if it cannot be imported.
    """
    try:
        attend = attention_backend(name)
    except UserError as error:
        if isinstance(error.__cause__, ImportError):
            raise error.__cause__ from None
        raise ImportError(str(error)) from error
    return partial(tokens_first, attend)


def workload(batch: int, length: int) -> Workload:
    """Attention of 12 heads of 64 over (batch, length), inputs as a projection leaves them."""

    def inputs(device: str, dtype: torch.dtype) -> dict[str, Any]:
        shape = batch, length, HEADS, WIDTH
        return {
            name: torch.randn(shape, device=device, dtype=dtype, requires_grad=True)
            for name in ("query", "key", "value")
        }

    def cost(size: int) -> tuple[Cost, Cost]:
        elements, product = batch * length * HEADS * WIDTH, 2 * batch * HEADS * length**2 * WIDTH
        # Two products forward; backward computes one again and has four of its own.
        return Cost(4 * elements * size, 2 * product), Cost(8 * elements * size, 5 * product)

    return Workload("attention", f"{batch}x{length}", inputs, sdpa, by_head, cost, matrix=True)


def cases(device: torch.device, quick: bool) -> Iterator[Case]:
    """Batches that keep the number of tokens about the same."""
    gpu = device.type == "cuda"
    sizes = SIZES if gpu else ((4, 217),) if quick else ((4, 217), (1, 1729), (1, 2048))
    for batch, length in sizes:
        peers: dict[str, Callable[[], Run]] = {}
        if length <= MOST_TOKENS_EAGER:
            peers[EAGER] = lambda: eager
        if gpu:
            for name, backend in (
                ("sdpa cuDNN", SDPBackend.CUDNN_ATTENTION),
                ("sdpa flash", SDPBackend.FLASH_ATTENTION),
                ("sdpa efficient", SDPBackend.EFFICIENT_ATTENTION),
            ):
                peers[name] = partial(sdpa_by, backend)
            for other in PACKAGES:
                peers[other] = partial(package, other)
        shape = {"batch": batch, "tokens": length, "width": HEADS * WIDTH}
        yield from op_cases(
            "attention",
            f"B={batch} L={length}, 12 heads of 64",
            workload(batch, length),
            device,
            shape,
            peers,
        )


def test_attention(benchmark: Any, variant: Variant) -> None:
    benchmark(variant.call)


if __name__ == "__main__":
    sys.exit(cases_command(cases, __doc__ or ""))
