"""Fixtures for all tests."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest

from meduet_fast.data.samples import fetch_samples

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def sample_data() -> Path:
    """Manifest of the sample data, kept between runs; the first download is the only use of a network."""
    return fetch_samples(Path(os.environ.get("MEDUET_SAMPLE_DATA") or ROOT / "demo" / "sample-data"))


@pytest.fixture
def as_nobody() -> AbstractContextManager[None]:
    """``with as_nobody:`` file permissions count, also for tests run by root, whom they do not bind."""

    @contextmanager
    def switch() -> Iterator[None]:
        if os.geteuid() != 0:
            yield
            return
        os.seteuid(65534)
        try:
            yield
        finally:
            os.seteuid(0)

    return switch()
