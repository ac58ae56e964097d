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
SHARES = [FILES[start::2] for start in range(2)]  # a process takes seconds to import all that it needs


@pytest.mark.parametrize("files", SHARES, ids=lambda paths: ", ".join(path.stem for path in paths))
def test_kernels_in_the_interpreter(files: list[Path]) -> None:
    options = ["-q", "--no-header", "-p", "no:cacheprovider"]
    command = [sys.executable, "-m", "pytest", *options, *map(str, files)]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    # `-m` puts the working directory on sys.path: not the root, where `kernels` would be found.
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=HERE, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout
