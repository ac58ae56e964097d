"""Copies to the GPU that nobody waits for."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

Batch = dict[str, Tensor]
ON_DEVICE = ("latents", "domain")


def prefetch(batches: Iterator[Batch], device: torch.device) -> Iterator[Batch]:
    """The same batches, ``latents`` and ``domain`` on the device.

    On CUDA the next batch is copied on a stream of its own while the present one is used; its tensors must be
    in page-locked memory for that.
    """
    if device.type != "cuda":
        yield from batches
        return
    stream = torch.cuda.Stream(device)
    ahead: tuple[Batch, torch.cuda.Event] | None = None
    for batch in batches:
        with torch.cuda.stream(stream):
            moved = {name: batch[name].to(device, non_blocking=True) for name in ON_DEVICE}
            copied = stream.record_event()
        if ahead is not None:
            yield _arrived(*ahead)
        ahead = ({**batch, **moved}, copied)
    if ahead is not None:
        yield _arrived(*ahead)


def _arrived(batch: Batch, copied: torch.cuda.Event) -> Batch:
    """For use on the current stream."""
    stream = torch.cuda.current_stream()
    stream.wait_event(copied)
    for name in ON_DEVICE:
        batch[name].record_stream(stream)  # its memory is not the copying stream's to reuse before that
    return batch
