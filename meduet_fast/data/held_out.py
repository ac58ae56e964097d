"""Define "held out": a slab at the right end of the left-right axis of every volume."""

from __future__ import annotations

import math

from meduet_fast.errors import UserError


def held_out_start(size: int, fraction: float, crop: int, multiple: int = 1) -> int:
    """Return the first index, along axis 0, of the held-out slab of one volume.

    Training crops lie wholly before it (``start + crop <= held_out_start``), held-out crops wholly at or
    after it. The slab is the last ``fraction`` of the axis, never narrower than one crop; it is widened,
    never narrowed, so that it starts at a multiple of ``multiple``.

    Args:
        size: length of axis 0 (voxels or latent voxels; ``crop`` and ``multiple`` are in the same unit).
        fraction: part of the axis to hold out, 0 <= fraction < 1.
        crop: edge of a crop.
        multiple: alignment of the first held-out index.

    Returns:
        The index; ``size`` when ``fraction`` is 0 (nothing is held out).

    Raises:
        UserError: if the fraction is out of range, or one of the two sides cannot hold a crop.
    """
    if not 0 <= fraction < 1:
        raise UserError(f"held-out fraction: found {fraction}, expected 0 <= fraction < 1")
    if crop > size:
        raise UserError(f"axis of {size} cannot hold a crop of {crop}")
    if fraction == 0:
        return size
    # The subtraction of a hair keeps 0.1 * 30 = 3.0000000000000004 from counting as 4.
    held_out = max(math.ceil(fraction * size - 1e-9), crop)
    start = (size - held_out) // multiple * multiple
    if start < crop:
        raise UserError(
            f"axis of {size} cannot hold a training crop and a held-out crop of {crop} "
            f"with a held-out fraction of {fraction} (training side: {max(start, 0)})"
        )
    return start
