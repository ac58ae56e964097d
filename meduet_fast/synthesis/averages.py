"""Average weights over a run with a power of the step as their weight: the further a run is, the longer.

After Karras et al., "Analyzing and Improving the Training Dynamics of Diffusion Models".
"""

from __future__ import annotations

import math

import numpy as np

from meduet_fast.settings import Range, SettingError

WIDEST = math.sqrt(1 / 12)  # of a profile that does not fall towards the past: the mean of all steps


def power_exponent(deviation: float) -> float:
    """Return the exponent g of the profile t^g whose standard deviation is a share of the run.

    It solves deviation^2 = (g + 1) / ((g + 2)^2 (g + 3)); 0.05 gives 16.97, 0.10 gives 6.94.

    Raises:
        SettingError: unless 0 < deviation <= sqrt(1/12).
    """
    allowed = Range(0, WIDEST, above=True)
    if not allowed.holds(deviation):
        raise SettingError("deviation", f"found {deviation}, expected {allowed}")
    inverse = deviation**-2
    return float(np.roots([1, 7, 16 - inverse, 12 - inverse]).real.max())


def power_momentum(step: int, exponent: float) -> float:
    """Return b of average <- b average + (1 - b) weights after ``step``, the first of which is 0.

    The first average is the weights themselves: b = (1 - 1/t)^(g + 1) with t = step + 1.
    """
    return (1 - 1 / (step + 1)) ** (exponent + 1)
