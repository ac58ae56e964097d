"""Export weights out of a run's last checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from meduet_fast.engine.checkpoint import latest_checkpoint, read_run
from meduet_fast.models import MeDUET
from meduet_fast.models.export import ExportFormat, export_model

Weights = Literal["teacher", "student"]


def export_run(
    run: Path, output: Path, form: ExportFormat = "meduet", weights: Weights = "teacher"
) -> list[Path]:
    """Write the weights of a run's last checkpoint for use elsewhere.

    Args:
        run: the run's folder.
        output, form: see :func:`meduet_fast.models.export.export_model`.
        weights: the teacher, which is what to use, or the student that it averages.

    Returns:
        The files written.

    Raises:
        UserError: if there is no checkpoint, it is damaged, the model does not fit the form, or the files
            can't be written.
    """
    checkpoint = latest_checkpoint(run)
    model = MeDUET.from_pretrained(checkpoint / f"{weights}.safetensors")
    return export_model(model, output, form, {"weights": weights, "step": read_run(checkpoint)["step"]})
