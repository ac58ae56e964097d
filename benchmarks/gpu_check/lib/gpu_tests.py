"""Run ``tests/gpu`` in several processes on one GPU; as a plugin of pytest, tell results as they come.

What matters most comes first; a test that takes too long fails alone, and what the time does not reach is
skipped, so that pytest ends by itself. A process that has lost its GPU context after a failure ends, and
another one takes its place.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Generator
from typing import Any

import pytest

from .common import LOGS, OUT, REHEARSE, emit, left, require_cuda, start_cuda

ORDER = (
    "test_training", "test_synthesis", "test_exact-bfloat16", "test_no_operation", "test_compiled",
    "test_exact-float32", "test_fifty", "test_exact-float16", "test_attention",
)  # fmt: skip
HEAVY = ("131072", "16384x16384")
TOO_HEAVY = ("131072",)  # minutes of float64 each; KIT_HEAVY=1 runs them
TEST_S = 90  # seconds for one test
END_S = 15  # before the limit no test begins
_FAILED: pytest.StashKey[bool] = pytest.StashKey()
_told: set[str] = set()


def rank(item: pytest.Item) -> tuple[bool, int]:
    """Return an item's place in the order."""
    name = item.nodeid
    for dtype in ("bfloat16", "float16", "float32"):
        if "test_exact" in name and f"torch.{dtype}" in name:
            name += f" test_exact-{dtype}"
    position = next((number for number, part in enumerate(ORDER) if part in name), len(ORDER))
    return any(part in name for part in HEAVY), position


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Put the items in order; leave the heaviest out."""
    items.sort(key=rank)
    if os.environ.get("KIT_HEAVY") != "1":
        heavy = [item for item in items if any(part in item.nodeid for part in TOO_HEAVY)]
        config.hook.pytest_deselected(items=heavy)
        items[:] = [item for item in items if item not in heavy]


@pytest.hookimpl(trylast=True)
def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Tell a test's result, in the process that hears of all of them."""
    if "PYTEST_XDIST_WORKER" in os.environ or (report.when != "call" and report.outcome == "passed"):
        return
    name = report.nodeid.split("tests/gpu/")[-1]
    text = ""
    if report.failed:
        crash = getattr(report.longrepr, "reprcrash", None)
        message = crash.message if crash is not None else str(report.longrepr)
        text = " | ".join(line.strip() for line in message.splitlines() if line.strip())[:500]
        if text.startswith("worker '") and name in _told:
            return  # it failed, was told, and took the GPU's context along
        _told.add(name)
    elif report.skipped and isinstance(report.longrepr, tuple):
        text = str(report.longrepr[2])[:150]
    status = {"passed": "ok", "failed": "fail", "skipped": "skip"}[report.outcome]
    emit(name, status, text, seconds=round(report.duration, 1))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[Any]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Remember that a test failed."""
    report = yield
    if report.failed:
        item.stash[_FAILED] = True
    return report


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Begin nothing that the time does not reach."""
    if left() < END_S:
        pytest.skip("no time left")


def pytest_runtest_teardown(item: pytest.Item) -> None:
    """Give memory back, or end the process if the GPU's context is lost."""
    import torch

    if "test_compiled" in item.nodeid:
        torch.compiler.reset()
    try:
        torch.cuda.empty_cache()
        torch.zeros(1, device="cuda").item()
    except RuntimeError:
        if item.stash.get(_FAILED, False):
            os._exit(70)


def main() -> int:
    """Run the part; return the exit code."""
    require_cuda()
    command = [sys.executable, "-m", "pytest", "tests/gpu", "-p", __spec__.name, "-p", "no:cacheprovider"]
    command += ["-q", "--no-header", "-rfE", "--tb=short", f"--junitxml={OUT / 'tests.xml'}"]
    command += ["-o", "addopts=--import-mode=importlib --strict-markers"]
    environment = os.environ | {"TORCHINDUCTOR_COMPILE_THREADS": "4"}
    if REHEARSE:  # what a CPU can do of it, on as many threads as it was given
        command += ["-k", "agree or never_waits and False"]
    else:
        environment["OMP_NUM_THREADS"] = "2"
    if not REHEARSE and importlib.util.find_spec("xdist"):  # which begins a new process where one died
        command += ["-n", "8", "--dist", "load", "--maxschedchunk", "1", "--max-worker-restart", "20"]
    if importlib.util.find_spec("pytest_timeout"):
        command += ["--timeout", str(min(TEST_S, max(round(left() - END_S), 5)))]
    if importlib.util.find_spec("pytest_benchmark"):
        command += ["--benchmark-disable"]
    log = LOGS / "pytest.txt"
    with log.open("w") as file:
        code = subprocess.run(command, env=environment, stdout=file, stderr=subprocess.STDOUT).returncode
    print("\n".join(log.read_text(errors="replace").splitlines()[-3:]))
    return code


if __name__ == "__main__":
    sys.exit(main())
elif REHEARSE:  # as a plugin
    start_cuda()  # before tests/gpu looks for a GPU
