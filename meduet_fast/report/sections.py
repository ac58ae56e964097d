"""Write the report's sections as HTML: what was found, and what to see in it."""

from __future__ import annotations

import json
from pathlib import Path

import torch

import meduet_fast
from meduet_fast.probing import FactorScores

from .curves import HEADLINE_LOSS, LOSS_PANELS, LossPanel
from .inputs import NETWORK, Findings, ReportInputs
from .page import details, figure, paragraph, table


def percent(value: float | None) -> str:
    """Return a share as text."""
    return "" if value is None else f"{100 * value:.1f} %"


def headline(findings: Findings) -> str:
    """Return the two results that matter, in a few plain lines."""
    first, last = findings.loss
    lines = [f"{LOSS_PANELS[HEADLINE_LOSS].title}: loss {first:.3f} at first, {last:.3f} at last"]
    separation = findings.separation
    if separation is None:
        return "\n".join([*lines, f"Separation not measured: {findings.why_not}"])
    probe = separation.probe
    lines += [
        f"Linear probe for the domain on {separation.crops_tested} held-out crops "
        f"(chance {percent(separation.probe_chance)}):",
        f"  style   {percent(probe.style)} (untrained {percent(probe.untrained_style)})",
        f"  content {percent(probe.content)} (untrained {percent(probe.untrained_content)})",
        f"  style above content: {separation.gap_points:.1f} points",
    ]
    return "\n".join(lines)


def summary(inputs: ReportInputs, findings: Findings) -> str:
    """Write what the run's settings give to think about, and the headline tables."""
    first, last = findings.loss
    panel = LOSS_PANELS[HEADLINE_LOSS]
    body = "".join(paragraph(f"Warning: {doubt}.") for doubt in inputs.doubts())
    body += table(
        f"{panel.title} ({panel.unit})",
        ["", "first tenth of the run", "last tenth", "last / first"],
        [[HEADLINE_LOSS, f"{first:.3f}", f"{last:.3f}", f"{last / first:.2f}" if first else ""]],
    )
    separation = findings.separation
    if separation is None:
        return body + paragraph(f"Separation was not measured: {findings.why_not}.")
    body += _score_table(
        "Linear probe: how often the domain is named right on held-out crops (balanced accuracy)",
        separation.probe,
        separation.probe_chance,
    )
    before = 100 * (separation.probe.untrained_style - separation.probe.untrained_content)
    return body + paragraph(
        f"Style above content: {separation.gap_points:+.1f} percentage points (untrained: {before:+.1f}). "
        "In a well separated pair of factors style is near 100 % and content near chance."
    )


def _score_table(caption: str, scores: FactorScores, chance: float | None) -> str:
    return table(
        caption,
        ["", "trained", "untrained", "chance"],
        [
            ["from style", percent(scores.style), percent(scores.untrained_style), percent(chance)],
            ["from content", percent(scores.content), percent(scores.untrained_content), percent(chance)],
        ],
    )


def losses(png: Path, panels: dict[str, LossPanel]) -> str:
    """Show the curves of all losses."""
    notes = " ".join(panel.note for panel in panels.values() if panel.note)
    return figure(
        png,
        f"Every term of the loss: single records faint, their running mean bold. {notes}",
        f"Panels with the {len(panels)} loss terms over training steps",
    )


