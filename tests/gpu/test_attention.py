"""Backends of attention that are installed, held to PyTorch's."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from meduet_fast.errors import UserError
from meduet_fast.kernels.verify import FACTOR
from meduet_fast.layers.attention import AttentionBackend, attention_backend


def _heads(width: int) -> list[Tensor]:
    """Queries, keys and values (2, 3, 217, width), bfloat16, laid out as by a block's projection."""
    generator = torch.Generator("cuda").manual_seed(0)
    qkv = torch.randn(2, 217, 3, 3, width, device="cuda", generator=generator).bfloat16()
    return [x.detach().requires_grad_() for x in qkv.permute(2, 0, 3, 1, 4).unbind(0)]


def _relative(value: Tensor | None, truth: Tensor | None) -> float:
    assert value is not None
    assert truth is not None
    return ((value.double() - truth).norm() / truth.norm()).item()


@pytest.mark.parametrize("name", ["flash2", "flash4", "xformers"])
@pytest.mark.parametrize("width", [64, 32])  # of ViT-B's encoder and decoder
def test_outputs_and_gradients_agree(name: AttentionBackend, width: int) -> None:
    """They may err three times as much as PyTorch's do against float64."""
    try:
        attend = attention_backend(name)
    except UserError as error:
        pytest.skip(str(error))
    heads = _heads(width)
    exact = [x.detach().double().requires_grad_() for x in heads]
    gradient = torch.randn_like(heads[0])
    truth = F.scaled_dot_product_attention(*exact)
    truth.backward(gradient.double())
    errors = []
    for function in (F.scaled_dot_product_attention, attend):
        for x in heads:
            x.grad = None
        result = function(*heads)
        result.backward(gradient)
        gradients = [_relative(x.grad, y.grad) for x, y in zip(heads, exact, strict=True)]
        errors.append([_relative(result, truth), *gradients])
    assert all(ours <= FACTOR * theirs for theirs, ours in zip(*errors, strict=True)), errors
