"""The command ``synthesize sample``: samples as NIfTI files, a picture, and a record of what made them.

::

    FOLDER/sample_000.nii.gz    int16 HU with a CT's rule of intensity, else float32 in [0, 1]; axes RAS
    FOLDER/samples.png          middle slices of the first samples
    FOLDER/samples.json         settings, origins, and for each sample its content, style, place and values
"""

from __future__ import annotations

import gzip
import json
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import numpy as np
from nibabel.nifti1 import Nifti1Image
from PIL import Image

import meduet_fast
from meduet_fast.autoencoder import Tokenizer
from meduet_fast.data.intensity import IntensityRule
from meduet_fast.data.preview import PLANES, draw_row, draw_slice, draw_text, write_rows
from meduet_fast.devices import select_device
from meduet_fast.errors import UserError, printable
from meduet_fast.files import atomic_path, in_real_folder, refuse_unwritable
from meduet_fast.progress import ProgressBar
from meduet_fast.settings import FROM_0, FROM_1, SEED, SettingError, check_numbers

from .pipeline import DEFAULT_AVERAGE, INDEX, MeDUETPipeline, Sample, SamplingSettings, refuse_existing
from .samplers import scheduler_name
from .sources import RANDOM, Triple

FORMAT = "meduet-fast samples 1"
RECORD, PICTURE = "samples.json", "samples.png"
MOST_DRAWN = 16  # samples in the picture
ZOOM = 2  # pixels a voxel


