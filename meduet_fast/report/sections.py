"""Write the report's sections as HTML: what was found, and what to see in it."""

from __future__ import annotations

import json
from pathlib import Path

import torch

import meduet_fast
from meduet_fast.page import details, figure, paragraph, percent, table
from meduet_fast.probing import FactorScores, PairVerdict, StyleChange

from .curves import HEADLINE_LOSS, LOSS_PANELS, LossPanel
from .inputs import NETWORK, Findings, ReportInputs
from .pictures import BAR_MM, StylePicture


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
    if findings.filled:
        lines.append(f"Hidden tokens on held-out crops: {_filled(findings)}")
    if findings.verdicts:
        lines.append("Changing style, scans of the same anatomy:")
        lines += [f"  {_verdict(verdict, findings.best_way())}" for verdict in findings.verdicts]
    return "\n".join(lines)


def _filled(findings: Findings) -> str:
    """Say how the network fills in hidden tokens, beside interpolation without any network."""
    gain = findings.fill_gain()
    does = "better" if gain > 0 else "worse"
    return f"the network does {does} than smooth interpolation, its squared error is {_by(gain)}"


def _by(gain: float) -> str:
    """Say how much smaller an error is by a gain, a part of it; negative ones make it larger."""
    return f"{abs(100 * gain):.0f} % {'smaller' if gain > 0 else 'larger'}"


def _verdict(verdict: PairVerdict, way: str) -> str:
    """Say whether a change of style works, in plain words."""
    how = "by statistics" if way == "by_statistics" else "by rank"
    error = f"the squared error against the real scan is {_by(verdict.gain(way))}"
    stays = "the anatomy stays" if getattr(verdict, f"stays_{way}") else "the donor's anatomy comes along"
    word = "works" if verdict.works(way) else "does not work"
    return f"{verdict.first} and {verdict.second}: {word} ({how}): {error} than without the change; {stays}"


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
    body += paragraph(
        f"Style above content: {separation.gap_points:+.1f} percentage points (untrained: {before:+.1f}). "
        "In a well separated pair of factors style is near 100 % and content near chance. "
        f"{_adversary(inputs)}"
    )
    body += paragraph(f"Hidden tokens on held-out crops: {_filled(findings)}.")
    if findings.verdicts:
        gains = ", ".join(
            f"{_by(findings.style_gain(way))} {words}"
            for way, words in (("by_statistics", "by statistics"), ("by_rank", "by rank (the published way)"))
        )
        body += paragraph(
            "Giving a scan the style of another acquisition, on pairs that show the same anatomy, so that "
            "the right answer is known. The squared error against the real scan, mean over the pairs, beside "
            f"that of the scan left in its own style: {gains}."
        )
        body += "".join(
            paragraph(f"{_verdict(verdict, findings.best_way())}.") for verdict in findings.verdicts
        )
    return body


