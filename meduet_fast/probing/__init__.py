"""What a pretrained network has learnt: factors of crops, and how well content and style are separated."""

from .crops import EvaluationPlan, plan_evaluation, same_anatomy_groups, structured_starts
from .factors import FactorTable, extract_factors, factor_table
from .probe import FactorScores, Separation, measure, separation, untrained_like
from .style_swap import Exchange, ExchangeErrors, exchange_errors, exchange_styles, far_start

__all__ = [
    "EvaluationPlan",
    "Exchange",
    "ExchangeErrors",
    "FactorScores",
    "FactorTable",
    "Separation",
    "exchange_errors",
    "exchange_styles",
    "extract_factors",
    "factor_table",
    "far_start",
    "measure",
    "plan_evaluation",
    "same_anatomy_groups",
    "separation",
    "structured_starts",
    "untrained_like",
]
