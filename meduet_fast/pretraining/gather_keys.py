"""Gather the contrast's keys of all processes of a run."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


@torch.no_grad()
def gather_keys(keys: Tensor) -> tuple[Tensor, int]:
    """Gather all processes' keys as one set, as :func:`meduet_fast.kernels.quadruplet_contrast` takes them.

    Args:
        keys: (4B, D), this process's four blocks; B is the same in all of them.

    Returns:
        (4 R B, D), four blocks, each with the rows of process 0, then of 1, ..., without gradient; and where
        this process's rows begin in a block. With one process the keys as they are.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return keys, 0
    processes, batch = dist.get_world_size(), keys.shape[0] // 4
    gathered = keys.new_empty(processes * keys.shape[0], keys.shape[1])
    dist.all_gather_into_tensor(gathered, keys.contiguous())
    by_block = gathered.view(processes, 4, batch, -1).transpose(0, 1)
    return by_block.reshape(4 * processes * batch, -1), dist.get_rank() * batch
