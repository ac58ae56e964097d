"""Imports point one way: no circle between modules, and no room imports one that stands above it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "meduet_fast"

# What each room may import, from the lowest to the highest; all may import the package itself (its version).
BASE = [
    "errors",
    "files",
    "lock",
    "settings",
    "devices",
    "connections",
    "progress",
    "weight_files",
    "tensor_file",
]
DRAWING = ["page", "plotting"]
MAY_IMPORT = {
    "errors": [],
    **{name: ["errors"] for name in BASE[1:-1]},
    "tensor_file": ["errors", "weight_files"],
    "page": [],
    "plotting": ["errors", "files"],
    "kernels": [],
    "layers": ["errors", "kernels"],
    "models": [*BASE, "kernels", "layers"],
    "engine": [*BASE, "kernels", "layers"],
    "data": BASE,
    "autoencoder": [*BASE, "engine", "data"],
    "prepare": [*BASE, "data", "autoencoder"],
    "pretraining": [*BASE, "kernels", "layers", "models", "engine", "data"],
    "probing": [*BASE, "kernels", "models", "data", "autoencoder"],
    "encoding": [*BASE, "models", "engine", "data", "autoencoder"],
    "synthesis": [
        *BASE, *DRAWING, "kernels", "layers", "models", "engine", "data", "autoencoder", "pretraining",
        "probing", "encoding",
    ],
    "report": [
        *BASE, *DRAWING, "kernels", "models", "engine", "data", "autoencoder", "prepare", "pretraining",
        "probing",
    ],
    "cli": [
        *BASE, "models", "engine", "data", "autoencoder", "prepare", "pretraining", "probing", "encoding",
        "synthesis", "report",
    ],
    "__main__": ["errors", "cli"],
}  # fmt: skip


def modules(root: Path) -> dict[str, Path]:
    """Names as installed, where the top-level folder ``kernels`` is ``meduet_fast.kernels``."""
    found = {}
    for folder, prefix in ((PACKAGE, PACKAGE), ("kernels", f"{PACKAGE}.kernels")):
        for path in (root / folder).rglob("*.py"):
            parts = path.relative_to(root / folder).with_suffix("").parts
            name = ".".join((prefix, *parts)).removesuffix(".__init__")
            if folder == "kernels" or not name.startswith(f"{PACKAGE}.kernels"):
                found[name] = path
    return found


def imported(name: str, path: Path, known: dict[str, Path]) -> Iterator[str]:
    """Modules of ours that ``name`` imports anywhere, also inside functions and for type checkers alone."""
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) + 1 - node.level] if node.level else []
            source = ".".join([*start, *([node.module] if node.module else [])])
            for alias in node.names:
                target = f"{source}.{alias.name}"
                if target in known or source in known:
                    yield target if target in known else source


def import_graph(root: Path) -> dict[str, set[str]]:
    known = modules(root)
    return {name: set(imported(name, path, known)) - {name} for name, path in known.items()}


def circles(graph: dict[str, set[str]]) -> set[str]:
    """The modules of each circle, in alphabetical order and joined by ' <-> '."""
    reached: dict[str, set[str]] = {}
    for start in graph:
        reached[start], waiting = set(), [start]
        while waiting:
            new = graph[waiting.pop()] - reached[start]
            reached[start] |= new
            waiting += new
    return {
        " <-> ".join(sorted(other for other in reached[name] if name in reached[other]))
        for name in graph
        if name in reached[name]
    }


def room(name: str) -> str:
    """``meduet_fast.data.store`` -> ``data``; empty for the package itself."""
    return name.removeprefix(PACKAGE).lstrip(".").split(".")[0]


def forbidden_arrows(graph: dict[str, set[str]]) -> set[str]:
    return {
        f"{name} -> {target}"
        for name, targets in graph.items()
        for target in targets
        if room(target) and room(name) != room(target) and room(target) not in MAY_IMPORT.get(room(name), [])
    }


def test_the_order_is_one() -> None:
    rooms = list(MAY_IMPORT)
    for high, allowed in MAY_IMPORT.items():
        assert all(rooms.index(low) < rooms.index(high) for low in allowed), high
    assert {room(name) for name in modules(ROOT)} - {""} == set(rooms)


def test_no_arrow_against_the_order() -> None:
    assert forbidden_arrows(import_graph(ROOT)) == set()


def test_no_circle_between_modules() -> None:
    assert circles(import_graph(ROOT)) == set()


@pytest.mark.parametrize(
    ("line", "arrow"),
    [
        ("from meduet_fast.models import MeDUET", "meduet_fast.engine.loop -> meduet_fast.models"),
        ("from ..data import store", "meduet_fast.engine.loop -> meduet_fast.data.store"),
        ("import meduet_fast.data.store as s", "meduet_fast.engine.loop -> meduet_fast.data.store"),
        ("def f():\n    from meduet_fast import cli", "meduet_fast.engine.loop -> meduet_fast.cli"),
    ],
)
def test_an_arrow_against_the_order_is_named(tmp_path: Path, line: str, arrow: str) -> None:
    for name in ("engine/loop", "models/__init__", "data/store", "cli", "__init__"):
        path = tmp_path / PACKAGE / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(line if name == "engine/loop" else "", encoding="utf-8")
    assert forbidden_arrows(import_graph(tmp_path)) == {arrow}


def test_a_circle_is_named() -> None:
    graph = {"a": {"b"}, "b": {"c"}, "c": {"a", "d"}, "d": set()}
    assert circles(graph) == {"a <-> b <-> c"}
