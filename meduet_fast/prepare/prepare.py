"""Prepare volumes: make a latent store of them, or bring it up to date."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import closing
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from meduet_fast.autoencoder import Tokenizer, load_tokenizer
from meduet_fast.data.intensity import IntensityRule
from meduet_fast.data.preview import Preview
from meduet_fast.data.sources import VolumeEntry, find_volumes
from meduet_fast.data.store_writer import StoreWriter, VolumeRecord
from meduet_fast.data.transforms import PreparedVolume, TransformConfig
from meduet_fast.devices import select_device
from meduet_fast.errors import UserError, VolumeError
from meduet_fast.settings import FROM_0, SEED, check_numbers

from .load_ahead import Loader, load_ahead
from .update import Outcomes, PrepareSummary, locate, one_by_one, update_store

MAX_WORKERS = 8  # by default; more wait for one encoder and one disk
BLOCK = 12  # latent voxels, the edge of what a preview decodes: a few percent of what encoding takes
FEW = 4  # volumes, for which starting processes, a quarter of a second each, may not pay


@dataclass(frozen=True)
class PrepareConfig:
    """Say how volumes become latents.

    Attributes:
        transform: grid of the prepared image.
        tokenizer: "builtin", or the path of a ``.safetensors`` of ``train-tokenizer`` or MAISI's
            ``autoencoder.pt``.
        sample: draw latents from the tokenizer's posterior instead of taking its mean.
        seed: seed of that draw, up to 2^64 - 1; every volume has a stream of its own.
        device: where the tokenizer works; "auto" takes CUDA where there is one.
        workers: processes that read and transform volumes ahead of the tokenizer, each with one volume (some
            GB for a large CT) at a time; 0: it is done in this process. By default one for each core, at most
            8, and none for fewer than 4 volumes. The store is the same.
        domain, intensity, body_part: for inputs that do not state them; see ``find_volumes``.

    Raises:
        UserError: if a number is out of its range.
    """

    transform: TransformConfig = field(default_factory=TransformConfig)
    tokenizer: str = "builtin"
    sample: bool = False
    seed: int = 0
    device: str = "auto"
    workers: int | None = None
    domain: str | None = None
    intensity: IntensityRule | None = None
    body_part: str = "unknown"

    def __post_init__(self) -> None:
        check_numbers(self, SEED, "seed")
        check_numbers(self, FROM_0, "workers")


def prepare(input_path: Path, output: Path, config: PrepareConfig) -> PrepareSummary:
    """Make or update the latent store ``output``: the volumes of ``input_path``, and no others.

    Only what is missing or stale is made: a volume counts as unchanged if its file's bytes, its intensity
    rule, the transforms and the tokenizer are the same. A bad volume is recorded and the rest goes on. The
    store can be read at every moment, also after a kill.

    Raises:
        UserError: no usable input, no such tokenizer or device, or the store is in use or cannot be written.
    """
    listing = find_volumes(input_path, config.domain, config.intensity, config.body_part)
    tokenizer = load_tokenizer(config.tokenizer, select_device(config.device))
    summary = prepare_volumes(listing.volumes, output, tokenizer, config)
    summary.left_out = listing.left_out
    return summary


def prepare_volumes(
    entries: Sequence[VolumeEntry], output: Path, tokenizer: Tokenizer, config: PrepareConfig
) -> PrepareSummary:
    """Do what :func:`prepare` does, for volumes and a tokenizer at hand.

    Of the tokenizer ``identity``, ``channels``, ``compression``, ``encode`` and ``decode`` are used: anything
    with these will do.
    """
    if config.transform.multiple % tokenizer.compression:
        raise UserError(
            f"transform.multiple: found {config.transform.multiple}, "
            f"expected a multiple of the tokenizer's compression, {tokenizer.compression}"
        )
    # A mean and draws of different seeds are different latents of one tokenizer.
    identity = f"{tokenizer.identity}+sample{config.seed}" if config.sample else tokenizer.identity
    device = select_device(config.device)

    loader = Loader(config.transform, identity)
    cores = len(os.sched_getaffinity(0))

    @torch.inference_mode()
    def encode(entry: VolumeEntry, key: str, volume: PreparedVolume) -> VolumeRecord:
        generator = None
        if config.sample:
            digest = hashlib.sha256(f"{config.seed} {entry.name}".encode()).digest()
            generator = torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "little"))
        latents = tokenizer.encode(volume.image[None].to(device), config.sample, generator)  # (1, C, x, y, z)
        x, y, z = (max(0, size - BLOCK) // 2 for size in latents.shape[2:])
        block = latents[:, :, x : x + BLOCK, y : y + BLOCK, z : z + BLOCK].bfloat16()  # as stored
        preview = Preview(
            title=f"{entry.name}, domain {entry.domain}",
            image=volume.image[0],
            spacing=volume.spacing,
            intensity=volume.intensity,
            corner=(tokenizer.compression * x, tokenizer.compression * y, tokenizer.compression * z),
            decoded=tokenizer.decode(block)[0, 0],
        )
        looked = {} if entry.intensity else {"intensity_from": "values"}
        channel = {} if entry.channel is None else {"channel": str(entry.channel)}
        series = {} if entry.series is None else {"series": entry.series.label}
        return VolumeRecord(
            name=entry.name,
            domain=entry.domain,
            body_part=entry.body_part,
            content_key=key,
            source=locate(entry.path),
            latent=latents[0],
            affine=volume.affine,
            spacing=volume.spacing,
            intensity=asdict(volume.intensity),
            preview=preview,
            notes={"scan": volume.scan.to_json(), **looked, **channel, **series},
        )

    def content_keys(volumes: Sequence[VolumeEntry]) -> Outcomes[str]:
        if config.workers == 0:
            yield from one_by_one(loader.key)(volumes)
            return
        # Threads will do: hashing and reading let others run.
        with ThreadPoolExecutor(config.workers or min(cores, MAX_WORKERS)) as threads:
            futures = {threads.submit(loader.key, volume): volume for volume in volumes}
            try:
                for future in as_completed(futures):
                    error = future.exception()
                    if error is not None and not isinstance(error, VolumeError):
                        raise error
                    yield futures[future], error or future.result()
            finally:
                threads.shutdown(wait=False, cancel_futures=True)

    def records(volumes: Sequence[VolumeEntry]) -> Outcomes[VolumeRecord]:
        workers = config.workers
        if workers is None:
            workers = 0 if cores == 1 or len(volumes) < FEW else min(cores, MAX_WORKERS)
        loaded = load_ahead(volumes, loader, workers) if workers else one_by_one(loader.load)(volumes)
        with closing(loaded):  # type: ignore[type-var]
            for entry, outcome in loaded:
                if isinstance(outcome, VolumeError):
                    yield entry, outcome
                    continue
                try:
                    yield entry, encode(entry, *outcome)
                except torch.OutOfMemoryError as error:
                    yield entry, VolumeError(entry.path, f"does not fit into the memory of {device}: {error}")

    with StoreWriter(
        output, tokenizer=tokenizer.identity, tokenizer_spec=config.tokenizer,
        channels=tokenizer.channels, compression=tokenizer.compression,
    ) as writer:  # fmt: skip
        return update_store(writer, entries, content_keys, records)
