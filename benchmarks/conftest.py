"""``pytest benchmarks``: every variant of every quick case, compared within its case."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from .harness import WRONG, Variant, obstacle, synchronize

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test for each variant, by name: inputs are made when it runs."""
    if "variant" in metafunc.fixturenames:
        chosen = [
            pytest.param((case, name), id=f"{case}, {name}")
            for case in metafunc.module.cases(DEVICE, quick=True)
            for name in case.names
        ]
        metafunc.parametrize("variant", chosen, indirect=True)


@pytest.fixture
def variant(request: pytest.FixtureRequest, benchmark: Any) -> Variant:
    """Checked and warmed up; skipped where it cannot run.

    On a GPU the time includes the wait for the device.
    """
    case, name = request.param
    benchmark.group = f"{case.bench}: {case}"
    found = next(item for item in case.build() if item.name == name)
    reason = obstacle(found, DEVICE)
    assert not reason.startswith(WRONG), reason
    if reason:
        pytest.skip(reason)

    def call() -> None:
        found.call()
        synchronize(DEVICE)

    return replace(found, call=call)
