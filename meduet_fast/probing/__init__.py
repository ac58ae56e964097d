"""Probe what a pretrained network has learnt: its factors, and how well content and style are separated."""

from meduet_fast.errors import needs_extra

with needs_extra("train"):
    from meduet_fast.data.same_anatomy import same_anatomy_groups

    from .crops import ProbeCrops, choose_crops, structured_starts
    from .factors import FactorTable, extract_factors, factor_table
    from .hidden_tokens import FillErrors, fill_errors, fill_hidden, hiding_masks, interpolate_hidden
    from .probe import FactorScores, ProbeResult, probe_factors, untrained_like
    from .style_swap import (
        PairVerdict,
        Restyled,
        RestyledRegion,
        StyleChange,
        StyleStatistics,
        measure_change,
        restyle,
        restyle_region,
        restyle_region_by_statistics,
        style_statistics,
    )

__all__ = [
    "FactorScores",
    "FactorTable",
    "FillErrors",
    "PairVerdict",
    "ProbeCrops",
    "ProbeResult",
    "Restyled",
    "RestyledRegion",
    "StyleChange",
    "StyleStatistics",
    "choose_crops",
    "extract_factors",
    "factor_table",
    "fill_errors",
    "fill_hidden",
    "hiding_masks",
    "interpolate_hidden",
    "measure_change",
    "probe_factors",
    "restyle",
    "restyle_region",
    "restyle_region_by_statistics",
    "same_anatomy_groups",
    "structured_starts",
    "style_statistics",
    "untrained_like",
]
