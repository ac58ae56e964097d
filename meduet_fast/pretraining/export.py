"""Export weights out of a run's last checkpoint."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Literal

from meduet_fast.engine.checkpoint import latest_checkpoint, read_run
from meduet_fast.models import MeDUET
from meduet_fast.models.export import ExportFormat, export_model

from .config import doubts, kept_of_start

Weights = Literal["teacher", "student"]


def export_run(
    run: Path, output: Path, form: ExportFormat = "meduet", weights: Weights = "teacher"
) -> list[Path]:
    """Write the weights of a run's last checkpoint for use elsewhere; warn of a teacher near its start.

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
    step, config = read_run(checkpoint)["step"], read_run(run, of_checkpoint=False)["config"]
    source = {"weights": weights, "step": step}
    if weights == "teacher":
        steps, optimizer = config["steps"], config["optimizer"]
        momenta = optimizer["teacher_momentum"], optimizer["final_teacher_momentum"]
        source["teacher_keeps_of_start"] = round(kept_of_start(steps, *momenta, step), 4)
        for doubt in doubts(steps, *momenta, None, step):
            print(f"warning: {doubt}; --weights student has the network that was trained", file=sys.stderr)
    return export_model(model, output, form, source)
