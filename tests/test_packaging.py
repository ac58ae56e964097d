"""The source distribution builds and tests itself; its description reads well without the repository."""

from __future__ import annotations

import fcntl
import re
import subprocess
import sys
import tarfile
from email.parser import BytesParser
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = (".ci", "benchmarks", "docs", "examples", "kernels", "meduet_fast", "tests")
TOP = [
    "CHANGELOG.md", "CITATION.cff", "CONTRIBUTING.md", "LICENSE", "MANIFEST.in", "Makefile", "README.md",
    "constraints-oldest.txt", "constraints.txt", "pyproject.toml", "setup.py", ".github/workflows/tests.yml",
]  # fmt: skip


def setup(*arguments: object, cwd: Path) -> None:
    command = [sys.executable, "-W", "ignore", "setup.py", "-q", *map(str, arguments)]
    subprocess.run(command, check=True, capture_output=True, cwd=cwd, timeout=120)


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The distribution's folder, unpacked away from the repository."""
    folder = tmp_path_factory.mktemp("sdist")
    with (ROOT / "setup.py").open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # another test process may be at it: sdist makes a folder in ROOT
        setup("egg_info", "--egg-base", folder, "sdist", "--dist-dir", folder, cwd=ROOT)
    [archive] = folder.glob("*.tar.gz")
    with tarfile.open(archive) as packed:
        packed.extractall(folder, filter="data")
    return folder / archive.name.removesuffix(".tar.gz")


def files(root: Path, folder: str) -> set[str]:
    """Names below ``folder``, without what Python and the checkout leave there."""
    return {
        path.relative_to(root).as_posix()
        for path in (root / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and not path.is_symlink()
    }


def test_sdist_has_what_building_and_testing_need(unpacked: Path) -> None:
    assert [name for name in TOP if not (unpacked / name).is_file()] == []
    for folder in FOLDERS:
        assert files(unpacked, folder) == files(ROOT, folder), folder


def test_sdist_builds_the_installed_layout(unpacked: Path, tmp_path: Path) -> None:
    setup("build", "--build-base", tmp_path / "build", "--build-lib", tmp_path / "lib", cwd=unpacked)
    package = tmp_path / "lib" / "meduet_fast"
    unshipped = {"kernels/inspect.json"}  # for reviewers
    assert files(package, "") - files(package, "kernels") == files(unpacked / "meduet_fast", "")
    assert files(package, "kernels") == files(unpacked, "kernels") - unshipped


def test_kernels_bring_torch_and_triton_alone(unpacked: Path) -> None:
    text = (unpacked.parent / "meduet_fast.egg-info" / "requires.txt").read_text()
    sections = dict(re.findall(r"^\[(.*?)\]\n(.*?)(?=^\[|\Z)", f"[]\n{text}", re.DOTALL | re.MULTILINE))
    brought = {extra: set(lines.split()) for extra, lines in sections.items()}
    assert [line.split("<")[0] for line in brought[""]] == ["torch"]
    assert [line.split(">")[0] for line in brought[':platform_system == "Linux"']] == ["triton"]
    assert brought["train"]
    assert brought["train"] < brought["dev"]


def test_description_has_no_links_that_lead_nowhere(unpacked: Path) -> None:
    metadata = BytesParser().parsebytes((unpacked / "PKG-INFO").read_bytes())
    assert metadata["Author"] == "meduet-fast developers"
    assert metadata["License-Expression"] == "Apache-2.0"
    description, readme = metadata.get_payload(), (ROOT / "README.md").read_text(encoding="utf-8")
    targets = re.findall(r"\]\(([^)]*)\)", readme)
    relative = [target for target in targets if not target.startswith(("https://", "#"))]
    assert relative
    assert [target for target in relative if f"]({target})" in description] == []
    assert [target for target in targets if target not in relative and target not in description] == []
    assert "docs/scaling.md for what was run" in description
    assert "![" not in description


def test_links_of_the_documents_lead_somewhere() -> None:
    for page in [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text(encoding="utf-8")):
            assert target.startswith("https://") or (page.parent / target).exists(), f"{page.name}: {target}"
