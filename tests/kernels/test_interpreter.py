"""Starts the tests in ``interpreted/``, and parity with the published method, with interpreted kernels.

Triton must know from its import on that it is to interpret, hence processes of their own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

pytest.importorskip("triton")

HERE = Path(__file__).parent
FILES = [*sorted((HERE / "interpreted").glob("test_*.py")), HERE.parent / "objectives" / "test_parity.py"]


Runs = dict[Path, Future[subprocess.CompletedProcess[str]]]


def run(file: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-P", "-m", "pytest", "-q", "--no-header", "-p", "no:cacheprovider", str(file)]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=900)


@pytest.fixture(scope="module")
def runs(request: pytest.FixtureRequest) -> Iterator[Runs]:
    """The selected files, one process for each processor at a time."""
    chosen = [item.callspec.params["file"] for item in request.session.items if item.path == Path(__file__)]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        yield {file: pool.submit(run, file) for file in chosen}


@pytest.mark.parametrize("file", FILES, ids=lambda path: path.stem)
def test_kernels_in_the_interpreter(file: Path, runs: Runs) -> None:
    done = runs[file].result()
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout
