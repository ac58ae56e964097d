"""Write a report of a run: RUN/report/index.html, its figures as PNG files, and its numbers as JSON."""

from __future__ import annotations

import json
import math
from functools import partial
from pathlib import Path
from typing import Any

from meduet_fast.engine.loggers import BOARD, log_pictures
from meduet_fast.errors import UserError
from meduet_fast.files import atomic_path, remove_leftovers
from meduet_fast.page import page
from meduet_fast.plotting import save_png
from meduet_fast.progress import track

from . import sections
from .curves import draw_losses, draw_speed, loss_panels
from .inputs import NETWORK, Findings, ReportInputs, measure, open_run
from .pictures import FilledPicture, StylePicture, draw_columns
from .scatter import draw_scatter

FOLDER, PAGE, NUMBERS = "report", "index.html", "separation.json"


def write_report(run: Path, data: Path | None = None) -> Path:
    """Write ``RUN/report/``; a report that is there already and up to date is left alone.

    Args:
        run: folder of a run that ``pretrain`` wrote; its TensorBoard gets the figures, too.
        data: its latent store; by default where the run found it.

    Returns:
        ``RUN/report/index.html``, which needs no other file. Beside it lie its figures (PNG) and
        ``separation.json`` with all numbers.

    Raises:
        UserError: see :func:`~meduet_fast.report.inputs.open_run`; or the report cannot be written.
    """
    inputs = open_run(run, data)
    folder = run / FOLDER
    identity = inputs.identity()
    if (folder / PAGE).is_file() and read_numbers(run).get("made_from") == identity:
        return folder / PAGE
    findings = measure(inputs)
    try:
        return _write(folder, inputs, findings, identity)
    except OSError as error:
        raise UserError(f"{folder}: the report cannot be written: {error.strerror or error}") from error


def read_numbers(run: Path) -> dict[str, Any]:
    """Read what ``separation.json`` of a run's report holds; empty without a readable one."""
    try:
        return dict(json.loads((run / FOLDER / NUMBERS).read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return {}


def _write(folder: Path, inputs: ReportInputs, findings: Findings, identity: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    remove_leftovers(folder)
    # Without its page an older report counts as absent, should this one be cut short.
    (folder / PAGE).unlink(missing_ok=True)
    for png in folder.glob("*.png"):
        png.unlink()
    config, domains = inputs.config, inputs.store.domains
    panels = loss_panels(inputs.records)
    starts = {  # of the losses that may set in later or be off
        name: config[f"{name}_start_step"] if config["objective"].get(name, True) else math.inf
        for name in panels
        if f"{name}_start_step" in config
    }
    losses, speed, scatter = (folder / f"{name}.png" for name in ("losses", "speed", "factors"))
    fills = [folder / f"filled{number + 1}.png" for number in range(len(findings.filled_pictures))]
    styles = [folder / f"styles{number + 1}.png" for number in range(len(findings.style_pictures))]
    shown: list[FilledPicture | StylePicture] = [*findings.filled_pictures, *findings.style_pictures]
    figures = [
        (losses, partial(draw_losses, inputs.records, starts, len(domains))),
        (speed, partial(draw_speed, inputs.records)),
        *(
            (path, partial(draw_columns, picture.columns, picture.region.mm))
            for path, picture in zip([*fills, *styles], shown, strict=True)
        ),
    ]
    if findings.table is not None and findings.separation is not None:
        figures.append((scatter, partial(draw_scatter, findings.table, domains, findings.separation)))
    for path, draw in track(figures, "Drawing", "figure"):
        save_png(draw(), path)
    if (inputs.run / BOARD).is_dir():
        log_pictures(inputs.run, inputs.step, {path.stem: path for path, _ in figures})
    html = page(
        f"Pretraining report: {inputs.run.resolve().name}",
        f"MeDUET after {inputs.step} steps on {len(domains)} domains",
        {
            "Summary": sections.summary(inputs, findings),
            "Styles": sections.styles(inputs, findings, styles),
            "Separation": sections.separation(findings, scatter if findings.table is not None else None),
            "Filling in": sections.filling(findings, fills),
            "Losses": sections.losses(losses, panels),
            "Speed": sections.speed(speed),
            "Settings": sections.settings(inputs),
        },
    )
    numbers = {
        "made_from": identity,
        "step": inputs.step,
        "network": NETWORK,
        "headline": sections.headline(findings),
        **findings.numbers(),
    }
    with atomic_path(folder / NUMBERS) as temporary:
        temporary.write_text(json.dumps(numbers, indent=1), encoding="utf-8")
    with atomic_path(folder / PAGE) as temporary:
        temporary.write_text(html, encoding="utf-8")
    return folder / PAGE