def _adversary(inputs: ReportInputs) -> str:
    """Say by which means content was kept from knowing the domain."""
    if inputs.config["objective"].get("content_adversary") != "erasure":
        return "Content was kept from knowing the domain by the published adversary (reversal of gradients)."
    return (
        "Content was kept from knowing the domain by erasure, which is not the published adversary; that one "
        "was not run here (--objective.content_adversary reversal)."
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
    """Tell how separation was measured; show retrieval and scatter."""
    found = findings.separation
    if found is None:
        return paragraph(f"Not measured: {findings.why_not}.")
    what = (
        f"The volumes {', '.join(found.volumes)} show the same anatomy in {len(found.domains)} acquisitions, "
        "each a domain, so that only the way of imaging tells them apart."
        if found.same_anatomy
        else "No held-out volumes show the same anatomy in several acquisitions. The domains differ in "
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
    return body


def filling(findings: Findings, pngs: list[Path]) -> str:
    """Tell how well hidden tokens are filled in, in numbers and pictures."""
    if not findings.filled:
        return paragraph(f"Not measured: {findings.why_not}.")
    body = table(
        "Hidden tokens on held-out crops: mean squared error of their latents, as a part of the latents' "
        "variance",
        ["", "network", "smooth interpolation", "network / interpolation"],
        [
            [
                item.domain,
                f"{item.network / item.variance:.3f}",
                f"{item.interpolation / item.variance:.3f}",
                f"{item.network / item.interpolation:.2f}",
            ]
            for item in findings.filled
        ],
    )
    body += paragraph(
        f"Half of a crop's tokens are hidden and have to be filled in from the others: {_filled(findings)}. "
        "Smooth interpolation uses no network: every hidden value is the mean of its neighbours (a harmonic "
        "function). Below 1 in the last column the network has learnt more than that images are smooth."
    )
    for png, picture in zip(pngs, findings.filled_pictures, strict=True):
        network, smooth = picture.psnr
        body += figure(
            png,
            f"The held-out part of {picture.region.domain}, put together from overlapping windows. In each "
            "half of the tokens was hidden, then the other half; only what was filled in while it was hidden "
            f"is shown. Network {network:.1f} dB, interpolation {smooth:.1f} dB (PSNR against the "
            "tokenizer's image, which is the best that both can reach; higher is closer). "
            f"{picture.region.grey}; the bar is {BAR_MM} mm.",
            f"Slices of {picture.region.domain}: scan, through the tokenizer, filled in by network and "
            "interpolation",
        )
    return body


def styles(inputs: ReportInputs, findings: Findings, pngs: list[Path]) -> str:
    """Tell what changes of style do, in numbers and pictures."""
    if not findings.panels:
        return paragraph(f"Not measured: {findings.why_not}.")
    where = "all over both" if inputs.held_out.kind == "volumes" else "in other places"
    body = paragraph(
        (
            "A scan is encoded, its style is replaced, its content is kept, and both are put together again. "
            if inputs.whole
            else "Crops are mixed, taken apart and filled in as in the training, with the style replaced; "
            "this network was not trained to put whole crops together (objective.lambda_whole is 0), so all "
            "that is shown is a guess. "
        )
        + "By statistics: each dimension of the style is moved from the mean and spread that it has in the "
        "scan's own volume to those in the other volume, measured "
        f"{where}. By rank (the published way): each token gets the style of one token of a crop of the "
        "other volume, from another place."
    )
    if findings.verdicts:
        body += table(
            "Same anatomy, two acquisitions: mean squared error of latents against the other acquisition's "
            "own, over the whole held-out region, mean of both directions",
            ["", "own style kept", "by statistics", "by rank", "reconstruction itself", "verdict"],
            [
                [
                    f"{verdict.first} and {verdict.second}",
                    f"{verdict.kept:.3f}",
                    f"{verdict.by_statistics:.3f} ({-100 * verdict.gain('by_statistics'):+.0f} %)",
                    f"{verdict.by_rank:.3f} ({-100 * verdict.gain('by_rank'):+.0f} %)",
                    f"{verdict.own:.3f}",
                    "works" if verdict.works(findings.best_way()) else "does not work",
                ]
                for verdict in findings.verdicts
            ],
        )
        how = "by statistics" if findings.best_way() == "by_statistics" else "by rank"
        body += paragraph(
            f"The verdict is on the way that is better on average ({how}). It works if the result is nearer "
            "to the real scan of the other acquisition than the scan left in its own style is, and if the "
            "anatomy stays in both directions. Noise can't be copied: it is random, so where acquisitions "
            "differ by noise alone no change of style comes nearer."
        )
    rows = [
        [f"{own} in the style of {other}", *("yes" if stays else "no" for stays in _stays(change))]
        for own, other, change in findings.panels
    ]
    body += table(
        "Does the anatomy stay? The result resembles (correlation) its own content more than the style's "
        "donor",
        ["", "by statistics", "by rank"],
        rows,
    )
    for png, picture in zip(pngs, findings.style_pictures, strict=True):
        body += figure(
            png,
            _style_caption(picture),
            f"Slices of {picture.region.domain}: its own style, and that of {picture.other}",
        )
    if not pngs:
        body += paragraph("No pictures: the store holds imported latents, whose tokenizer is unknown.")
    return body


def _stays(change: StyleChange) -> tuple[bool, bool]:
    return change.stays_by_statistics, change.stays_by_rank


def _style_caption(picture: StylePicture) -> str:
    region, away = picture.region, picture.away
    caption = (
        f"The held-out part of {region.domain}, put together from overlapping windows: the scan; rebuilt "
        f"from its own content and style; with the style of {picture.other} by statistics, and by rank. "
    )
    if picture.change.kept is None:
        caption += "Another anatomy: there is no truth; the shapes should be those of the first column. "
    elif away:
        unit = region.scale[1]
        nearer = away["kept"] - away["by_statistics"]
        caption += (
            f"The last column is the real scan in {picture.other}. On these slices the result by statistics "
            f"is {away['by_statistics']:.0f} {unit} away from it (root mean square), the scan left in its "
            f"own style {away['kept']:.0f}: {abs(nearer):.0f} {unit} "
            f"{'nearer' if nearer > 0 else 'farther'}. "
        )
    return f"{caption}{region.grey}; the bar is {BAR_MM} mm."


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
        "held out": inputs.held_out.describe(),
        "latent store": f"{store.path} ({len(store.entries)} volumes, {len(store.domains)} domains)",
        "tokenizer": store.index.tokenizer,
        "software": f"meduet-fast {meduet_fast.__version__}, torch {torch.__version__}",
    }
    return details("All settings", facts, json.dumps(config, indent=1))
