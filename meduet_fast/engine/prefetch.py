"""Copy batches to the GPU while the one before is used."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from .task import VOLUME, Batch


def prefetch(batches: Iterator[Batch], device: torch.device) -> Iterator[Batch]:
    """Yield the same batches on the device; the entry ``volume`` stays on the host.

    The next batch is copied on a stream of its own while the present one is used; its tensors must be
    in page-locked memory for that.
    """
    stream = torch.cuda.Stream(device)
    ahead: tuple[Batch, torch.cuda.Event] | None = None
    for batch in batches:
        with torch.cuda.stream(stream):
            moved = {
                name: item if name == VOLUME else item.to(device, non_blocking=True)
                for name, item in batch.items()
            }
            copied = stream.record_event()
        if ahead is not None:
            yield _arrived(*ahead)
        ahead = (moved, copied)
    if ahead is not None:
        yield _arrived(*ahead)


def _arrived(batch: Batch, copied: torch.cuda.Event) -> Batch:
    """Make a batch fit for use on the current stream."""
    stream = torch.cuda.current_stream()
    stream.wait_event(copied)
    for item in batch.values():
        if item.is_cuda:
            item.record_stream(stream)  # its memory is not the copying stream's to reuse before that
    return batch
