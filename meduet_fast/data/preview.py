"""Draw a prepared volume, so that a person sees what went into the store."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.image import imsave
from torch import Tensor

from meduet_fast.errors import UserError
from meduet_fast.files import atomic_path


def write_preview(path: Path, image: Tensor) -> None:
    """Write the sagittal, coronal and axial middle slices side by side as a PNG.

    Args:
        path: the PNG.
        image: (X, Y, Z) in [0, 1], RAS axes. Superior is drawn upwards (axial: anterior); the patient's right
            is drawn on the right (sagittal: anterior).

    Raises:
        UserError: the file cannot be written.
    """
    x, y, z = (size // 2 for size in image.shape)
    # (Z, Y), (Z, X) and (Y, X): the last axis of a plane is drawn upwards.
    slices = [np.flipud(plane.cpu().numpy().T) for plane in (image[x], image[:, y], image[:, :, z])]
    height = max(len(plane) for plane in slices)
    padded = [
        np.pad(plane, (((height - len(plane)) // 2, (height - len(plane) + 1) // 2), (0, 0)))
        for plane in slices
    ]
    try:
        with atomic_path(path) as temporary:
            imsave(temporary, np.concatenate(padded, axis=1), cmap="gray", vmin=0, vmax=1, format="png")
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error}") from error