@dataclass(frozen=True)
class SampleConfig(SamplingSettings):
    """Say which samples are made.

    Attributes:
        content: "random", "none", a volume of the table of factors (NAME), a crop of it (NAME@x,y,z in
            latent voxels, or NAME@random), or the path of a scan.
        style: the same; NAME is a mean over the windows of a volume, or of a domain.
        count: samples.
        seed: of the first; every other has the next.
        size: edges of the samples; by default those of the content's volume, or, of a crop or without one,
            the network's.
        start: first corner in the content's volume; by default the crop is in its middle.
        voxels: what size and start are counted in: "latent" voxels, or those of the "image".
        intensity: what of a scan's values becomes [0, 1], for scans that do not state it, as for ``encode``.
        average: which average of a run's weights.
        device: where it works; "auto" takes CUDA where there is one.
    """

    content: str = RANDOM
    style: str = RANDOM
    count: int = 1
    seed: int = 0
    size: tuple[int, int, int] | None = None
    start: tuple[int, int, int] | None = None
    voxels: Literal["latent", "image"] = "latent"
    intensity: IntensityRule | None = None
    average: str = DEFAULT_AVERAGE
    device: str = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_numbers(self, FROM_1, "count", "size")
        check_numbers(self, FROM_0, "start")
        check_numbers(self, SEED, "seed")

    def in_latent_voxels(self, name: Literal["size", "start"], compression: int) -> Triple | None:
        """Return size or start in latent voxels.

        Raises:
            SettingError: if it is not a whole number of them.
        """
        given: Triple | None = getattr(self, name)
        if given is None or self.voxels == "latent":
            return given
        if any(edge % compression for edge in given):
            raise SettingError(name, f"found {given} image voxels, expected multiples of {compression}")
        x, y, z = (edge // compression for edge in given)
        return x, y, z


@dataclass(frozen=True)
class SampleSummary:
    """Tell what was made.

    Attributes:
        folder: with all files.
        files: the volumes.
        record: what ``samples.json`` says.
    """

    folder: Path
    files: list[Path]
    record: dict[str, Any]

    def __str__(self) -> str:
        """Format it for a person."""
        count = len(self.files)
        network = self.record["network"]
        return (
            f"{self.folder}: {count} sample{'s' * (count != 1)} by {network['class']} of "
            f"{network.get('weights', 'no file')}\n  {self.folder / PICTURE} shows them, "
            f"{self.folder / RECORD} says what they are made of"
        )


def load_pipeline(source: Path | str, average: str = DEFAULT_AVERAGE) -> MeDUETPipeline:
    """Load the pipeline of a run's folder, or of one that ``save_pretrained`` wrote.

    Raises:
        UserError: if it is neither, or is damaged.
    """
    source = Path(source)
    if (source / "checkpoints").is_dir():
        return MeDUETPipeline.from_run(source, average)
    if source.is_dir() and not (source / INDEX).is_file():
        raise UserError(f"{source}: neither a run (no checkpoints) nor a pipeline (no {INDEX})")
    return MeDUETPipeline.from_pretrained(source)


def sample(source: Path | str, output: Path | str, config: SampleConfig | None = None) -> SampleSummary:
    """Make samples, and write them; see the head of this file.

    Args:
        source: folder of a run of ``synthesize train``, or of a pipeline.
        output: a new or empty folder.
        config: which samples, and how.

    Raises:
        UserError: if there is something in the folder already, or for what does not exist or does not fit.
        OSError: if something can't be written.
    """
    output, config = Path(output), config or SampleConfig()
    refuse_existing(output)
    refuse_unwritable(output)
    pipeline = load_pipeline(source, config.average).to(select_device(config.device))
    tokenizer = pipeline.vae.tokenizer
    seeds = range(config.seed, config.seed + config.count)
    record = {
        "format": FORMAT,
        "source": printable(in_real_folder(Path(source))),
        "versions": {"meduet_fast": meduet_fast.__version__}
        | {name: version(name) for name in ("torch", "diffusers", "monai")},
        **pipeline.about(),
        "settings": asdict(config),
        "sampler": config.sampler or scheduler_name(pipeline.scheduler),
        "samples": [],
    }
    files: list[Path] = []
    rows: list[Image.Image] = []
    with ProgressBar("Sampling", config.count * config.evaluations, "step") as bar:
        made = pipeline.sample(
            config.content, config.style, seeds, config.in_latent_voxels("size", tokenizer.compression),
            config.in_latent_voxels("start", tokenizer.compression), config, config.intensity, bar.update,
        )  # fmt: skip
        for number, one in enumerate(made):
            files.append(output / f"sample_{number:03d}.nii.gz")
            volume, about = decode_values(tokenizer, one)
            write_nifti(files[-1], volume, one)
            record["samples"].append(
                {"file": files[-1].name, **one.record, "affine": one.affine.tolist(), **about}
            )
            if number < MOST_DRAWN:
                rows += _draw(files[-1].name, volume, one)
    write_rows(output / PICTURE, rows)
    with atomic_path(output / RECORD) as temporary:
        temporary.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return SampleSummary(output, files, record)


def decode_values(tokenizer: Tokenizer, one: Sample) -> tuple[np.ndarray, dict[str, Any]]:
    """Decode a sample slab after slab, in the units of its rule of intensity, if that has any.

    Returns:
        (X, Y, Z) whole HU, int16, if the rule is a CT window; else float32 in [0, 1]. And what the values
        are, as JSON values.
    """
    rule, factor = one.intensity, tokenizer.compression
    units = rule is not None and rule.kind == "ct_window"
    volume = np.empty([factor * edge for edge in one.latents.shape[1:]], np.int16 if units else np.float32)
    ends = np.zeros(2)  # voxels at the lower and at the upper end
    for place, part in tokenizer.decode_parts(one.latents):
        values = part.cpu().numpy()  # (X', Y', Z')
        ends += np.count_nonzero(values == 0), np.count_nonzero(values == 1)
        if rule is not None and units:
            values = (rule.low + (rule.high - rule.low) * values).round()
        volume[place] = values
    about = {
        "values": _values(rule),
        "intensity": None if rule is None else asdict(rule),
        "clipped": dict(zip(("low", "high"), (ends / volume.size).round(4).tolist(), strict=True)),
    }
    return volume, about


def _values(rule: IntensityRule | None) -> str:
    """Say what the values of a volume are, in less than the 80 letters of a NIfTI header's note."""
    if rule is not None and rule.kind == "ct_window":
        return f"HU, clipped to {rule.low:g} .. {rule.high:g}"
    return "[0, 1], no units: the rule of intensity keeps none"


def write_nifti(path: Path, volume: np.ndarray, one: Sample) -> None:
    """Write a packed NIfTI file, the same bytes each time.

    Args:
        path: the file.
        volume: (X, Y, Z) of :func:`decode_values`.
        one: gives the affine.

    Raises:
        OSError: if it can't be written.
    """
    image = Nifti1Image(volume, None)
    image.header.set_sform(one.affine, code="scanner")
    image.header.set_qform(one.affine, code="scanner")
    image.header.set_xyzt_units("mm")
    image.header["descrip"] = _values(one.intensity).encode()
    with (
        atomic_path(path) as temporary,
        temporary.open("wb") as raw,
        gzip.GzipFile("", "wb", compresslevel=1, fileobj=raw, mtime=0) as packed,
    ):
        image.to_stream(packed)


def _draw(name: str, volume: np.ndarray, one: Sample) -> list[Image.Image]:
    """Draw the middle slices of a volume (X, Y, Z), under a caption."""
    spacing = np.linalg.norm(one.affine[:3, :3], axis=0)  # (3,) mm
    scale = ZOOM * spacing / spacing.min()  # pixels a voxel
    low, high = 0.0, 1.0
    if one.intensity is not None and volume.dtype == np.int16:
        low, high = one.intensity.low, one.intensity.high
    panels = []
    for plane_name, plane in PLANES.items():
        middle = volume.take([volume.shape[plane[0]] // 2], axis=plane[0])  # 1 along the axis that is cut
        grey = (middle.astype(np.float32) - low) / (high - low)
        panels.append((plane_name, draw_slice(grey, plane, np.zeros(3, int), scale)))
    record = one.record
    said = [
        f"{kind}: {'none' if record[kind] is None else _named(record[kind])}" for kind in ("content", "style")
    ]
    text = f"{name}   {said[0]} at {tuple(record['start'])}   {said[1]}   seed {one.seed}"
    window = f"window {low:g} to {high:g} HU" if volume.dtype == np.int16 else "values 0 to 1"
    return [draw_text(text), draw_text(window), draw_row(panels, ZOOM / float(spacing.min()))]


def _named(record: dict[str, Any]) -> str:
    """Name a content or a style in a caption."""
    name = str(record.get("volume") or record.get("of") or Path(record["scan"]).name)
    return f"{name} at {tuple(record['start'])}" if "start" in record else name
