"""The operation that CONTRIBUTING.md tells to copy, as any other."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch.library import opcheck

from meduet_fast.kernels.launch import override_config
from meduet_fast.kernels.verify import require

FILE = Path(__file__).resolve().parents[3] / "docs" / "op_template.py"


@pytest.fixture(scope="module")
def template() -> Iterator[ModuleType]:
    """The module, with the lines that it would have in ``configs.json``."""
    spec = importlib.util.spec_from_file_location("op_template", FILE)
    assert spec
    assert spec.loader
    module = sys.modules["op_template"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    values = {"BLOCK": 32, "num_warps": 4, "num_stages": 1}
    with override_config("gated_silu_forward", values), override_config("gated_silu_backward", values):
        yield module


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_equals_its_definition(template: ModuleType, dtype: torch.dtype) -> None:
    x, gate = (torch.randn(5, 21, 3, dtype=dtype).transpose(0, 1).requires_grad_() for _ in range(2))
    require(template.gated_silu, template.gated_silu_reference, {"x": x, "gate": gate})


def test_registration(template: ModuleType) -> None:
    inputs = [torch.randn(40, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    opcheck(torch.ops.meduet_fast.gated_silu.default, inputs)


def test_other_shapes_are_refused(template: ModuleType) -> None:
    with pytest.raises(ValueError, match=r"gate is torch\.float32 \(4,\)"):
        template.gated_silu(torch.zeros(3), torch.zeros(4))
