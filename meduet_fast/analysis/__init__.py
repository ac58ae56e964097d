"""What a pretrained network has learnt: factors of crops, and how well content and style are separated."""

from .evaluation import EvaluationPlan, plan_evaluation, same_anatomy_groups, structured_starts
from .exchange import Exchange, ExchangeErrors, exchange_errors, exchange_styles, far_start
from .factors import FactorTable, extract_factors, factor_table
from .separation import FactorScores, Separation, measure, separation, untrained_like

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
