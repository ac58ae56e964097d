"""Starts the tests in ``interpreted/``, and parity with the published method, with interpreted kernels.

Triton must know from its import on that it is to interpret, hence processes of their own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

HERE = Path(__file__).parent
FILES = [*sorted((HERE / "interpreted").glob("test_*.py")), HERE.parent / "pretraining" / "test_parity.py"]


@pytest.mark.parametrize("file", FILES, ids=lambda path: path.stem)
def test_kernels_in_the_interpreter(file: Path) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "--no-header", "-p", "no:cacheprovider", str(file)]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    # `-m` puts the working directory on sys.path: not the root, where `kernels` would be found.
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=HERE, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout
