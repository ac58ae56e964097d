"""Compile every shipped kernel ahead of time, without a GPU, and say what it costs.

``python -m meduet_fast.kernels.inspect --arch 80 90 100`` compiles each launch of each standard workload with
the configuration of the table, prints registers, spills, shared memory, tensor-core instructions and wide
loads beside bytes, FLOPs and the time that these take at least, and exits with 1 on a spill, on more shared
memory than the chip has, or on a matrix kernel without tensor-core instructions.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .launch import Launch, Workload, record_launches
from .workloads import workloads

DTYPE = torch.bfloat16
# Bytes/s of memory, dense bf16 FLOP/s, shared memory of a program in bytes (vendor data sheets).
CHIPS = {
    80: {"A100": (2.04e12, 312e12, 163 * 1024)},
    90: {"H100": (3.35e12, 989e12, 227 * 1024), "H200": (4.8e12, 989e12, 227 * 1024)},
    100: {"B200": (8.0e12, 2250e12, 227 * 1024)},
}
TENSOR_CORE = re.compile(r"\b(?:HMMA|HGMMA|UTC[A-Z]*MMA|DMMA|QGMMA)\b")
WIDE_LOAD = re.compile(r"\b(?:LDG\.E\.(?:\w+\.)*128|LDGSTS\.E\.(?:\w+\.)*128|UTMALDG)")
POINTERS = {
    torch.float64: "*fp64", torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16",
    torch.int64: "*i64", torch.int32: "*i32", torch.uint8: "*u8", torch.bool: "*i1",
}  # fmt: skip


@dataclass(frozen=True)
class Compiled:
    """What the compiler made of one launch.

    Attributes:
        op, workload: which standard workload.
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
    """Types, constants and divisibility of a launch, as Triton's own launcher would specialise them."""
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
    """Resource usage and machine code of a cubin, by the tools inside the triton package."""
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


def compile_launch(launch: Launch, workload: Workload, arch: int) -> Compiled:
    """Compile one recorded launch for an architecture."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, constants, attributes = _signature(launch)
    source = ASTSource(launch.kernel, signature, constants, attributes)
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
    matrix = workload.matrix and "tt.dot" in compiled.asm["ttir"]
    limit = min(chip[2] for chip in CHIPS[arch].values())
    problems = [
        text
        for wrong, text in (
            (spills > 0, f"spills {spills} bytes"),
            (shared > limit, f"needs {shared} bytes of shared memory, the chip has {limit}"),
            (matrix and tensor_core == 0, "has no tensor-core instruction"),
        )
        if wrong
    ]
    return Compiled(
        workload.op, workload.label, launch.kernel.__name__, launch.config, arch, registers, spills, shared,
        tensor_core, len(WIDE_LOAD.findall(code)), matrix, "; ".join(problems),
    )  # fmt: skip


def compile_workload(workload: Workload, arch: int) -> list[Compiled]:
    """Compile every different launch of a workload's forward and backward."""
    with record_launches(arch) as launches:
        workload.launch(**workload.inputs("meta", DTYPE))
    if not launches:
        raise RuntimeError(f"{workload.op} {workload.label}: launches no kernel")
    different = {
        (launch.kernel.__name__, str(_signature(launch)), str(launch.options)): launch for launch in launches
    }
    return [compile_launch(launch, workload, arch) for launch in different.values()]


def _compile_numbered(number: int, arch: int) -> list[Compiled]:
    """For worker processes, to which kernels cannot be sent."""
    torch.set_num_threads(1)
    return compile_workload(workloads()[number], arch)


def compile_all(archs: Sequence[int]) -> list[Compiled]:
    """Compile all standard workloads for some architectures, on all processors."""
    jobs = [(number, arch) for number in range(len(workloads())) for arch in archs]
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
        return [item for found in pool.map(_compile_numbered, *zip(*jobs, strict=True)) for item in found]


def floors(workload: Workload) -> dict[str, Any]:
    """Bytes and FLOPs of forward and backward, and microseconds that they take at least on each chip."""
    row: dict[str, Any] = {"op": workload.op, "workload": workload.label}
    for name, cost in zip(("forward", "backward"), workload.cost(DTYPE.itemsize), strict=True):
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
    """The command; returns its exit code."""
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
    result = {"compiled": [asdict(item) for item in compiled], "floors": least}
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    failed = [f"{c.kernel} ({c.workload}, sm_{c.arch}): {c.problem}" for c in compiled if c.problem]
    if options.check and json.loads(options.check.read_text(encoding="utf-8")) != result:
        failed.append(f"{options.check}: differs; write it again with --json and look at what changed")
    for line in failed:
        print(line, file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
