"""One process's losses and gradients with global negatives: run by path, settings in its globals."""

from __future__ import annotations

import os
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from meduet_fast.models import MeDUET
from meduet_fast.pretraining import ObjectiveConfig, pretraining_losses


def main(rank: int, size: int, folder: Path) -> None:
    torch.set_num_threads(1)
    os.environ.update(GLOO_SOCKET_IFNAME="lo")
    store = dist.FileStore(str(folder / "store"), size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size)
    student, teacher = (
        MeDUET.from_pretrained(folder / f"{name}.safetensors") for name in ("student", "teacher")
    )
    batch = load_file(folder / f"batch{rank}.safetensors")
    losses = pretraining_losses(
        student.double(), teacher.double(), batch["latents"], batch["domain"], batch["mask"],
        ObjectiveConfig(global_negatives=True),
    )  # fmt: skip
    losses["total"].backward()
    found = {name: value.detach() for name, value in losses.items()}
    found.update(
        {f"grad.{name}": item.grad for name, item in student.named_parameters() if item.grad is not None}
    )
    for value in found.values():
        dist.all_reduce(value)
        value /= size
    if rank == 0:
        save_file(found, folder / "found.safetensors")
    dist.destroy_process_group()


main(**globals()["settings"])
