"""Compile every shipped kernel ahead of time, without a GPU, and say what it costs.

``python -m meduet_fast.kernels.inspect --arch 80 90 100`` compiles each launch of each standard workload,
forward and backward, as the public function makes it, with the configuration of the table. It prints
registers, spills, shared memory, tensor-core instructions and wide loads beside bytes, FLOPs and the time
that these take at least. It exits with 1 on a spill, on more shared memory than the chip has, on a matrix
kernel without tensor-core instructions, or on a product whose operands may be overwritten while it runs.

``--json`` writes what a reviewer must see change, a line for each configuration and architecture that is
noteworthy: spills, tensor cores, shared memory over 48 KiB. Register counts and the like differ with every
Triton and stay out; the file is the same for all versions that the project runs on.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .launch import Launch, record_launches
from .verify import outputs_and_gradients
from .workloads import Workload, further_workloads, heavy_workloads, standard_workloads, workloads

SHARED_LIMIT = 48 * 1024  # bytes; what every chip gives a program without being asked
# Bytes/s of memory, dense bf16 FLOP/s, shared memory of a program in bytes (vendor data sheets).
CHIPS = {
    80: {"A100": (2.04e12, 312e12, 163 * 1024)},
    90: {"H100": (3.35e12, 989e12, 227 * 1024), "H200": (4.8e12, 989e12, 227 * 1024)},
    100: {"B200": (8.0e12, 2250e12, 227 * 1024)},
}
TENSOR_CORE = re.compile(r"\b(?:HMMA|HGMMA|UTC[A-Z]*MMA|DMMA|QGMMA)\b")
WIDE_LOAD = re.compile(r"\b(?:LDG\.E\.(?:\w+\.)*128|LDGSTS\.E\.(?:\w+\.)*128|UTMALDG)")
# On sm_90 a WGMMA may read its left factor from registers. They must stay as they are until it is waited for;
# in a loop that waits for all groups but the last Triton reuses them too early (Triton issues 9433, 11781).
REGISTER_FACTOR = re.compile(r"wgmma\.mma_async[^{;]*\{[^}]*\}\s*,\s*\{")
IN_FLIGHT = re.compile(r"wgmma\.wait_group\.sync\.aligned\s+[1-9]")
POINTERS = {
    torch.float64: "*fp64", torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16",
    torch.int64: "*i64", torch.int32: "*i32", torch.uint8: "*u8", torch.bool: "*i1",
}  # fmt: skip


@dataclass(frozen=True)
class Compiled:
    """What the compiler made of one launch.

    Attributes:
        op, workload: which standard workload, and its dtype.
        kernel: name of the kernel.
        config: name of its configuration.
        arch: architecture, e.g. 90.
        registers: of a thread.
        spill_bytes: of a thread, stores and loads.
        shared_bytes: of a program.
        tensor_core: matrix instructions in the code.
        wide_loads: loads of 16 bytes a thread, or by the copy engine.
        matrix: whether the workload needs tensor cores and this kernel holds its matrix product.
        problem: what is wrong, or empty.
    """

    op: str
    workload: str
    kernel: str
    config: str
    arch: int
    registers: int
    spill_bytes: int
    shared_bytes: int
    tensor_core: int
    wide_loads: int
    matrix: bool
    problem: str


def _signature(
    launch: Launch,
) -> tuple[dict[str, str], dict[tuple[int, ...], Any], dict[tuple[int, ...], Any]]:
    """Return types, constants and divisibility of a launch, as Triton's own launcher specialises them."""
    names = launch.kernel.arg_names
    signature: dict[str, str] = {}
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], Any] = {}
    values = dict(zip(names, launch.arguments, strict=False)) | launch.constants
    for position, name in enumerate(names):
        value = values[name]
        if name in launch.constants or value is None or (type(value) is int and value == 1):
            signature[name] = "constexpr"
            constants[(position,)] = value
        elif isinstance(value, Tensor):
            signature[name] = POINTERS[value.dtype]
            attributes[(position,)] = [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i64" if abs(value) >= 2**31 else "i32"
            if value % 16 == 0:
                attributes[(position,)] = [["tt.divisibility", 16]]
    return signature, constants, attributes


def _disassemble(cubin: bytes) -> tuple[str, str]:
    """Return resource usage and machine code of a cubin, by the tools inside the triton package."""
    import triton.backends.nvidia

    tools = Path(triton.backends.nvidia.__file__).parent / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = subprocess.run(
            [tools / "cuobjdump", "-res-usage", file.name], check=True, capture_output=True, text=True
        )
        code = subprocess.run([tools / "nvdisasm", file.name], check=True, capture_output=True, text=True)
    return usage.stdout + usage.stderr, code.stdout


def compile_launch(launch: Launch, workload: Workload, dtype: torch.dtype, arch: int) -> Compiled:
    """Compile one recorded launch of a workload for an architecture."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    source = ASTSource(launch.kernel, *_signature(launch))
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=launch.options)
    usage, code = _disassemble(compiled.asm["cubin"])
    found = re.search(r"REG:(\d+) STACK:(\d+).*?LOCAL:(\d+)", usage)
    if found is None:
        raise RuntimeError(f"{launch.config}: resource usage not understood: {usage!r}")
    registers, stack, local = (int(group) for group in found.groups())
    spills = stack + local if re.search(r"\b(?:STL|LDL)\b", code) else 0
    shared = compiled.metadata.shared
    tensor_core = len(TENSOR_CORE.findall(code))
    # A matrix workload has small helpers too; the ones that multiply say so in their source.
    matrix = workload.matrix and dtype.itemsize == 2 and "tt.dot" in compiled.asm["ttir"]
    limit = min(chip[2] for chip in CHIPS[arch].values())
    ptx = compiled.asm["ptx"]
    problems = {
        f"spills {spills} bytes": spills > 0,
        f"needs {shared} bytes of shared memory, the chip has {limit}": shared > limit,
        "has no tensor-core instruction": matrix and tensor_core == 0,
        "multiplies a left factor in registers while products are in flight": bool(
            REGISTER_FACTOR.search(ptx) and IN_FLIGHT.search(ptx)
        ),
    }
    return Compiled(
        workload.op, f"{workload.label} {str(dtype).removeprefix('torch.')}", launch.kernel.__name__,
        launch.config, arch, registers, spills, shared, tensor_core, len(WIDE_LOAD.findall(code)), matrix,
        "; ".join(text for text, wrong in problems.items() if wrong),
    )  # fmt: skip


def compile_workload(workload: Workload, dtype: torch.dtype, arch: int) -> list[Compiled]:
    """Compile every different launch of a workload's forward and backward."""
    with record_launches(arch) as launches:
        outputs_and_gradients(workload.run, workload.inputs("meta", dtype))
    if not launches:
        raise RuntimeError(f"{workload.op} {workload.label}: launches no kernel")
    different = {
        (launch.kernel.__name__, str(_signature(launch)), str(launch.options)): launch for launch in launches
    }
    return [compile_launch(launch, workload, dtype, arch) for launch in different.values()]


def _compile_numbered(number: int, dtype: torch.dtype, arch: int) -> list[Compiled]:
    """Compile in a worker process, to which kernels cannot be sent."""
    torch.set_num_threads(1)
    return compile_workload(workloads()[number], dtype, arch)


def inspected() -> Iterator[tuple[int, torch.dtype]]:
    """Yield the number of every workload with its first dtype, and float32 once for each op and list."""
    number = 0
    for some in (standard_workloads(), further_workloads() + heavy_workloads()):
        seen: set[str] = set()
        for workload in some:
            for dtype in workload.dtypes:
                if dtype == workload.dtypes[0] or (dtype == torch.float32 and workload.op not in seen):
                    yield number, dtype
            seen.add(workload.op)
            number += 1


def compile_all(archs: Sequence[int]) -> list[Compiled]:
    """Compile all standard workloads for some architectures, on all processors."""
    jobs = [(number, dtype, arch) for number, dtype in inspected() for arch in archs]
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
        return [item for found in pool.map(_compile_numbered, *zip(*jobs, strict=True)) for item in found]


def summarize(compiled: Sequence[Compiled]) -> dict[str, str]:
    """Return what a reviewer must see change, by configuration and architecture; silent where nothing is."""
    launches: dict[str, list[Compiled]] = {}
    for item in sorted(compiled, key=lambda item: (item.config, item.arch)):
        launches.setdefault(f"{item.config} sm_{item.arch}", []).append(item)
    lines = {}
    for name, items in launches.items():
        counts = {
            "use tensor cores": sum(item.tensor_core > 0 for item in items),
            "take over 48 KiB": sum(item.shared_bytes > SHARED_LIMIT for item in items),
            "spill": sum(item.spill_bytes > 0 for item in items),
        }
        noted = [f"{count} {text}" for text, count in counts.items() if count]
        if noted:
            lines[name] = f"of {len(items)} launches " + ", ".join(noted)
    return lines


def floors(workload: Workload) -> dict[str, Any]:
    """Compute bytes and FLOPs of forward and backward, and the microseconds that each chip needs at least."""
    row: dict[str, Any] = {"op": workload.op, "workload": workload.label}
    for name, cost in zip(("forward", "backward"), workload.cost(torch.bfloat16.itemsize), strict=True):
        row[name] = {"megabytes": round(cost.bytes / 1e6, 3), "gigaflops": round(cost.flops / 1e9, 3)}
        for chips in CHIPS.values():
            for chip, (bandwidth, rate, _) in chips.items():
                seconds = max(cost.bytes / bandwidth, cost.flops / rate if workload.matrix else 0.0)
                row[name][f"{chip}_us"] = round(1e6 * seconds, 2)
    return row


def _print_table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    cells = [[str(cell) for cell in row] for row in (header, *rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    for row in cells:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m meduet_fast.kernels.inspect", description=__doc__)
    parser.add_argument("--arch", type=int, nargs="+", choices=sorted(CHIPS), default=sorted(CHIPS))
    parser.add_argument("--json", type=Path, help="also write the result to this file")
    parser.add_argument("--check", type=Path, help="compare with a file that --json wrote; differences fail")
    options = parser.parse_args(arguments)

    compiled = compile_all(options.arch)
    least = [floors(workload) for workload in workloads()]
    _print_table(
        ("op", "workload", "kernel", "sm", "regs", "spill", "shared", "mma", "16B loads", "problem"),
        [
            (c.op, c.workload, c.kernel, c.arch, c.registers, c.spill_bytes, c.shared_bytes, c.tensor_core,
             c.wide_loads, c.problem)
            for c in compiled
        ],
    )  # fmt: skip
    print()
    chips = [chip for arch in options.arch for chip in CHIPS[arch]]
    _print_table(
        ("op", "workload", "pass", "MB", "GFLOP", *(f"floor {chip} (us, computed)" for chip in chips)),
        [
            (row["op"], row["workload"], name, row[name]["megabytes"], row[name]["gigaflops"],
             *(row[name][f"{chip}_us"] for chip in chips))
            for row in least
            for name in ("forward", "backward")
        ],
    )  # fmt: skip
    failed = [f"{c.kernel} ({c.workload}, sm_{c.arch}): {c.problem}" for c in compiled if c.problem]
    found = summarize(compiled)
    if options.json:
        lines = [f" {json.dumps(name)}: {json.dumps(text)}" for name, text in found.items()]
        options.json.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
    if options.check:
        known = json.loads(options.check.read_text(encoding="utf-8"))
        for name in sorted(known.keys() | found.keys()):
            was, now = known.get(name, "nothing to note"), found.get(name, "nothing to note")
            if was != now:
                failed.append(
                    f"{options.check} differs: {name} was {was!r}, is {now!r}; write it with --json"
                )
    for line in failed:
        print(line, file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
