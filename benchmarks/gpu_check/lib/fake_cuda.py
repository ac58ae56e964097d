"""A CPU that says it is a GPU: for rehearsing scripts, never for a figure.

Tensors asked for on "cuda" are made on the CPU, torch.cuda's functions answer as an H100's would,
torch.compile compiles nothing, a CUDA graph works anew at each replay. Kernels don't run: PyTorch's
definitions do.
"""

from __future__ import annotations

import contextlib
import importlib
import itertools
import time
from types import SimpleNamespace
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


def _cpu(value: Any) -> Any:
    if isinstance(value, torch.device) and value.type == "cuda":
        return torch.device("cpu")
    if isinstance(value, str) and (value == "cuda" or value.startswith("cuda:")):
        return "cpu"
    return value


class _Mode(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.device, getattr(torch.device, "__new__", None)):
            return func(*args, **(kwargs or {}))
        kwargs = {key: _cpu(value) for key, value in (kwargs or {}).items()}
        if kwargs.get("pin_memory"):
            kwargs.pop("pin_memory")
        if getattr(func, "__name__", "") in ("pin_memory", "record_stream"):
            return args[0]
        return func(*(_cpu(value) for value in args), **kwargs)


class _Event:
    def __init__(self, *_: Any, **__: Any) -> None:
        self.at = 0.0

    def record(self, *_: Any) -> None:
        self.at = time.perf_counter()

    def elapsed_time(self, other: _Event) -> float:
        return max(1e3 * (other.at - self.at), 1e-3)

    def synchronize(self) -> None: ...
    def wait(self, *_: Any) -> None: ...
    def query(self) -> bool:
        return True


class _Stream:
    cuda_stream = 0

    def __init__(self, *_: Any, **__: Any) -> None: ...
    def wait_stream(self, *_: Any) -> None: ...
    def wait_event(self, *_: Any) -> None: ...
    def synchronize(self) -> None: ...
    def record_event(self, *_: Any) -> _Event:
        return _Event()


class _Generator(torch.Generator):
    def __new__(cls, device: Any = "cpu") -> Any:
        new: Any = super().__new__
        return new(cls, "cpu")

    def __init__(self, device: Any = "cpu") -> None: ...


def put(where: Any, **names: Any) -> None:
    """Put something else in the place of these attributes."""
    for name, value in names.items():
        setattr(where, name, value)


def install() -> None:
    """Make this process take its CPU for a GPU, for good."""
    importlib.import_module("torch._dynamo")  # before anything is replaced
    properties = SimpleNamespace(
        name="stand-in, no GPU (code paths of an H100)", L2_cache_size=2**20, multi_processor_count=132,
        total_memory=80 * 2**30, major=9, minor=0,
    )  # fmt: skip
    answers = {
        "is_available": True, "device_count": 1, "current_device": 0, "get_device_name": properties.name,
        "get_device_capability": (9, 0), "get_device_properties": properties, "synchronize": None,
        "empty_cache": None, "memory_allocated": 0, "max_memory_allocated": 0, "memory_reserved": 0,
        "reset_peak_memory_stats": None, "_sleep": None, "set_sync_debug_mode": None,
        "is_bf16_supported": True,
        "set_device": None, "init": None, "is_current_stream_capturing": False,
    }  # fmt: skip
    put(torch.cuda, **{name: lambda *_, _answer=answer, **__: _answer for name, answer in answers.items()})
    put(
        torch.cuda, Event=_Event, Stream=_Stream, current_stream=lambda *_: _Stream(),
        stream=lambda *_: contextlib.nullcontext(),
    )  # fmt: skip
    put(
        torch, Generator=_Generator,
        compile=lambda model=None, **_: model if model is not None else (lambda inner: inner),
    )  # fmt: skip
    put(torch.accelerator, is_available=lambda: False)  # or the loader pins memory by the real CUDA's driver
    put(torch.Tensor, record_stream=lambda self, *_: None, pin_memory=lambda self, *_: self)
    put(torch.Tensor, cuda=lambda self, *_, **__: self)
    to = torch.nn.Module.to

    def move(self: Any, *args: Any, **kwargs: Any) -> Any:
        return to(self, *map(_cpu, args), **{key: _cpu(value) for key, value in kwargs.items()})

    put(torch.nn.Module, compile=lambda self, *_, **__: None, cuda=lambda self, *_, **__: self, to=move)
    _Mode().__enter__()

    from meduet_fast.engine import cuda_graph

    def capture(work: Any) -> Any:
        for _ in range(cuda_graph.WARM_UP):
            found = work()

        def replay() -> None:
            for name, value in work().items():
                found[name].copy_(value)

        return found, replay

    put(cuda_graph, capture=capture)


def small_benchmarks() -> None:
    """Leave each benchmark one case that a CPU can do, and no peaks."""
    from benchmarks import bench_attention, bench_model, bench_step, harness, run, step_parts
    from meduet_fast.models import MeDUETConfig

    config = MeDUETConfig(
        latent_size=8, patch_size=4, embed_dim=24, depth=1, num_heads=2, decoder_embed_dim=12,
        decoder_depth=1, decoder_num_heads=2,
    )  # fmt: skip
    setting = step_parts.Setting("small", config)
    measure, time_cases = run.measure, run.time_cases
    put(bench_step, VIT_BASE=setting)
    put(bench_model, VIT_BASE=setting)
    put(bench_attention, SIZES=((2, 17),))
    put(harness, MIN_ROUNDS=1, MAX_ROUNDS=1)
    peaks = {"copy_bytes_per_s": 1e10, "matrix_flops_per_s_bfloat16": 1e11}
    put(run, measure_peaks=lambda device: peaks)
    put(run, time_cases=lambda cases, *limits: time_cases(itertools.islice(cases, 1), *limits))
    put(run, measure=lambda share, device, quick, *limits: measure(share, device, True, *limits))
