"""Fixtures for all tests."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict
from pathlib import Path

import pytest
from safetensors.torch import save_file

from meduet_fast.data.samples import fetch_samples
from meduet_fast.data.store import LatentStore

ROOT = Path(__file__).resolve().parent.parent

# PyTorch's compiler starts no processes of its own, each of which would import all of PyTorch first.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")


@pytest.fixture(scope="session")
def sample_data() -> Path:
    """Manifest of the sample data, kept between runs; the first download is the only use of a network."""
    return fetch_samples(Path(os.environ.get("MEDUET_SAMPLE_DATA") or ROOT / "demo" / "sample-data"))


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Let torch use one thread: small networks are no faster on more, and other tests use these."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


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


def rewrite_as_version_1(path: Path) -> LatentStore:
    """Put the files of version 1 in the place of a store's."""
    store = LatentStore.open(path)
    for index, entry in enumerate(store.entries):
        labels = {key: value for key, value in store.metadata(index).items() if key != "shape"}
        save_file({"latent": store.read_volume(index)}, path / entry.file, labels)
    head = {"format": "meduet-fast latent store", "version": 1}
    (path / "index.json").write_text(json.dumps({**head, **asdict(store.index)}, indent=1))
    (path / "index.jsonl").unlink()
    return LatentStore.open(path)


@pytest.fixture
def as_version_1() -> Callable[[Path], LatentStore]:
    """Give :func:`rewrite_as_version_1`."""
    return rewrite_as_version_1
