"""Made-up results: every kind of row, figures that were never measured."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from benchmarks.results import Results, Row


def timed(median: float, **fields: Any) -> dict[str, Any]:
    """A median with 2 % to either side, and what else a row has."""
    return {"median_us": median, "low_us": 0.98 * median, "high_us": 1.02 * median, "repeats": 20, **fields}


def against(**ratios: float) -> dict[str, Any]:
    """Ratios to peers, with 2 % to either side."""
    return {"ratios": ratios, "ratio_spread": {name: (0.98 * r, 1.02 * r) for name, r in ratios.items()}}


def make_rows() -> list[Row]:
    """A contrast over N, a step over batches, an ablation, a loader and a peer that is not installed."""
    rows = []
    for count in (256, 1024, 4096, 16384):
        shared = {"bench": "contrast", "case": f"N={count} D=256", "direction": "forward_backward"}
        shared |= {"dtype": "float32", "shape": {"rows": count, "width": 256}}
        cost = {"bytes": 8 * count * 256, "flops": 6 * count**2 * 256}
        time = 50 + count**2 / 100
        rows.append(
            Row(**shared, variant="ours", **timed(time, peak_memory=4096 * count, **cost), **against(eager=3))
        )
        rows.append(Row(**shared, variant="eager", **timed(3 * time, peak_memory=16 * count**2, **cost)))
        rows.append(Row(**shared, variant="liger", unavailable="liger-kernel is not installed"))
    for mftd in ("with MFTD", "without MFTD"):
        for batch in (32, 64, 128):
            shared = {
                "bench": "step",
                "case": f"ViT-B B={batch} {mftd}",
                "direction": "step",
                "dtype": "bfloat16",
            }
            shared |= {"shape": {"batch": batch, "width": 768}}
            time = 1e3 * batch + 2e4
            rate = {"samples_per_s": 1e6 * batch / time}
            rows.append(Row(**shared, variant="ours", **timed(time, extra=rate), **against(published=2.5)))
            slow = {"samples_per_s": rate["samples_per_s"] / 2.5}
            rows.append(Row(**shared, variant="published", **timed(2.5 * time, extra=slow)))
    for number, change in enumerate(
        ("published", "redundant work removed", "fused kernels", "bf16", "compiled")
    ):
        rate = {"samples_per_s": 100.0 * (1 + number)}
        rows.append(
            Row("step_ablation", "ViT-B B=64", change, "step", **timed(1e6 / (1 + number), extra=rate))
        )
    rows.append(Row("loader", "crops of 4x24^3", "ours", "read", **timed(47), **against(MONAI=58)))
    return rows


def make_results(date: str = "2026-01-02", device: str = "NVIDIA H100 80GB HBM3", **changes: Any) -> Results:
    """A run of one day; its commit is named for the day."""
    provenance = {
        "device": device,
        "date": f"{date}T10:00:00+00:00",
        "commit": f"c{date[-2:]}",
        "torch": "2.13.0",
    }
    if "NVIDIA" in device:
        provenance["cuda"] = "13.0"
    peaks = {
        "copy_bytes_per_s": 2.9e12,
        "matrix_flops_per_s_float32": 4e13,
        "matrix_flops_per_s_bfloat16": 7e14,
    }
    return replace(Results(provenance, peaks, make_rows()), **changes)
