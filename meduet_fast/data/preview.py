"""Draw a prepared volume, so that a person sees what went into the store."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from meduet_fast.errors import UserError
from meduet_fast.files import atomic_path

from .intensity import IntensityRule

PLANES = {"sagittal": (0, 1, 2), "coronal": (1, 0, 2), "axial": (2, 0, 1)}  # axis cut, drawn across, upwards
BARS_MM = (100, 50, 20, 10, 5, 2, 1)
LINE, GAP = 18, 8  # pixels
ZOOM = 3  # of the block
FRAME = (255, 160, 0)

Triple = tuple[float, float, float]


@dataclass(frozen=True)
class Preview:
    """What a picture of a volume shows.

    Attributes:
        title: which volume it is.
        image: (X, Y, Z) in [0, 1], RAS axes.
        spacing: of its voxels, in mm.
        intensity: the rule that made its values.
        corner: first voxel of a block around the middle.
        decoded: (x, y, z) in [0, 1], that block as its latents are decoded.
    """

    title: str
    image: Tensor
    spacing: Triple
    intensity: IntensityRule
    corner: tuple[int, int, int]
    decoded: Tensor


def write_preview(path: Path, preview: Preview) -> None:
    """Write a PNG of a volume's middle slices, and below them of a block in it beside its decoded latents.

    Superior is drawn upwards (axial: anterior), the patient's right on the right (sagittal: anterior).

    Raises:
        UserError: the file cannot be written.
    """
    image, decoded = preview.image.cpu().numpy(), preview.decoded.cpu().numpy()  # (X, Y, Z), (x, y, z)
    corner, edges = np.array(preview.corner), np.array(decoded.shape)
    block = image[tuple(map(slice, corner, corner + edges))]  # (x, y, z)
    scale = np.array(preview.spacing) / min(preview.spacing)  # pixels a voxel
    whole, parts = [], []
    for name, plane in PLANES.items():
        panel = draw_slice(image, plane, corner + edges // 2, scale)
        _, across, up = plane
        left, top = corner[across] * scale[across], panel.height - (corner + edges)[up] * scale[up]
        right, bottom = left + edges[across] * scale[across], top + edges[up] * scale[up]
        ImageDraw.Draw(panel).rectangle((left, top, right - 1, bottom - 1), outline=FRAME)
        whole.append((name, panel))
        parts += [
            (caption, draw_slice(volume, plane, edges // 2, ZOOM * scale))
            for caption, volume in ((name, block), ("decoded", decoded))
        ]
    psnr = -10 * math.log10(max(float(np.square(decoded - block).mean()), 1e-10))
    voxels = " x ".join(f"{mm:g}" for mm in preview.spacing)
    pixels_per_mm = 1 / min(preview.spacing)
    rows = [
        draw_text(preview.title),
        draw_text(f"{_window(preview.intensity)}; voxels of {voxels} mm"),
        draw_row(whole, pixels_per_mm),
        draw_text(f"the block in the frame, and decoded from its latents: PSNR {psnr:.1f} dB"),
        draw_row(parts, ZOOM * pixels_per_mm),
    ]
    write_rows(path, rows)


def write_rows(path: Path, rows: Sequence[Image.Image]) -> None:
    """Write a PNG of rows below each other.

    Raises:
        UserError: the file cannot be written.
    """
    width, height = max(row.width for row in rows), sum(row.height for row in rows)
    page, top = Image.new("RGB", (width + 2 * GAP, height + 2 * GAP)), GAP
    for row in rows:
        page.paste(row, (GAP, top))
        top += row.height
    try:
        with atomic_path(path) as temporary:
            page.save(temporary, format="png")
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error}") from error


def _window(rule: IntensityRule) -> str:
    limits = f"{rule.low:g} to {rule.high:g}"
    if rule.kind == "ct_window":
        return f"window {limits} HU"
    return f"percentiles {limits} of the non-zero voxels"


def draw_slice(
    volume: np.ndarray, plane: tuple[int, int, int], at: np.ndarray, scale: np.ndarray
) -> Image.Image:
    """Draw a slice of a volume (X, Y, Z); ``scale`` is in pixels a voxel."""
    cut, across, up = plane
    grey = np.flipud(volume.take(at[cut], axis=cut).T)  # (up, across)
    size = round(grey.shape[1] * scale[across]), round(grey.shape[0] * scale[up])
    shown = Image.fromarray((255 * grey).round().astype(np.uint8))
    return shown.resize(size, Image.Resampling.NEAREST).convert("RGB")


def draw_row(panels: Sequence[tuple[str, Image.Image]], pixels_per_mm: float) -> Image.Image:
    """Put panels side by side, a caption above each and a scale bar below."""
    captions = [draw_text(caption) for caption, _ in panels]
    widths = [max(caption.width, panel.width) for caption, (_, panel) in zip(captions, panels, strict=True)]
    height = max(panel.height for _, panel in panels)
    row = Image.new("RGB", (sum(widths) + GAP * (len(panels) - 1), height + 2 * LINE))
    left = 0
    for caption, (_, panel), width in zip(captions, panels, widths, strict=True):
        row.paste(caption, (left, 0))
        row.paste(panel, (left, LINE))
        left += width + GAP
    shortest = min(panel.width for _, panel in panels) / pixels_per_mm / 2
    bar = next((mm for mm in BARS_MM if mm <= shortest), BARS_MM[-1])
    length = round(bar * pixels_per_mm)
    ImageDraw.Draw(row).line((0, height + 1.5 * LINE, length - 1, height + 1.5 * LINE), fill="white", width=2)
    row.paste(draw_text(f"{bar} mm"), (length + GAP, height + LINE))
    return row


def draw_text(text: str) -> Image.Image:
    """Draw a line of text."""
    font = ImageFont.load_default(size=13)
    line = Image.new("RGB", (math.ceil(font.getlength(text)), LINE))
    ImageDraw.Draw(line).text((0, 0), text, fill="white", font=font)
    return line
