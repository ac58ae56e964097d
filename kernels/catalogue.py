"""Every standard workload of every operation."""

from __future__ import annotations

from . import pool
from .launch import Workload


def workloads() -> list[Workload]:
    """What is inspected, tuned and timed."""
    return [workload for module in (pool,) for workload in module.workloads()]
