"""Every standard workload of every operation."""

from __future__ import annotations

from . import contrast, demix, group_norm, mixing, pool, reconstruction, style, tables, tokenize
from .launch import Workload


def workloads() -> list[Workload]:
    """What is inspected, tuned and timed."""
    return [
        workload
        for module in (contrast, demix, group_norm, mixing, pool, reconstruction, style, tables, tokenize)
        for workload in module.workloads()
    ]
