"""Run the real loop for a moment: ``pretrain --config vit_base`` on a store; its own figures, and a profile.

First with compiled blocks, without and with MFTD, some steps of each stretch under the profiler; then with a
CUDA graph; each in a process of its own. What fails is run again with less.
"""

from __future__ import annotations

import importlib
import inspect
import json
import os
import re
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .common import LOGS, REHEARSE, WORK, emit, first_lines, left, require_cuda, run_command, start_cuda

# Where the loop finds the function of one optimiser step, which has an argument `step`.
LOOP, STEP = "meduet_fast.engine.loop", "train_step"
MFTD, STEPS, PROFILED = (4, 8, 1) if REHEARSE else (30, 60, 3)
WINDOWS = {
    MFTD - PROFILED: "without MFTD",
    STEPS - PROFILED: "with MFTD",
}  # by the first step that is profiled
SETTLED = 0 if REHEARSE else 10  # steps of a stretch that its figures leave out
KINDS = {
    "attention": r"flash|fmha|attention|sdpa|cudnn_generated",
    "matrix products": r"gemm|cutlass|nvjet|xmma|cublas|sm90_|wgmma|splitK",
    "ours": r"patch_embed|streams_|style_|pool_|contrast_|reconstruction_|mix_t|token_|halves|group_norm_",
    "compiled": r"^triton_",
    "optimiser, average, clipping": r"multi_tensor|foreach|lerp",
    "copies": r"^Memcpy|^Memset|memcpy|copy_kernel|direct_copy",
    "LayerNorm": r"layer_norm|LayerNorm|GammaBeta",
}


def summarise(recorded: Any, wall: float, title: str) -> str:
    """Return a profile as text: how busy the device was, and its kernels by kind and by time.

    Args:
        recorded: a ``torch.profiler.profile`` of ``PROFILED`` steps.
        wall: seconds that they took.
        title: of the text.
    """
    from torch.autograd import DeviceType

    from benchmarks.profile_step import usage

    kernels: dict[str, list[float]] = {}
    spans = []
    for event in recorded.events() or []:
        annotation = event.name.startswith(
            ("ProfilerStep", "## ", "Optimizer.")
        )  # a whole step isn't a kernel
        if event.device_type == DeviceType.CUDA and not (
            annotation or getattr(event, "is_user_annotation", False)
        ):
            kernels.setdefault(event.name, []).append(event.time_range.elapsed_us())
            spans.append((event.time_range.start, event.time_range.end))
    total = sum(map(sum, kernels.values()))
    busy = usage(spans).busy
    lines = [
        f"{title}: {1e3 * wall / PROFILED:.1f} ms a step by the wall (recorded), kernels "
        f"{total / PROFILED / 1e3:.1f} ms, device busy {busy / PROFILED / 1e3:.1f} ms = "
        f"{100 * busy / (1e6 * wall):.0f} %, {len(spans) // PROFILED} kernels a step"
    ]
    kinds: dict[str, float] = {}
    for name, taken in kernels.items():
        kind = next((kind for kind, pattern in KINDS.items() if re.search(pattern, name)), "other")
        kinds[kind] = kinds.get(kind, 0.0) + sum(taken)
    ordered = sorted(kinds.items(), key=lambda item: -item[1])
    lines.append(", ".join(f"{kind} {100 * taken / total:.1f} %" for kind, taken in ordered))
    for name, taken in sorted(kernels.items(), key=lambda item: -sum(item[1]))[:25]:
        share, spent = 100 * sum(taken) / total, sum(taken) / PROFILED / 1e3
        lines.append(f"  {share:5.1f} %  {spent:8.3f} ms  {len(taken) // PROFILED:5d}x  {name[:110]}")
    return "\n".join(lines)


