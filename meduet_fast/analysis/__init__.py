"""What a pretrained network has learnt: factors of crops, and how well content and style are separated."""

from .evaluation import EvaluationPlan, plan_evaluation, same_anatomy_groups
from .factors import FactorTable, extract_factors, factor_table
from .separation import FactorScores, Separation, measure, separation, untrained_like

__all__ = [
    "EvaluationPlan",
    "FactorScores",
    "FactorTable",
    "Separation",
    "extract_factors",
    "factor_table",
    "measure",
    "plan_evaluation",
    "same_anatomy_groups",
    "separation",
    "untrained_like",
]
