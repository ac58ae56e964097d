"""Build a report as one HTML file that needs nothing else."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

STYLE_SHEET = """
:root { color-scheme: light dark; --ink: #1c1c1c; --paper: #fff; --faint: #5f5f5f; --line: #ddd; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e8e8e8; --paper: #17181a; --faint: #a5a5a5; --line: #3a3b3d; } }
body { margin: 0 auto; max-width: 66rem; padding: 1.5rem; color: var(--ink); background: var(--paper);
  font: 1rem/1.5 system-ui, sans-serif; }
h1 { font-size: 1.6rem; margin-bottom: 0; } h2 { font-size: 1.25rem; margin-top: 2.5rem; }
p, li, figcaption { max-width: 50rem; } .faint, figcaption { color: var(--faint); }
table { border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums; }
caption { text-align: left; color: var(--faint); padding-bottom: .3rem; }
th, td { padding: .3rem .9rem .3rem 0; text-align: right; border-bottom: 1px solid var(--line); }
th:first-child, .facts td { text-align: left; font-weight: normal; }
figure { margin: 1.5rem 0; } figcaption { margin-top: .4rem; }
img { max-width: 100%; height: auto; background: #fff; border-radius: 4px;
  padding: .5rem; box-sizing: border-box; }
nav a { margin-right: 1rem; } pre { overflow-x: auto; font-size: .85rem; }
"""


def percent(value: float | None) -> str:
    """Return a share as text."""
    return "" if value is None else f"{100 * value:.1f} %"


def paragraph(text: str) -> str:
    """Return plain text as a paragraph."""
    return f"<p>{escape(text)}</p>"


def table(caption: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return plain texts as a table; the first column is the rows' headings."""
    head = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in header)
    body = "".join(
        f'<tr><th scope="row">{escape(first)}</th>'
        + "".join(f"<td>{escape(cell)}</td>" for cell in rest)
        + "</tr>"
        for first, *rest in rows
    )
    return (
        f"<table><caption>{escape(caption)}</caption><thead><tr>{head}</tr></thead>"
        f"<tbody>{body}</tbody></table>"
    )


def figure(png: Path, caption: str, alternative: str) -> str:
    """Return an image, embedded, with a plain text below it."""
    data = base64.b64encode(png.read_bytes()).decode("ascii")
    return (
        f'<figure><img src="data:image/png;base64,{data}" alt="{escape(alternative)}">'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def details(summary: str, facts: Mapping[str, str], text: str) -> str:
    """Return facts as a table, and a longer text that opens on demand."""
    rows = "".join(
        f'<tr><th scope="row">{escape(key)}</th><td>{escape(value)}</td></tr>' for key, value in facts.items()
    )
    return (
        f'<table class="facts"><tbody>{rows}</tbody></table>'
        f"<details><summary>{escape(summary)}</summary><pre>{escape(text)}</pre></details>"
    )


def page(title: str, subtitle: str, sections: Mapping[str, str]) -> str:
    """Return the whole document; ``sections`` are HTML by heading."""
    anchors = {heading: escape(heading.lower().replace(" ", "-")) for heading in sections}
    links = "".join(f'<a href="#{anchor}">{escape(heading)}</a>' for heading, anchor in anchors.items())
    bodies = "\n".join(
        f'<section id="{anchors[heading]}"><h2>{escape(heading)}</h2>\n{body}\n</section>'
        for heading, body in sections.items()
    )
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE_SHEET}</style></head>\n"
        f'<body><header><h1>{escape(title)}</h1><p class="faint">{escape(subtitle)}</p>'
        f"<nav>{links}</nav></header>\n<main>\n{bodies}\n</main></body></html>\n"
    )
