"""Tiles of (B, L, D) tensors, for kernels that move rows: axes of programs are columns, rows, sample.

Programs that run at the same time lie side by side in memory.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .backend import triton
from .launch import Options, config

if triton is not None:
    import triton.language as tl

    @triton.jit
    def tile_columns(width, BLOCK_D: tl.constexpr):
        # This program's columns and whether they exist, both (1, BLOCK_D).
        columns = (tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)).to(tl.int64)[None, :]
        return columns, columns < width

    @triton.jit
    def tile_rows(step, STEPS: tl.constexpr, ROWS: tl.constexpr):
        # This program's rows in a step, (ROWS, 1).
        return ((tl.program_id(1) * STEPS + step) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]

    @triton.jit
    def load_rows(x, rows, length, valid, stride, ACC: tl.constexpr):
        # x points at the columns of row 0; rows outside of the sequence are zeros.
        inside = (rows >= 0) & (rows < length) & valid
        return tl.load(x + rows * stride, mask=inside, other=0.0).to(ACC)


def token_grid(
    name: str, x: Tensor, batch: int, length: int, width: int
) -> tuple[tuple[int, int, int], dict[str, Any], Options]:
    """Lay out a launch over (batch, length, width) tokens on the device of ``x``.

    Args:
        name: of a configuration with BLOCK_D, ROWS and, if a program takes several blocks of rows, STEPS.

    Returns:
        The grid, the constants BLOCK_D, ROWS and STEPS, and the configuration.
    """
    options = config(name, x.device)
    rows, steps = options["ROWS"], options.get("STEPS", 1)
    block = min(triton.next_power_of_2(width), options["BLOCK_D"])
    grid = (triton.cdiv(width, block), triton.cdiv(length, rows * steps), batch)
    return grid, {"BLOCK_D": block, "ROWS": rows, "STEPS": steps}, options