def separation(findings: Findings, png: Path | None) -> str:
    """Tell how separation was measured; show retrieval, scatter, and the errors of swaps."""
    found = findings.separation
    if found is None:
        return paragraph(f"Not measured: {findings.why_not}.")
    what = (
        f"The volumes {', '.join(found.volumes)} show the same anatomy in {len(found.domains)} acquisitions, "
        "each a domain, so that only the way of imaging tells them apart."
        if found.same_anatomy
        else "No volumes of this store show the same anatomy in several acquisitions. Its domains differ in "
        "anatomy too, which a probe may find in content by right."
    )
    where = (
        "training never saw"
        if found.unseen
        else "were part of the training, because the run held nothing out; the probe alone never saw them"
    )
    body = paragraph(
        f"{what} A crop's content and style are the means over its tokens. The probe is a logistic "
        f"regression, fitted on {found.crops_fitted} crops of the training region and tested on "
        f"{found.crops_tested} crops that {where}. Crops overlap, so they tell less than as many independent "
        f"ones. The network is the {NETWORK} (the running average of the weights); the untrained one is the "
        "same network before its first step."
    )
    if png is not None:
        body += figure(
            png,
            "Each point is one held-out crop; the two directions are those in which the factor varies most. "
            "Colours should lie in clumps in style and be well mixed in content.",
            "Two scatter plots of crops, content and style, coloured by domain",
        )
    if found.retrieval is not None:
        body += _score_table(
            "Same place found: how often the most similar crop of another acquisition is the same place",
            found.retrieval,
            found.retrieval_chance,
        )
        body += paragraph(
            "Content should find the place again, whatever the acquisition; style should not know places."
        )
    if findings.swaps:
        places = 2 * findings.swaps[0][2].places
        body += table(
            "Swapping styles: squared error of latents against the other acquisition's own crop of the "
            f"place, mean over {places} held-out crops",
            ["", "style swapped", "own style kept", "plain reconstruction"],
            [
                [
                    f"{first} and {second}",
                    f"{errors.swapped:.3f}",
                    f"{errors.kept:.3f}",
                    f"{errors.own:.3f}",
                ]
                for first, second, errors in findings.swaps
            ],
        )
        body += paragraph(
            "A swap works if its error is below that of keeping the own style; the error of plain "
            "reconstruction, against the crop itself, is about what it can reach."
        )
    return body


def pictures(findings: Findings, pngs: list[Path]) -> str:
    """Show crops with swapped styles, and say what to see in them."""
    if not pngs:
        why = findings.why_not or "the store holds imported latents, whose tokenizer is unknown"
        return paragraph(f"None: {why}.")
    body = paragraph(
        "Each picture shows two held-out crops, in three middle planes each. The network sees them mixed: "
        "half of the blocks from one, the other half from the other. It takes them apart, and its decoder "
        "gets the blocks of one crop alone and fills in the rest. Every block shown is one that it had to "
        "fill in: two passes, each hiding the half that the other shows. So a reconstruction is a guess from "
        "the surroundings, and blurred. It cannot be better than the row above it, which is what the "
        "tokenizer keeps of the input. Figures in dB (PSNR) tell how close an image is to its goal, the "
        "second row or the truth: higher is closer."
    )
    for png, (left, right) in zip(pngs, findings.pictures, strict=True):
        caption = (
            f"Different anatomy: {left.own} and {right.own}. The last row should show the anatomy of its own "
            "side with the brightness and grain of the other. There is no truth to compare with here."
        )
        if left.truth is not None:
            gains = [f"{psnr['swapped'] - psnr['kept']:+.1f}" for psnr in (left.psnr(), right.psnr())]
            caption = (
                f"Two places of the same body, the left one scanned as {left.own}, the right one as "
                f"{right.own}. The fourth row keeps the anatomy and takes the style from the other side; it "
                "is good if it has the shapes of the third row with the brightness, sharpness and grain of "
                "the last one, which is the real scan of that place. The swap brings the image "
                f"{gains[0]} dB (left) and {gains[1]} dB (right) nearer to it."
            )
        body += figure(png, caption, f"Crops of {left.own} and {right.own} with swapped styles")
    return body


def speed(png: Path) -> str:
    """Show throughput over time."""
    return figure(
        png,
        "Crops a second through all passes of a step, the share of the time that the loop waited for its "
        "data, and peak memory. A dip in throughput without waiting is the machine's other work, or another "
        "loss setting in.",
        "Three panels: throughput, waiting for data and memory over time",
    )


def settings(inputs: ReportInputs) -> str:
    """Tell where everything came from."""
    config, store = inputs.config, inputs.store
    model = config["model"]
    facts = {
        "run": str(inputs.run),
        "steps": f"{inputs.step} of {config['steps']}",
        "crops in a step": str(config["batch_size"] * config["accumulate"]),
        "crop": f"{model['latent_size']}^3 latent voxels "
        f"({model['latent_size'] * store.index.compression * store.entries[0].spacing[0]:.0f} mm), "
        f"patches of {model['patch_size']}^3",
        "encoder": f"{model['depth']} blocks, width {model['embed_dim']}",
        "held out": f"{100 * config['held_out_fraction']:.0f} % of every volume's left-right axis",
        "latent store": f"{store.path} ({len(store.entries)} volumes, {len(store.domains)} domains)",
        "tokenizer": store.index.tokenizer,
        "software": f"meduet-fast {meduet_fast.__version__}, torch {torch.__version__}",
    }
    return details("All settings", facts, json.dumps(config, indent=1))
