"""Which implementation runs, and what is said about it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from meduet_fast.kernels import backend, kernel_backend, set_kernel_backend
from meduet_fast.kernels.dtypes import constant
from meduet_fast.kernels.launch import Options, config, launch, override_config


@pytest.fixture(autouse=True)
def _back_to_auto() -> Iterator[None]:
    yield
    set_kernel_backend("auto")


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match=r"kernel backend 'cuda', expected one of auto, triton, eager"):
        set_kernel_backend("cuda")  # type: ignore[arg-type]
    assert kernel_backend() == "auto"


@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton can run here")
def test_triton_where_it_cannot_run_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RuntimeError, match="needs a CUDA device, or TRITON_INTERPRET=1"):
        set_kernel_backend("triton")
    monkeypatch.setattr(backend, "triton", None)
    with pytest.raises(RuntimeError, match="package triton is not installed"):
        set_kernel_backend("triton")


def test_triton_on_another_device_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "_backend", "triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(RuntimeError, match="can't run on cpu tensors"):
        backend.use_triton(torch.zeros(1))
    with pytest.raises(RuntimeError, match="can't run on meta tensors"):
        backend.use_triton(torch.zeros(1, device="meta"))


def test_cpu_tensors_run_eagerly() -> None:
    assert not backend.use_triton(torch.zeros(1))
    set_kernel_backend("eager")
    assert not backend.use_triton(torch.zeros(1))


@pytest.mark.parametrize(
    ("capability", "chosen", "said"), [((9, 0), True, "Triton"), ((7, 5), False, "PyTorch")]
)
def test_auto_says_once_what_it_chose_and_why(
    capability: tuple[int, int],
    chosen: bool,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(backend, "_auto_choices", {})
    monkeypatch.setattr(backend, "triton", object())
    with caplog.at_level(logging.INFO, backend.__name__):
        assert [backend._auto_choice("cuda:0") for _ in range(3)] == [chosen] * 3
    (record,) = caplog.records
    assert f"cuda:0: {said} (compute capability {capability[0]}.{capability[1]}" in record.getMessage()


def test_configurations_come_from_the_table_unless_overridden() -> None:
    device = torch.device("cpu")
    table = config("contrast_small", device)
    assert table.keys() >= {"num_warps", "num_stages"}
    with override_config("contrast_small", {"num_warps": 1, "num_stages": 1}):
        assert config("contrast_small", device)["num_warps"] == 1
    assert config("contrast_small", device) == table
    with pytest.raises(KeyError, match="nothing"):
        config("nothing", device)


def test_launches_that_a_gpu_would_not_survive_are_refused() -> None:
    options = Options("some_op", {"num_warps": 4, "num_stages": 1})
    near, far = torch.zeros(1), torch.zeros(1, device="meta")
    with pytest.raises(ValueError, match="some_op: tensors on cpu and meta, expected one device"):
        launch(None, (1,), (near, far), {}, options)
    with pytest.raises(ValueError, match="some_op: too many samples or tokens for one launch"):
        launch(None, (1, 65536), (near,), {}, options)


def test_constants_are_marked_as_torch_marks_them() -> None:
    def marked(mark: Callable[..., Any]) -> dict[str, Any]:
        return vars(mark(lambda: None))

    assert marked(constant) == marked(torch.compiler.assume_constant_result) != {}
