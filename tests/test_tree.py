"""The tree that CONTRIBUTING.md draws is the tree."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
IGNORED = {"__pycache__", "kernels"}  # in meduet_fast, the latter is a link to the top-level folder


def drawn(page: str) -> dict[str, set[str]]:
    """Contents of each folder in the drawing; a folder without any stands for all that is in it."""
    [block] = re.findall(r"^```\n(kernels/.*?)^```", page, re.DOTALL | re.MULTILINE)
    folders: dict[str, set[str]] = {"": set()}
    path: list[str] = []
    for line in block.splitlines():
        indent = len(line) - len(line.lstrip())
        path = path[: indent // 2]
        names = [word for word in line.split("  ") if re.fullmatch(r"\s*\w+(\.\w+|/)\s*", word)]
        assert names, line
        folders.setdefault("/".join(path), set()).update(name.strip().rstrip("/") for name in names)
        if names[0].strip().endswith("/"):
            path.append(names[0].strip().rstrip("/"))
    return folders


def test_the_drawing_is_the_tree() -> None:
    folders = drawn((ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"))
    different = {name for name in folders.pop("") if not (ROOT / name).is_dir()}
    for folder, names in folders.items():
        there = {path.name for path in (ROOT / folder).iterdir() if path.name not in IGNORED}
        different |= {f"{folder}/{name}" for name in there ^ names}
    assert different == set()
