"""Probe what a pretrained network has learnt: its factors, and how well content and style are separated."""

from .crops import ProbeCrops, choose_crops, same_anatomy_groups, structured_starts
from .factors import FactorTable, extract_factors, factor_table
from .probe import FactorScores, ProbeResult, probe_factors, untrained_like
from .style_swap import StyleSwap, SwapErrors, far_start, swap_errors, swap_styles

__all__ = [
    "FactorScores",
    "FactorTable",
    "ProbeCrops",
    "ProbeResult",
    "StyleSwap",
    "SwapErrors",
    "choose_crops",
    "extract_factors",
    "factor_table",
    "far_start",
    "probe_factors",
    "same_anatomy_groups",
    "structured_starts",
    "swap_errors",
    "swap_styles",
    "untrained_like",
]
