"""Say in sentences what figures mean, by one stated rule, good or bad."""

from __future__ import annotations

from collections.abc import Mapping

from .judge import Evaluation, Figure, Scales, describe

RULE = (
    "A figure works if its interval leaves the floor out and it gets at least half of the way from the floor "
    "to the ceiling, works in part if its interval leaves the floor out, and else does not work. A factor "
    "whose scale is 0 is left out if its figure is at most 10 points above chance. Crops count as copies if "
    "their nearest training crops are less than half as far as those of real held-out crops. Two of one "
    "condition hardly differ if they get less than a tenth of the way from the same crop to two places."
)
HALF, NEAR_CHANCE, COPY, ALIKE = 0.5, 0.10, 0.5, 0.1
_FACTOR = {"content_found": 0, "style_obeyed": 1}  # place of its scale


def number(value: float | None, share: bool) -> str:
    """Return a value as text."""
    if value is None:
        return ""
    return f"{100 * value:.0f} %" if share else f"{value:.3g}"


def interval(figure: Figure) -> str:
    """Return a figure with its interval as text."""
    share = describe(figure.name).share
    low, high = (number(end, share) for end in (figure.estimate.low, figure.estimate.high))
    return f"{number(figure.estimate.value, share)} [{low}, {high}]"


def scales_text(scales: Scales) -> str:
    """Return scales as text."""
    return f"content {scales[0]:g}, style {scales[1]:g}"


def verdict(figure: Figure, scales: Scales) -> str | None:
    """Judge a figure by :data:`RULE`; None if it says nothing at these scales."""
    if figure.name == "nearest_training":
        return "copies training crops" if figure.estimate.value < COPY else "no sign of copies"
    if figure.name == "ms_ssim":
        alike = figure.way is not None and figure.way < ALIKE
        return "hardly differ from each other" if alike else "differ from each other"
    factor = _FACTOR.get(figure.name)
    if factor is not None and scales[factor] == 0:
        near = figure.estimate.value <= figure.floor + NEAR_CHANCE
        return "left out, as asked" if near else "not left out, although its scale is 0"
    if factor is None and min(scales) == 0:
        return None
    if figure.way is None:
        return None
    if not figure.told_apart:
        return "does not work"
    return "works" if figure.way >= HALF else "works in part"


def judged(figures: Mapping[str, Figure], scales: Scales) -> dict[str, str]:
    """Judge all figures of a pair of scales that can be judged: words by name."""
    words = {name: verdict(figure, scales) for name, figure in figures.items()}
    return {name: word for name, word in words.items() if word is not None}


def verdicts(evaluation: Evaluation) -> list[str]:
    """Return a sentence for every pair of scales, with all figures that can be judged."""
    found = []
    for scales, figures in evaluation.figures.items():
        parts = []
        for name, word in judged(figures, scales).items():
            figure, measure = figures[name], describe(name)
            beside = [f"{measure.floor} {number(figure.floor, measure.share)}"]
            if figure.ceiling is not None:
                beside.append(f"{measure.ceiling} {number(figure.ceiling, measure.share)}")
            parts.append(f"{measure.short} {word}: {interval(figure)} ({', '.join(beside)})")
        found.append(f"{evaluation.name} at {scales_text(scales)}. {'; '.join(parts)}")
    return found
