"""Tell what machine this is, what is installed, and what it reaches."""

from __future__ import annotations

import importlib
import importlib.metadata
import shutil
import subprocess
import sys
import time

from .common import REHEARSE, emit, first_lines, start_cuda

TOOLS = ("git", "gcc", "g++", "nvcc", "ptxas", "ncu", "compute-sanitizer", "cuobjdump")
PACKAGES = (
    "torch", "triton", "numpy", "monai", "nibabel", "jsonargparse", "torchao", "xformers", "flash-attn",
    "flash-attn-4", "diffusers", "pytest", "pytest-xdist", "pytest-timeout", "tensorboard", "rich",
    "scikit-learn", "matplotlib", "safetensors", "setuptools",
)  # fmt: skip
NEEDED = ("meduet_fast.kernels", "meduet_fast.models", "meduet_fast.pretraining", "meduet_fast.cli")
OPTIONAL = ("torchao.float8", "xformers.ops", "diffusers", "monai.networks.nets")


def output(*command: str) -> str:
    """Return what a command says, or why it can't be run, in one line."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired) as error:
        return first_lines(error)
    return (done.stdout or done.stderr).strip().replace("\n", " ; ")


def version(name: str) -> str:
    """Return the version of a package, or "absent"."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "absent"


def imported(name: str, otherwise: str) -> None:
    """Import a module and tell how long it took; a failure is told with the status ``otherwise``."""
    began = time.perf_counter()
    try:
        importlib.import_module(name)
        emit(f"import {name}", "ok", seconds=round(time.perf_counter() - began, 1))
    except Exception as error:
        emit(f"import {name}", otherwise, first_lines(error))


def main() -> int:
    """Run the part; return the exit code."""
    query = "name,driver_version,memory.total,memory.used,clocks.sm,clocks.max.sm,power.limit,temperature.gpu"
    emit("nvidia-smi", "note", output("nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"))
    emit("tools", "note", ", ".join(f"{tool} {'yes' if shutil.which(tool) else 'NO'}" for tool in TOOLS))
    emit("disk", "note", output("df", "-h", "/tmp", "/dev/shm"))
    versions = " ".join(f"{name} {version(name)}" for name in PACKAGES)
    emit("versions", "note", f"python {sys.version.split()[0]} {versions}")
    start_cuda()
    import torch

    from benchmarks.harness import measure_peaks

    from .probe import milliseconds

    for name in NEEDED:
        imported(name, "fail")
    device = torch.device("cuda")
    if not REHEARSE:
        peaks = measure_peaks(device)
        emit("peaks", "ok", ", ".join(f"{key} {value / 1e12:.3f}e12" for key, value in peaks.items()))
    x = torch.zeros(1, device=device)
    launches = 10 if REHEARSE else 1000
    for _ in range(100):
        x.add_(1)
    torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(launches):
        x.add_(1)
    emit("launch", "ok", host_us=round(1e6 * (time.perf_counter() - began) / launches, 2))
    edge = 256 if REHEARSE else 8192
    try:  # whether float8 by rows is worth anything
        left, right = (torch.randn(edge, edge, device=device).to(torch.float8_e4m3fn) for _ in range(2))
        scales = torch.ones(edge, 1, device=device), torch.ones(1, edge, device=device)
        spent = milliseconds(
            lambda: torch._scaled_mm(left, right.t(), *scales, out_dtype=torch.bfloat16, use_fast_accum=True)
        )
        emit("float8 rowwise product", "ok", tflops=round(2e-9 * edge**3 / spent))
    except Exception as error:
        emit("float8 rowwise product", "note", first_lines(error))
    for name in OPTIONAL:
        imported(name, "note")
    return 0


if __name__ == "__main__":
    sys.exit(main())