def child(name: str, profile: bool, arguments: list[str]) -> int:
    """Run the command in this process, some of its steps under the profiler."""
    start_cuda()
    import torch
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as Profiler

    from meduet_fast import cli

    loop = importlib.import_module(LOOP)
    plain = getattr(loop, STEP)
    signature = inspect.signature(plain)
    recorder: Any = None
    title, began = "", 0.0

    def recorded(*args: Any, **kwargs: Any) -> Any:
        nonlocal recorder, title, began
        number = signature.bind(*args, **kwargs).arguments["step"]
        if number in WINDOWS:
            torch.cuda.synchronize()
            title, began = WINDOWS[number], time.perf_counter()
            # The device alone: operators of the host would be a hundred times as many events to go through.
            recorder = Profiler(activities=[ProfilerActivity.CPU if REHEARSE else ProfilerActivity.CUDA])
            recorder.__enter__()
        result = plain(*args, **kwargs)
        if number + 1 - PROFILED in WINDOWS:
            torch.cuda.synchronize()
            wall = time.perf_counter() - began
            try:
                recorder.__exit__(None, None, None)
                text = summarise(recorder, wall, title)
                print(text, flush=True)
                emit(f"profile {name}", "note", "; ".join(text.splitlines()[:2]))
                with (LOGS / f"profile-{name}.txt").open("a") as file:
                    file.write(text + "\n\n")
                recorder.export_chrome_trace(str(LOGS / "trace.json.gz"))
            except Exception as error:  # the run goes on
                emit(f"profile {name}", "fail", first_lines(error))
        return result

    if profile:
        setattr(loop, STEP, recorded)
    return cli.main(arguments)


def run(name: str, data: Path, options: Sequence[str], profile: bool) -> bool:
    """Run the command once and tell its figures; return whether it went through."""
    short = name.replace(", ", "-").replace(" ", "-")
    output, log = WORK / "runs" / short, LOGS / f"pretrain-{short}.txt"
    shutil.rmtree(output, ignore_errors=True)
    command = [
        sys.executable,
        "-m",
        __spec__.name,
        "--child",
        short,
        "profile" if profile else "plain",
        "pretrain",
    ]
    command += ["--config", "vit_base", "--data", str(data), "--output", str(output), *options]
    began = time.perf_counter()
    why, lines = run_command(command, log)
    metrics = output / "metrics.jsonl"
    records = [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.exists() else []
    for title, first, end in (("without MFTD", 0, MFTD), ("with MFTD", MFTD, STEPS)):
        # A record speaks of the steps since the one before; those that were profiled are slow.
        steady = [record for record in records if first + SETTLED < record["step"] + 1 <= end - PROFILED]
        if steady:
            last = steady[-1]
            names = ("total", "reconstruction", "siqc", "mftd")
            emit(
                f"{name}, {title}", "ok", "losses: " + " ".join(f"{key} {last[key]:.3f}" for key in names),
                samples_per_s=round(last["samples_per_s"], 1),
                best=round(max(record["samples_per_s"] for record in steady), 1),
                mfu=round(last.get("mfu_percent", 0), 1), memory_gb=round(last["memory_mb"] / 1e3, 1),
                data_wait_percent=round(last["data_wait_percent"], 2), step=last["step"],
            )  # fmt: skip
    print("\n".join(line for line in lines if " ms  " in line or "a step by the wall" in line), flush=True)
    seconds = round(time.perf_counter() - began)
    emit(name, "fail" if why else "ok", why, seconds=seconds, records=len(records))
    return not why


def store() -> Path:
    """Return a store that was sent along, the demo's, or one of noise."""
    for carried in (Path(os.environ["KIT"], "store"), Path(os.environ["ROOT"], "demo", "store")):
        if any(carried.glob("index.json*")):
            return carried
    from benchmarks.bench_loader import make_store

    emit("store", "note", "none was sent along: one of noise")
    path = WORK / "noise-store"
    if not path.exists():
        make_store(path)
    return path


def main() -> int:
    """Run the part; return the exit code."""
    if sys.argv[1:2] == ["--child"]:
        return child(sys.argv[2], sys.argv[3] == "profile", sys.argv[4:])
    require_cuda()
    data = store()
    common = ["--steps", str(STEPS), "--mftd_start_step", str(MFTD), "--log_every", "2" if REHEARSE else "5"]
    common += ["--workers", "0" if REHEARSE else "8", "--checkpoint_every", "100000"]
    if REHEARSE:
        common += ["--batch_size", "2", "--model.embed_dim", "24", "--model.depth", "1"]
        common += ["--model.num_heads", "2", "--model.decoder_embed_dim", "24"]
        common += ["--model.decoder_depth", "1", "--model.decoder_num_heads", "2"]
    compiled = run("compiled", data, [*common, "--compile", "true"], profile=True)
    if not compiled and left() > 15:
        run("not compiled", data, common, profile=True)
    if left() > 20:
        options = ["--compile", "true" if compiled else "false", "--cuda_graph", "true"]
        run("compiled, CUDA graph", data, [*common, *options], profile=False)
    else:
        emit("compiled, CUDA graph", "skip", f"no time left ({left():.0f} s)")
    shutil.rmtree(WORK / "runs", ignore_errors=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
