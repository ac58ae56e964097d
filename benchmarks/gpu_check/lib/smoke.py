"""Run every standard workload once, forward and backward, in bfloat16 and float32, held to its definition.

Several processes share the GPU, so that Triton compiles on all processors. A process whose GPU context is
lost (a kernel read what it may not) says so, and another one takes what is left. With ``--sanitize`` those
workloads that failed here before, or the one that KIT_ONLY names, run under compute-sanitizer.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Sequence

from .common import LOGS, REHEARSE, emit, first_lines, left, require_cuda, start_cuda
from .table import records

HEAVY = 2e11  # FLOP of a forward pass: last
TOO_HEAVY = 5e12  # left to the tests
STEP = "pretraining step, kernels against eager"
LOST = 3  # exit code of a process whose GPU context is gone
MODULE = (sys.executable, "-m", f"{__package__}.smoke")


def items() -> list[str]:
    """Name what is run, "OP-LABEL DTYPE", the light ones first."""
    from meduet_fast.kernels.workloads import workloads

    found = []
    for workload in workloads():
        flops = workload.cost(2)[0].flops
        if flops <= TOO_HEAVY:
            for dtype in ("bfloat16", "float32"):
                found.append((flops > HEAVY, dtype == "float32", f"{workload.op}-{workload.label} {dtype}"))
    return [STEP, *(name for *_, name in sorted(found, key=lambda item: item[:2]))]


def check_step() -> str:
    """Compare losses and gradient of a small network with our kernels and without; return by how much."""
    import torch

    from benchmarks.published_step import losses_and_gradients, relative
    from benchmarks.step_parts import make_batch, make_models, plain_kernels
    from meduet_fast.models import MeDUETConfig
    from meduet_fast.pretraining import ObjectiveConfig, pretraining_losses

    config = MeDUETConfig(
        latent_size=16, patch_size=4, embed_dim=192, depth=2, num_heads=3, decoder_embed_dim=96,
        decoder_depth=1, decoder_num_heads=3, num_domains=3,
    )  # fmt: skip
    device = torch.device("cuda")
    models, batch = make_models(config, device), make_batch(config, 8, device)
    with plain_kernels():
        wanted = losses_and_gradients(pretraining_losses, *models, batch, ObjectiveConfig())
    found = losses_and_gradients(pretraining_losses, *models, batch, ObjectiveConfig())
    losses = max(
        relative(found[name], value) for name, value in wanted.items() if not name.startswith("grad ")
    )
    gradients = (
        torch.cat([values[name].flatten() for name in wanted if name.startswith("grad ")])
        for values in (found, wanted)
    )
    error = relative(*gradients)
    told = f"losses differ by {losses:.1e}, gradient by {error:.1e}"
    if not (losses < 1e-3 and error < 5e-3):
        raise AssertionError(told)
    return told


def check_workload(name: str) -> str:
    """Hold one workload to its definition; return how near it came.

    Raises:
        AssertionError: if it errs three times as much as allowed; on one neighbour alone PyTorch's own error,
            from which that follows, may be small by luck.
    """
    import torch

    from meduet_fast.kernels.verify import compare_to, expect
    from meduet_fast.kernels.workloads import workloads

    name, dtype = name.rsplit(" ", 1)
    workload = next(item for item in workloads() if f"{item.op}-{item.label}" == name)
    torch.manual_seed(0)
    inputs = workload.inputs("cuda", getattr(torch, dtype))
    compared = compare_to(workload.run, expect(workload.reference, inputs, neighbours=1), inputs)
    wrong = [item for item in compared if not item.passed]
    told = "; ".join(f"{item.name} off by {item.error:.3g}, allowed {item.allowed:.3g}" for item in wrong)
    if any(not item.error <= 3 * item.allowed for item in wrong):
        raise AssertionError(told)
    share = max((item.error / item.allowed for item in compared if item.allowed), default=0.0)
    return told or f"at most {100 * share:.0f} % of what is allowed"


def work(todo: Sequence[str]) -> int:
    """Do these items, a line of JSON each."""
    start_cuda()
    import torch

    from meduet_fast.kernels import set_kernel_backend

    for name in todo:
        if left() < 3:
            break
        began = time.perf_counter()
        status, lost = "ok", False
        try:
            set_kernel_backend("auto" if REHEARSE or name == STEP else "triton")
            text = check_step() if name == STEP else check_workload(name)
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
        except Exception as error:
            status, text = "fail", first_lines(error)
            try:
                torch.zeros(1, device="cuda").item()
            except Exception:
                lost, text = True, text + " [GPU context lost]"
        seconds = round(time.perf_counter() - began, 1)
        print(
            "RESULT " + json.dumps({"name": name, "status": status, "text": text, "seconds": seconds}),
            flush=True,
        )
        if lost:
            return LOST
    return 0


def watch(todo: Sequence[str], lock: threading.Lock) -> None:
    """Give items to a process, and to another one if it dies; tell their results."""
    remaining = list(todo)
    while remaining and left() > 8:
        with (LOGS / f"smoke-{threading.get_ident()}.txt").open("a+", encoding="utf-8") as errors:
            process = subprocess.Popen(
                [*MODULE, "--worker", json.dumps(remaining)], stdout=subprocess.PIPE, stderr=errors, text=True
            )
            assert process.stdout is not None
            for line in process.stdout:
                if line.startswith("RESULT "):
                    result = json.loads(line.removeprefix("RESULT "))
                    remaining.remove(result["name"])
                    with lock:
                        emit(**result)
            code = process.wait()
            if code == 0:
                break
            if code != LOST and remaining and left() > 8:
                errors.seek(0)
                last = " | ".join(errors.read().splitlines()[-3:])
                with lock:
                    emit(remaining.pop(0), "fail", f"the process ended with {code}: {last}")
    for name in remaining:
        with lock:
            emit(name, "skip", "no time left")


def sanitize() -> int:
    """Run what failed, or what KIT_ONLY names, under compute-sanitizer."""
    if not shutil.which("compute-sanitizer"):
        emit("compute-sanitizer", "skip", "is not installed")
        return 0
    failed = [
        record["name"] for record in records() if (record["part"], record["status"]) == ("smoke", "fail")
    ]
    os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
    for name in [os.environ["KIT_ONLY"]] if "KIT_ONLY" in os.environ else failed:
        if left() < 16:
            emit(name, "skip", "no time left")
            continue
        command = ("compute-sanitizer", "--tool", "memcheck", "--print-limit", "5", *MODULE, "--only", name)
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=left() - 6)
        except subprocess.TimeoutExpired:
            emit(name, "skip", "took too long")
            continue
        told = [line for line in done.stdout.splitlines() if not line.startswith("=========     Host")]
        print("\n".join(told[-25:]), flush=True)
        emit(name, "ok" if "ERROR SUMMARY: 0 errors" in done.stdout else "fail", " | ".join(told[-3:]))
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the part; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--worker", type=json.loads, help="do these items, in this process")
    parser.add_argument("--only", help="items whose name contains this, in this process")
    parser.add_argument("--sanitize", action="store_true")
    options = parser.parse_args(arguments)
    if options.sanitize:
        return sanitize()
    if options.worker is not None:
        return work(options.worker)
    require_cuda()
    todo = items()
    if options.only:
        return work([name for name in todo if options.only in name])
    if REHEARSE:
        todo = [STEP, *[name for name in todo if "mix_tables-64" in name or "256x256x192" in name][:3]]
    lock, processes = threading.Lock(), 1 if REHEARSE else 6
    threads = [
        threading.Thread(target=watch, args=(todo[number::processes], lock)) for number in range(processes)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return 0


if __name__ == "__main__":
    sys.exit(main())
