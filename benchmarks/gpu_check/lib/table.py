"""The table at the end: what failed, how each part ended, the figures; short enough to be read at once."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

from .common import OUT

LIMIT = 11_000  # characters
FAILURES = 5_000  # of them for what failed
SAME = 4  # failures of a part that begin alike are told this often


class Ended(NamedTuple):
    """How a part ended.

    Attributes:
        name: of the part.
        how: in words.
        seconds: that it took.
        limit: that it could have taken.
    """

    name: str
    how: str
    seconds: float
    limit: float


def records() -> list[dict[str, Any]]:
    """Read all findings; of a line that a kill cut short nothing is left."""
    path = OUT / "results.jsonl"
    found = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


def failures(found: Sequence[dict[str, Any]]) -> list[str]:
    """Return a line for each failure, and how many more there are of those that fail alike."""
    lines, room = [], FAILURES
    alike: Counter[tuple[str, str]] = Counter()
    for number, record in enumerate(found):
        key = record["part"], record["text"][:60]
        alike[key] += 1
        line = f"{key[0]} | {record['name'][:90]} | {record['text'][: 260 if number < 12 else 120]}"
        if alike[key] > SAME or len(line) > room:
            continue
        room -= len(line)
        lines.append(line)
    lines += [
        f"   ({count - SAME} more of {part}: {text}...)"
        for (part, text), count in alike.items()
        if count > SAME
    ]
    return lines


def table(parts: Sequence[Ended]) -> str:
    """Return the table of all findings so far."""
    found = records()
    failed = [record for record in found if record["status"] == "fail"]
    rehearsal = " OF A REHEARSAL: no figure means anything" if os.environ.get("KIT_REHEARSE") == "1" else ""
    lines = ["", "=" * 100, "SUMMARY" + rehearsal]
    lines.append(
        f"-- {len(failed)} failures"
        + (", the first words of each (all: results.jsonl, live.log)" if failed else "")
    )
    lines += failures(failed)
    lines.append("-- parts")
    for part in parts:
        counts = Counter(record["status"] for record in found if record["part"] == part.name)
        lines.append(
            f"{part.name:10} {part.how:18} {part.seconds:4.0f} of {part.limit:.0f} s   "
            f"ok {counts['ok']}  fail {counts['fail']}  skip {counts['skip']}"
        )
    lines.append("-- figures")
    for name in ("env", "pretrain", "synthesis", "step", "official", "kernels", "attention", "probe"):
        for record in found:
            if (
                record["part"] != name
                or record["status"] not in ("ok", "note")
                or record["name"].startswith("import ")
            ):
                continue
            # Of benchmarks the table tells ours alone; its ratios name the others.
            if name in ("official", "kernels", "attention") and not record["name"].endswith(", ours"):
                continue
            figures = " ".join(
                f"{key}={value}"
                for key, value in record.items()
                if key not in ("part", "name", "status", "text")
            )
            text = record["text"][: 330 if name in ("env", "pretrain", "synthesis") else 160]
            lines.append(f"{record['name'][:96]} | {figures} {text}".rstrip())
    slow = sorted(
        (record for record in found if record.get("seconds")), key=lambda record: -float(record["seconds"])
    )[:5]
    lines.append(
        "-- slowest: " + "; ".join(f"{item['part']} {item['name'][:50]} {item['seconds']} s" for item in slow)
    )
    text = "\n".join(lines) + "\n"
    return text if len(text) <= LIMIT else text[:LIMIT] + "\n... cut: see results.jsonl\n"
