"""Every standard workload of every operation."""

from __future__ import annotations

from . import (
    contrast,
    decoder_streams,
    group_norm,
    mix_index,
    patch_embed,
    pool,
    reconstruction,
    style_conv,
    token_mixing,
)
from .launch import Workload


def workloads() -> list[Workload]:
    """What is inspected, tuned and timed."""
    return [
        workload
        for module in (
            contrast,
            decoder_streams,
            group_norm,
            token_mixing,
            pool,
            reconstruction,
            style_conv,
            mix_index,
            patch_embed,
        )
        for workload in module.workloads()
    ]
