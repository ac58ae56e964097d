"""What runs on a GPU, on tensors of CUDA without values: nothing meets a tensor of the CPU, nothing waits."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.overrides import TorchFunctionMode

from meduet_fast.kernels import set_kernel_backend
from meduet_fast.layers import positions
from meduet_fast.synthesis.config import DiffusionConfig
from meduet_fast.synthesis.pipeline import MeDUETPipeline, SamplingSettings, _Order
from meduet_fast.synthesis.samplers import SAMPLERS, build_scheduler
from meduet_fast.synthesis.sources import Style
from meduet_fast.synthesis.train import build_network, build_task

from .tasks import CONFIG, DIM, GRID, STYLE_DIM, TABLE, WINDOW, made_up_batch

CUDA = torch.device("cuda:0")
CUDA_PLACE, META_PLACE = 1, 14  # in PyTorch's table of devices


class FakeCuda(TorchFunctionMode):
    """Make tensors for CUDA that have no values; all other calls are as they are.

    Attributes:
        copied: tensors that came from the CPU.
    """

    def __init__(self) -> None:
        super().__init__()
        self.fake, self.copied = FakeTensorMode(allow_non_fake_inputs=True), 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if CUDA not in (*(item for item in args if isinstance(item, torch.device)), kwargs.get("device")):
            return func(*args, **kwargs)
        self.copied += func is torch.tensor or (bool(args) and type(args[0]) is Tensor)
        with self.fake:
            return func(*args, **kwargs)

    def move(self, module: nn.Module) -> None:
        """Do what ``to`` does, to parameters and buffers."""
        for part in module.modules():
            for held in (part._parameters, part._buffers):
                for name, item in held.items():
                    if item is not None:
                        moved = torch.empty(item.shape, dtype=item.dtype, device=CUDA)
                        parameter = isinstance(item, nn.Parameter)
                        held[name] = nn.Parameter(moved, item.requires_grad) if parameter else moved


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeCuda]:
    """PyTorch without CUDA does not know how to make it the current device; what "meta" does will do."""
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    library = ctypes.CDLL(str(next(Path(torch.__file__).parent.glob("lib/libc10.*"))))
    guards = (ctypes.c_void_p * (META_PLACE + 1)).in_dll(library, "_ZN3c104impl26device_guard_impl_registryE")
    before = guards[CUDA_PLACE]
    guards[CUDA_PLACE] = before or guards[META_PLACE]
    positions._kept.cache_clear()
    set_kernel_backend("eager")
    with FakeCuda() as mode:
        yield mode
    set_kernel_backend("auto")
    positions._kept.cache_clear()
    guards[CUDA_PLACE] = before


ALIGNED = DiffusionConfig(times="logit_normal", content_noise=0.1, align=0.5)
EPSILON = DiffusionConfig(objective="epsilon", align=0.5)


@pytest.mark.parametrize(
    ("network", "content", "diffusion"),
    [
        ("transformer", "tokens", ALIGNED),
        ("transformer", "pooled", EPSILON),
        ("unet", "tokens", EPSILON),
    ],
)
def test_a_step_of_training(cuda: FakeCuda, network: Any, content: Any, diffusion: DiffusionConfig) -> None:
    """With alignment and behind it; a tensor's value that is asked for would raise."""
    config = replace(CONFIG, network=network, content=content, diffusion=diffusion)
    task = build_task(config, TABLE, build_network(config, TABLE))
    cuda.move(task)
    batch = made_up_batch(2, CUDA)
    for step in (0, 3):
        copied = cuda.copied  # positions are once
        prepared = task.prepare(dict(batch), torch.Generator())
        with torch.autocast("cuda", torch.bfloat16):
            losses = task(prepared, step)
        task.after_step(step)
        assert {(loss.device, loss.dtype) for loss in losses.values()} == {(CUDA, torch.float32)}
    assert cuda.copied == copied


def order(seed: int, content: Tensor | None, style: Tensor | None, size: tuple[int, int, int]) -> _Order:
    """Of a content and a style that are where they are."""
    scan: Any = content is not None and SimpleNamespace(
        factor=lambda *_: content, latents=lambda *_: torch.zeros(4, *size)
    )
    return _Order(
        seed, scan or None, None if style is None else Style({}, style, None), (0, 0, 0), size, (2, 2, 2)
    )


@pytest.mark.parametrize(
    ("objective", "sampler", "size"),
    [("flow", "euler", (6, 6, 4)), *((of, name, WINDOW) for of in SAMPLERS for name in SAMPLERS[of])],
)
def test_sampling(cuda: FakeCuda, objective: Any, sampler: str, size: tuple[int, int, int]) -> None:
    """Factors of a table are on the device, those of a scan on the CPU, and may be of one batch."""
    config = replace(CONFIG, content="tokens", diffusion=DiffusionConfig(objective=objective))
    pipeline = MeDUETPipeline.__new__(MeDUETPipeline)
    pipeline.transformer, pipeline.unet = build_network(config, TABLE), None
    cuda.move(pipeline.transformer)
    here = torch.zeros(*GRID, DIM), torch.zeros(STYLE_DIM)
    there = torch.empty(*GRID, DIM, device=CUDA), torch.empty(STYLE_DIM, device=CUDA)
    asked = [order(0, *there, size), order(1, *here, size), order(2, here[0], None, size)]
    settings = SamplingSettings(3, strength=0.7, content_scale=2, style_scale=2, precision="bfloat16")
    made = pipeline._denoise(asked, build_scheduler(sampler, objective), settings, None)
    assert (made.shape, made.dtype, made.device.type) == ((3, 4, *size), torch.float32, "cpu")
