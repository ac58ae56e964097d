"""Backends of attention: layouts and refusals; on a GPU they are held to PyTorch's in ``tests/gpu``."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from meduet_fast.errors import UserError
from meduet_fast.layers import attention, set_attention_backend
from meduet_fast.layers.attention import AttentionBackend
from meduet_fast.models.blocks import Attention

PACKAGES = {"flash2": "flash_attn", "flash4": "flash_attn", "xformers": "xformers"}
OTHERS: tuple[AttentionBackend, ...] = ("flash2", "flash4", "xformers")


@pytest.fixture(autouse=True)
def _back_to_default() -> Iterator[None]:
    yield
    set_attention_backend("sdpa")


def _install(monkeypatch: pytest.MonkeyPatch, seen: list[tuple[int, ...]]) -> None:
    """Stand-ins with the packages' layouts, for hosts that have none of them."""

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        seen.append(tuple(query.shape))
        return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (query, key, value))).transpose(
            1, 2
        )

    flash, cute, xformers, ops = (ModuleType(name) for name in ("f", "c", "x", "o"))
    flash.flash_attn_func = attend  # type: ignore[attr-defined]
    cute.flash_attn_func = lambda *heads: (attend(*heads), None)  # type: ignore[attr-defined]
    ops.memory_efficient_attention = attend  # type: ignore[attr-defined]
    for name, module in (
        ("flash_attn", flash), ("flash_attn.cute", cute), ("xformers", xformers), ("xformers.ops", ops)
    ):  # fmt: skip
        monkeypatch.setitem(sys.modules, name, module)


def test_the_default_is_pytorchs_own_function() -> None:
    assert attention.attend is F.scaled_dot_product_attention


def test_a_package_that_imports_but_cannot_compute_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """xformers imports where its compiled part is for another torch, and then has no operator."""

    def attend(*heads: Tensor) -> Tensor:
        raise NotImplementedError("No operator found for inputs:\n   not built with CUDA support")

    _install(monkeypatch, [])
    monkeypatch.setattr(sys.modules["xformers.ops"], "memory_efficient_attention", attend)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    zeros = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *size, dtype, device: zeros(*size, dtype=dtype))
    with pytest.raises(UserError, match=r"installed xformers can't compute .* \(not built with CUDA supp"):
        set_attention_backend("xformers")


@pytest.mark.parametrize("name", OTHERS)
def test_an_absent_package_is_named_with_its_extra(
    name: AttentionBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, PACKAGES[name], None)
    monkeypatch.delitem(sys.modules, "flash_attn.cute", raising=False)
    monkeypatch.delitem(sys.modules, "xformers.ops", raising=False)
    with pytest.raises(
        UserError, match=rf"attention '{name}' needs the package .*pip install '\.\[{name}\]'"
    ):
        set_attention_backend(name)
    assert attention.attend is F.scaled_dot_product_attention


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(ValueError, match="attention is 'flash3', expected one of 'sdpa', 'flash2'"):
        set_attention_backend("flash3")  # type: ignore[arg-type]


@pytest.mark.parametrize("name", OTHERS)
def test_cpu_is_refused_before_and_in_the_first_pass(
    name: AttentionBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    _install(monkeypatch, [])
    with pytest.raises(UserError, match=f"attention '{name}' runs on cuda only, the device is cpu"):
        set_attention_backend(name, "cpu")
    assert attention.attend is F.scaled_dot_product_attention
    set_attention_backend(name)
    with pytest.raises(
        UserError, match=rf"attention '{name}' got torch\.float32 on cpu, expected .*bfloat16"
    ):
        Attention(24, 2)(torch.randn(2, 5, 24))


@pytest.mark.parametrize("name", OTHERS)
def test_shapes_alone_need_no_package(name: AttentionBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    """FLOPs are counted on the meta device while a run trains with another backend."""
    _install(monkeypatch, [])
    set_attention_backend(name)
    assert Attention(24, 2).to("meta")(torch.empty(2, 5, 24, device="meta")).shape == (2, 5, 24)


@pytest.mark.parametrize("name", OTHERS)
def test_layouts_fit_the_block(name: AttentionBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    """The adapters, with stand-ins on the CPU that pretend to be CUDA tensors' functions."""
    seen: list[tuple[int, ...]] = []
    _install(monkeypatch, seen)
    block, x = Attention(24, 2).bfloat16(), torch.randn(3, 5, 24).bfloat16()
    expected = block(x)
    monkeypatch.setattr(Tensor, "is_cuda", True)
    set_attention_backend(name)
    assert torch.equal(block(x), expected)
    assert seen == [(3, 5, 2, 12)]  # B, N, H, d
