"""Encode all scans of an input into one table, a safetensors file.

::

    content, style              float32 (N, D) and (N, Ds), means over the tokens of each of N scans
    content/NAME, style/NAME    float32 (X, Y, Z, D) and (X, Y, Z, Ds), a token for each patch, axes RAS
    metadata                    "volumes", a JSON list in the order of the rows: name, domain, body_part,
                                source, intensity, affine of the tokens' grid, windows; and what encoded them
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import torch

from meduet_fast.data.folders import LeftOut, format_left_out
from meduet_fast.data.sources import find_volumes
from meduet_fast.errors import UserError, VolumeError, printable
from meduet_fast.files import atomic_path, refuse_unwritable
from meduet_fast.progress import ProgressBar
from meduet_fast.tensor_file import TensorFileWriter

from .encode import EncodeConfig, Encoder

FORMAT = "meduet-fast encodings 1"


@dataclass
class EncodeSummary:
    """Tell what became of every scan.

    Attributes:
        table: the file.
        encoder: what encoded them, see :meth:`Encoder.record`.
        encoded: names of the scans in it, in the order of its rows.
        failed: file and reason of each scan that could not be used.
        left_out: what looks like a scan and was not tried.
    """

    table: Path
    encoder: dict[str, str]
    encoded: list[str] = field(default_factory=list)
    failed: list[tuple[Path, str]] = field(default_factory=list)
    left_out: list[LeftOut] = field(default_factory=list)

    @property
    def complete(self) -> bool:
        """Tell whether the table has all that the user asked for."""
        return not self.failed and not any(item.asked for item in self.left_out)

    def __str__(self) -> str:
        """Format it for a person."""
        count, left_out = len(self.encoded), len(self.left_out)
        return "\n".join(
            [
                f"{self.table}: {count} scan{'s' * (count != 1)} ({len(self.failed)} failed"
                + (f", {left_out} left out)" if left_out else ")"),
                f"  encoded by {self.encoder['weights']}, voxels of {self.encoder['spacing']} mm; "
                f"tokenizer {self.encoder['tokenizer']}, {self.encoder['tokenizer_from']}",
                *(f"  failed: {printable(path)}: {printable(reason)}" for path, reason in self.failed),
                *(f"  {line}" for line in format_left_out(self.left_out)),
            ]
        )


def encode_scans(
    weights: Path | str, input_path: Path | str, output: Path | str, config: EncodeConfig | None = None
) -> EncodeSummary:
    """Encode all scans of an input into one table; see the head of this file.

    A scan that can't be used is recorded and the rest goes on. One scan at a time is in memory. The table is
    written whole or not at all.

    Args:
        weights: see :meth:`Encoder.load`.
        input_path: see ``find_volumes``.
        output: the file to write.
        config: how.

    Raises:
        UserError: no scans, no such weights or tokenizer, or they do not fit together.
        OSError: the table can't be written.
    """
    output, config = Path(output), config or EncodeConfig()
    if output.is_dir():
        raise UserError(f"{output}: a folder, expected the name of a file to write")
    refuse_unwritable(output.parent)
    listing = find_volumes(Path(input_path), config.domain, config.intensity, config.body_part)
    encoder = Encoder.load(weights, config)
    summary = EncodeSummary(output, encoder.record(), left_out=listing.left_out)
    content = torch.empty(len(listing.volumes), encoder.model.config.embed_dim)  # (N, D)
    style = torch.empty(len(listing.volumes), encoder.model.config.style_dim)  # (N, Ds)
    records: list[dict[str, Any]] = []
    with (
        atomic_path(output) as temporary,
        TemporaryFile(dir=output.parent) as data,  # the header tells what follows it, so it is written last
        ProgressBar("Encoding", len(listing.volumes), "window") as bar,
    ):
        table, scans = TensorFileWriter(data), len(listing.volumes)
        windows = 0  # of the scans before

        def show(encoded: int, of: int) -> None:
            tried = len(records) + len(summary.failed) + 1
            bar.total = round((windows + of) * scans / tried)  # as if the others had as many
            bar.update(encoded, f"scan {tried} of {scans}")

        for entry in listing.volumes:
            try:
                scan = encoder.encode(entry, show)
            except VolumeError as error:
                summary.failed.append((error.path, entry.tell(error.reason)))
                continue
            content[len(records)], style[len(records)] = scan.pooled_content, scan.pooled_style
            records.append(scan.record())
            table.add(f"content/{entry.name}", scan.content)
            table.add(f"style/{entry.name}", scan.style)
            windows += scan.windows
        bar.total = bar.done or scans
        table.add("content", content[: len(records)])
        table.add("style", style[: len(records)])
        table.write(temporary, {"format": FORMAT, **summary.encoder, "volumes": json.dumps(records)})
    summary.encoded = [record["name"] for record in records]
    return summary
