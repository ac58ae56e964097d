"""The patch embedding without a device: refusals, plans of memory, what the compiler makes of the kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from meduet_fast.kernels import patch_embed, patch_embed_3d, patch_embed_tokens
from meduet_fast.kernels.launch import record_launches
from meduet_fast.kernels.verify import outputs_and_gradients
from meduet_fast.kernels.workloads import volume_workload

X, WEIGHT = torch.randn(2, 3, 4, 4, 4), torch.randn(5, 3, 2, 2, 2)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: patch_embed_3d(X[0], WEIGHT), r"x has shape \(3, 4, 4, 4\)"),
        (lambda: patch_embed_3d(X, WEIGHT, torch.zeros(4)), r"bias has shape \(4,\), expected \(5,\)"),
        (
            lambda: patch_embed_3d(X, WEIGHT, num_prefix_tokens=-1),
            "num_prefix_tokens is -1, expected 0 or more",
        ),
        (lambda: patch_embed_3d(X.half(), WEIGHT), "x is torch.float16 and weight torch.float32"),
        (lambda: patch_embed_tokens(torch.zeros(8, 24), WEIGHT), r"tokens has shape \(8, 24\)"),
        (
            lambda: patch_embed_tokens(torch.zeros(1, 8, 24), WEIGHT, position=torch.zeros(7, 5)),
            r"position has shape \(7, 5\), expected \(8, 5\)",
        ),
        (
            lambda: patch_embed_tokens(torch.zeros(1, 8, 24).double(), WEIGHT),
            "tokens is torch.float64 and weight torch.float32",
        ),
    ],
)
def test_refusals_name_the_argument(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_autocast_takes_mixed_dtypes_and_double_stays() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        assert patch_embed_3d(X.half(), WEIGHT).dtype == torch.bfloat16
        assert patch_embed_3d(X.double(), WEIGHT.double()).dtype == torch.float64
        with pytest.raises(ValueError, match=r"x is torch\.float64 and weight torch\.float32"):
            patch_embed_3d(X.double(), WEIGHT)


def test_eager_compiles_as_one_graph() -> None:
    mask = torch.rand(2, 8) < 0.5
    compiled = torch.compile(patch_embed_3d, fullgraph=True)
    expected = patch_embed_3d(X, WEIGHT, None, None, mask, 1)
    assert torch.allclose(compiled(X, WEIGHT, None, None, mask, 1), expected, atol=1e-5)


def plan(x: Tensor, edge: int) -> patch_embed._Plan:
    blocks = patch_embed._volume_blocks(x, x.new_empty(1, x.shape[1], edge, edge, edge))
    return patch_embed._plan(tuple(blocks.shape), blocks.stride(), blocks.element_size())


def test_plan_follows_memory() -> None:
    latents = torch.empty(2, 4, 24, 24, 24, dtype=torch.bfloat16)
    assert plan(latents, 4) == ((0, 1, 2, 3), (4, 4, 4, 4), (13824, 576, 24, 1), 4)
    last = latents.contiguous(memory_format=torch.channels_last_3d)
    # A row of a patch with all its channels is one run: 16 values, in loads of 16 bytes.
    assert plan(last, 4) == ((1, 2, 3, 0), (1, 4, 4, 16), (0, 2304, 96, 1), 8)
    assert plan(latents.transpose(2, 4), 4) == ((0, 3, 2, 1), (4, 4, 4, 4), (13824, 576, 24, 1), 4)
    image = torch.empty(1, 1, 96, 96, 96)
    assert plan(image, 16) == ((0, 1, 2, 3), (1, 16, 16, 16), (0, 9216, 96, 1), 4)
    assert plan(image[..., 1:, :-16], 1)[1:] == ((1, 1, 1, 1), (0, 0, 0, 0), 1)
    # Rows of 95 voxels: neighbours in a row lie together, but not aligned.
    assert plan(torch.empty(1, 1, 4, 4, 95)[..., :92], 4).vector == 1
    assert plan(latents[..., ::2], 4).vector == 1
    tokens = torch.empty(2, 27, 256, dtype=torch.bfloat16)
    blocks = patch_embed._token_blocks(tokens, torch.empty(5, 4, 4, 4, 4))
    one_run = patch_embed._plan(tuple(blocks.shape), blocks.stride(), 2)
    assert one_run == ((1, 2, 3, 0), (1, 1, 1, 256), (0, 0, 0, 1), 8)


def test_float32_is_never_multiplied_as_tf32() -> None:
    """A mask of bytes once made the compiler do so on sm_100, whatever precision was asked for."""
    triton = pytest.importorskip("triton")
    from meduet_fast.kernels import inspect

    workload = volume_workload(64, 4, (24, 24, 24), 4, masked=True)
    with record_launches(100) as launches:
        outputs_and_gradients(workload.run, workload.inputs("meta", torch.float32))
    assert len(launches) == 2
    for launch in launches:
        source = triton.compiler.ASTSource(launch.kernel, *inspect._signature(launch))
        target = triton.backends.compiler.GPUTarget("cuda", 100, 32)
        assert "tf32" not in triton.compile(source, target=target, options=launch.options).asm["ptx"]
