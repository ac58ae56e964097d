"""Map voxel values to [0, 1]: by the rule that the user states, or by the one that the values tell."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Literal

import numpy as np

from meduet_fast.errors import UserError, VolumeError

# Raised when the code below chooses another rule than before, so that volumes without a stated one count as
# stale.
LOOK_VERSION = 2

# The limits, all of them in docs/preparing.md. Fractions are of voxels.
MIN_CONTRAST = 0.1  # of [0, 1], between the percentiles 0.5 and 99.5 of the image
MAX_UNUSED = 0.25  # of [0, 1], below the darkest voxels (percentile 0.1), by a window with 0 HU inside
MIN_INSIDE = 0.005  # strictly inside the CT window
MAX_SATURATED = 0.8  # at the upper end, of those above the lower end
MAX_LABELS = 1024  # different values of a label map
EQUAL_NEIGHBOURS = 0.75  # of a label map, background apart
FEW_VALUES = 16  # different values that are taken for labels whatever their pattern
MAX_CLIPPED = 0.003  # at the maximum of a magnitude image
SAMPLE = 1 << 21  # voxels, on a regular grid, that are looked at


@dataclass(frozen=True)
class IntensityRule:
    """Map voxel values to [0, 1]: linear between ``low`` and ``high``, clipped outside.

    Attributes:
        kind: "ct_window": the limits are Hounsfield units; "mr_percentile": they are percentiles (0 to 100)
            of the non-zero voxels of each volume.
        low: value that becomes 0.
        high: value that becomes 1.

    Raises:
        UserError: for an unknown kind, or limits that are out of order or (percentiles) out of range.
    """

    kind: Literal["ct_window", "mr_percentile"] = "ct_window"
    low: float = -175.0
    high: float = 250.0

    def __post_init__(self) -> None:
        if self.kind not in ("ct_window", "mr_percentile"):
            raise UserError(f"intensity rule: found {self.kind!r}, expected ct_window or mr_percentile")
        if not -float("inf") < self.low < self.high < float("inf"):
            raise UserError(
                f"{self.kind}: found [{self.low}, {self.high}], expected finite [low, high], low < high"
            )
        if self.kind == "mr_percentile" and not 0 <= self.low < self.high <= 100:
            raise UserError(
                f"mr_percentile: found [{self.low}, {self.high}], expected percentiles from 0 to 100"
            )

    def __str__(self) -> str:
        return f"{self.kind} [{self.low:g}, {self.high:g}]"


CT = IntensityRule("ct_window", -175.0, 250.0)
MR = IntensityRule("mr_percentile", 0.5, 99.5)
_STORED_CT = IntensityRule("ct_window", CT.low + 1024, CT.high + 1024)  # a CT saved without its intercept
_CUT_CT = IntensityRule("ct_window", 0.0, CT.high)  # a CT without its values below 0

_CT_WORD = re.compile(
    r"(\dd)?(cb|nc|ne|ce|ld|hr|md|ms|pc|de|mv|kv|c)?ct(s|a|p|pa|scans?)?|catscans?|tdm|hu|hounsfield"
)
_OTHER_WORD = re.compile(
    r"mri?|[fdc]?mri|mra|mrt|irm|fdg|t[12]\w*|flair|pdw?|adc|dwi|dti|swi|mprage|spgr|tof|bold|magnetic|"
    r"pet|pt|spect|nm|suv|emission|ultrasound|us"
)


def rule_of_modality(modality: object) -> IntensityRule | None:
    """Return the rule of a modality as a data set spells it; None if that names none, or several.

    >>> rule_of_modality("CT") == rule_of_modality("computed tomography, ct ") == CT
    True
    >>> rule_of_modality("T1w") == MR, rule_of_modality("noNorm"), rule_of_modality("CT/PET")
    (True, None, None)
    """
    text = modality.casefold() if isinstance(modality, str) else ""
    words = re.findall(r"[a-z0-9]+", re.sub(r"\bcat scan", "catscan", text))
    for negation, word in pairwise(words):
        if negation in ("no", "non", "not") and (_CT_WORD.fullmatch(word) or _OTHER_WORD.fullmatch(word)):
            return None
    computed = any(word.startswith("comput") for word in words) and "tomography" in words
    other = any(_OTHER_WORD.fullmatch(word) for word in words)
    ct = any(_CT_WORD.fullmatch(word) for word in words) or (computed and "emission" not in words)
    return None if ct == other else CT if ct else MR


def map_to_unit(path: Path, voxels: np.ndarray, stated: IntensityRule | None) -> IntensityRule:
    """Map the voxels of a scan to [0, 1], in place.

    Args:
        path: of the scan, for messages.
        voxels: (X, Y, Z) float32, finite and not all equal.
        stated: the rule; None to let the values tell: Hounsfield units are windowed as a CT, values from a
            dark background of 0 upwards are taken between percentiles, as those of an MR or a PET.

    Returns:
        The rule that was applied.

    Raises:
        VolumeError: for a mask or a label map, values that do not tell what they are, and a rule that leaves
            a flat or saturated image; with the rule that would fit.
    """
    step = math.ceil((voxels.size / SAMPLE) ** (1 / 3))
    sample = voxels[::step, ::step, ::step].ravel()  # (N,)
    _refuse_labels(path, voxels, sample, stated)
    rule = stated or _choose_rule(path, voxels, sample)
    if rule.kind == "ct_window" and rule.low < 0 < rule.high and _looks_stored(sample):
        raise VolumeError(path, f"{_range(sample)} are no Hounsfield units: {_advise(sample, voxels)}")
    low, high = rule.low, rule.high
    if rule.kind == "mr_percentile":
        low, high = (float(value) for value in np.percentile(voxels[voxels != 0], [rule.low, rule.high]))
        if low == high:
            raise VolumeError(path, f"constant image after {rule}: {_advise(sample, voxels)}")
    image = ((sample - low) / (high - low)).clip(0, 1)  # (N,)
    darkest, dark, bright = np.percentile(image, [0.1, 0.5, 99.5])
    inside, above = np.mean((image > 0) & (image < 1)), np.mean(image > 0)
    fault = None
    if image.min() == image.max():
        fault = f"constant image after {rule}"
    elif bright - dark < MIN_CONTRAST and inside > MIN_INSIDE:
        fault = f"flat image after {rule}: its contrast is {bright - dark:.2g} of the range [0, 1]"
    elif rule.kind == "ct_window":
        if darkest > MAX_UNUSED and rule.low < 0 < rule.high:
            fault = f"the window does not fit: after {rule} the darkest voxels are at {darkest:.2g}, not at 0"
        elif inside < MIN_INSIDE:
            fault = f"saturated image after {rule}: {inside:.1%} of the voxels lie inside the window"
        elif np.mean(image == 1) > MAX_SATURATED * above:
            fault = (
                f"saturated image after {rule}: {np.mean(image == 1):.0%} of the voxels lie above the window"
            )
    if fault:
        raise VolumeError(path, f"{fault} ({_range(sample)}): {_advise(sample, voxels)}")
    voxels -= low
    voxels *= 1 / (high - low)
    np.clip(voxels, 0, 1, out=voxels)
    return rule


def _refuse_labels(path: Path, voxels: np.ndarray, sample: np.ndarray, stated: IntensityRule | None) -> None:
    """Refuse two-valued images, and label maps: few values, or whole numbers from 0 on in patches.

    Few values that are not such numbers may be a drawn scan if a window is stated, which fits or does not.
    """
    values, counts = np.unique(sample, return_counts=True)
    first, last = voxels.min(), voxels.max()
    if len(values) <= 2 and np.all((voxels == first) | (voxels == last)):
        raise VolumeError(path, f"a mask, not a scan: every voxel is {first:g} or {last:g}")
    if first < -1 or not np.array_equal(values, np.rint(values)):
        if 1 < len(values) <= FEW_VALUES and (stated is None or stated.kind == "mr_percentile"):
            raise VolumeError(
                path, f"a label map, not a scan: {len(values)} different values from {first:g} to {last:g}"
            )
        return
    if len(values) > MAX_LABELS:
        return
    background = values[counts.argmax()]
    planes = voxels[:, :, :: math.ceil(voxels.size / SAMPLE)]  # (X, Y, some of Z)
    pairs = equal = 0
    for one, other in ((planes[1:], planes[:-1]), (planes[:, 1:], planes[:, :-1])):
        front = (one != background) | (other != background)
        pairs += np.count_nonzero(front)
        equal += np.count_nonzero(front & (one == other))
    if len(values) <= FEW_VALUES or equal > EQUAL_NEIGHBOURS * pairs:
        raise VolumeError(
            path,
            f"a label map, not a scan: {len(values)} different whole numbers from {first:g} to {last:g}",
        )


def _choose_rule(path: Path, voxels: np.ndarray, sample: np.ndarray) -> IntensityRule:
    """Return the rule that the values tell."""
    if not _looks_stored(sample):
        if _looks_hounsfield(sample):
            return CT
        if _looks_magnitude(sample, float(voxels.max())):
            return MR
    advice = _advise(sample, voxels)
    raise VolumeError(
        path, f"no intensity rule is stated, and {_range(sample)} do not tell the modality: {advice}"
    )


def _looks_stored(sample: np.ndarray) -> bool:
    """Tell whether this is a CT saved as its scanner stores it, 1024 above Hounsfield units.

    Water is at 1024 then, and most of what is denser than lung lies around it.
    """
    dense = sample > 600
    tissue = (sample > 1024 - 150) & (sample < 1024 + 150)
    return bool(np.mean(dense) > 0.03 and np.count_nonzero(tissue) > 0.5 * np.count_nonzero(dense))


def _looks_hounsfield(sample: np.ndarray) -> bool:
    """Tell whether the values are Hounsfield units: air at -1000 and tissue around 0, or tissue alone."""
    first = sample.min()
    low, dark, middle, bright, high = np.percentile(sample, [1, 25, 50, 75, 99])
    # Below air there is padding, far below; above 1600 bone and metal, never much of a scan.
    plausible = np.mean((sample < -1300) & (sample > -1800)) < 0.02 and np.mean(sample > 1600) < 0.1
    tissue = np.mean((sample > -250) & (sample < 300))
    # Phases and velocities have as much on the one side of 0 as on the other.
    width = high - low
    symmetric = abs(low + high) < 0.1 * width and abs(dark + bright) < 0.1 * width > abs(middle)
    if not plausible or symmetric or tissue < 0.005:
        return False
    if first < -850:
        return bool(np.mean(sample < -850) > 0.005)
    # No air: a block from inside the body; fat or noise lies below 0, soft tissue above.
    return bool(-600 < low < -10 and -120 < middle < 200 and width > 60 and high < 2000)


def _looks_magnitude(sample: np.ndarray, last: float) -> bool:
    """Tell whether the values grow from a dark background at 0, as a magnitude image's or a PET's do.

    What was scaled to [0, 1], to 8 bits, or clipped at the top, may have been anything before; what was
    clipped at 0, or padded far below its darkest voxels, a CT.
    """
    first, high = sample.min(), np.percentile(sample, 99.5)
    scaled = last <= 1.5 or (first == 0 and last == 255) or np.mean(sample == last) > MAX_CLIPPED
    undershoot = np.mean(sample < 0) < 0.02 and first > -0.2 * last  # of a resampling
    if scaled or not undershoot or _looks_cut(sample):
        return False
    above = sample[sample > 0]
    middle = np.median(above)
    padded = middle > 0.3 * high and np.mean(above < 0.5 * middle) < 0.001  # nothing between 0 and tissue
    return bool(not padded and np.mean(sample <= 0.05 * high) > 0.01)


def _looks_cut(sample: np.ndarray) -> bool:
    """Tell whether this may be a CT whose values below 0 HU were set to 0.

    Much is 0 then, soft tissue is cut through, so that the values just above 0 are as frequent as others,
    and bone is many times as bright. Of an MR the background is noise, with next to nothing at 0, or was
    masked, and the brightest tissue is two or three times as bright as the middle one.
    """
    above = sample[sample > 0]
    if sample.min() < 0 or len(above) > 0.95 * len(sample):
        return False
    middle, high = np.percentile(above, [50, 99.5])
    in_units = 15 < middle < 250 and 150 < high < 2500
    return bool(in_units and high > 4 * middle and 0.02 < np.mean(above < 0.1 * middle) < 0.15)


def _range(sample: np.ndarray) -> str:
    whole = "whole numbers" if np.array_equal(sample, np.rint(sample)) else "values"
    return f"{whole} from {sample.min():.4g} to {sample.max():.4g}"


def _advise(sample: np.ndarray, voxels: np.ndarray) -> str:
    """Return the rules that would fit, ready to paste; the voxels are not all equal, the sample may be."""
    if _looks_stored(sample):
        window, name = _STORED_CT, "a CT saved with 1024 added"
    elif _looks_hounsfield(sample):
        window, name = CT, "a CT"
        first = np.floor(np.percentile(sample, 0.1))
        if first - CT.low > MAX_UNUSED * (CT.high - CT.low):
            window = IntensityRule("ct_window", float(first), CT.high)
            name = f"a CT that was cut off at {first:g} HU"
    elif _looks_cut(sample):
        window, name = _CUT_CT, "a CT that was cut off at 0 HU"
    else:
        low, high = (float(f"{value:.3g}") for value in np.percentile(sample, [0.5, 99.5]))
        if low >= high:
            low, high = float(voxels.min()), float(voxels.max())
        window, name = IntensityRule("ct_window", low, high), "a scan scaled like that"
    return (
        f"state {{ct_window: [{window.low:g}, {window.high:g}]}} for {name}, "
        f"{{mr_percentile: [{MR.low:g}, {MR.high:g}]}} for an MR or a PET, as 'intensity' in a manifest "
        f"(`prepare` takes --intensity '{{kind: ct_window, low: {window.low:g}, high: {window.high:g}}}' too)"
    )
