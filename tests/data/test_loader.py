from __future__ import annotations

import re
import time

import pytest
import torch

from meduet_fast.data.crops import CropBatches
from meduet_fast.data.loader import crop_loader, lost_reader
from meduet_fast.errors import UserError

from .conftest import THREE_DOMAINS, MakeStore, small


@pytest.mark.parametrize("workers", [0, 2])
def test_the_loader_gives_the_same_batches_whatever_start_and_workers(
    make_store: MakeStore, workers: int
) -> None:
    store, _ = make_store(THREE_DOMAINS)
    whole = small(store)
    for rank in (0, 1):
        loader = crop_loader(
            small(store), rank=rank, world_size=2, start_step=4, total_steps=10, workers=workers
        )
        batches = list(loader)
        assert len(loader) == len(batches) == 3
        for number, batch in zip(range(4 + rank, 10, 2), batches, strict=True):
            assert batch.keys() == whole[number].keys()
            assert all(torch.equal(batch[key], whole[number][key]) for key in batch)


def test_one_core_reads_five_thousand_published_crops_a_second(make_store: MakeStore) -> None:
    store, _ = make_store({f"v{i}": (f"d{i % 3}", (60, 60, 56)) for i in range(6)})
    loader = crop_loader(CropBatches(store, crop_size=24, batch_size=64), total_steps=40)
    seconds = []
    for _ in range(3):
        begin = time.process_time()  # of all threads: other processes on this machine do not count
        crops = sum(len(batch["latents"]) for batch in loader)
        seconds.append(time.process_time() - begin)
    assert crops == 40 * 64
    assert crops / min(seconds) > 5000


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. "),
            "was killed by signal Killed (out",
        ),
        (RuntimeError("Pin memory thread exited unexpectedly"), "ended without a word (out of memory?)"),
        (
            RuntimeError("DataLoader worker (pid(s) 7) exited unexpectedly"),
            "ended without a word (out of memory?)",
        ),
        (
            UserError("checkpoint not written: DataLoader worker (pid 7) is killed by signal: Bus error. It"),
            "Bus error (out",
        ),
    ],
)
def test_a_killed_reader_is_told_from_other_errors(
    make_store: MakeStore, error: Exception, said: str
) -> None:
    store, _ = make_store(THREE_DOMAINS)
    assert said in str(lost_reader(store.path, error))
    assert lost_reader(store.path, RuntimeError("something else")) is None
    assert lost_reader(store.path, BrokenPipeError()) is None
    damaged = store.path / store.entries[0].file
    damaged.write_bytes(damaged.read_bytes()[:-1])
    assert re.search(rf"\({re.escape(str(damaged))}: .*truncated", str(lost_reader(store.path, error)))
