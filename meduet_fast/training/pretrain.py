"""The pretraining loop; it reads top to bottom."""

from __future__ import annotations

import copy
import hashlib
import json
import signal
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import torch
from torch import Tensor

from meduet_fast.data.augment import augment
from meduet_fast.data.crops import CropConfig, crop_loader
from meduet_fast.data.store import LatentStore
from meduet_fast.devices import select_device
from meduet_fast.errors import UserError
from meduet_fast.files import atomic_path
from meduet_fast.model import MeDUET
from meduet_fast.objectives import pretraining_losses, random_mix_mask
from meduet_fast.progress import progress_bar

from .checkpoint import (
    checkpoint_steps,
    last_good,
    latest_checkpoint,
    load_checkpoint,
    prepare_folder,
    read_run,
    save_checkpoint,
)
from .config import PretrainConfig
from .metrics import RunLog, StepValues, non_finite, send_values
from .optimizer import build_optimizer, learning_rate, teacher_momentum, update_teacher

RUN_FILE = "run.json"
Batches = Iterator[dict[str, Tensor]]


@dataclass(frozen=True)
class PretrainResult:
    """How a run ended.

    Attributes:
        step: steps done.
        finished: whether that is all of them.
        stopped_by: the signal that stopped it, or None.
    """

    step: int
    finished: bool
    stopped_by: signal.Signals | None = None


class StopRequest:
    """Turns SIGINT and SIGTERM into a request to stop after the step; a second one acts at once."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopRequest:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._request)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _request(self, number: int, frame: FrameType | None) -> None:
        self.signal = signal.Signals(number)
        signal.signal(number, self._previous[self.signal])


def _data_identity(store: LatentStore) -> str:
    """Changes whenever the store's latents do."""
    text = json.dumps([(entry.name, entry.domain, entry.content_key) for entry in store.entries])
    return hashlib.sha256(text.encode()).hexdigest()


def _check_store(store: LatentStore, config: PretrainConfig) -> None:
    if store.channels != config.model.in_channels:
        raise UserError(
            f"{store.path}: latents have {store.channels} channels, model.in_channels is "
            f"{config.model.in_channels}"
        )
    if len(store.domains) > config.model.num_domains:
        raise UserError(
            f"{store.path}: {len(store.domains)} domains ({', '.join(store.domains)}), model.num_domains is "
            f"{config.model.num_domains}; raise it"
        )


def _find_start(output: Path, identity: dict[str, Any], data_identity: str, resume: bool) -> Path | None:
    """The checkpoint to go on from, if any.

    Raises:
        UserError: if the folder holds a run and resuming was not asked for, or was made by another setting.
    """
    if not checkpoint_steps(output / "checkpoints"):
        return None
    if not resume:
        raise UserError(
            f"{output}: holds a run already; continue it with --resume, or choose another --output"
        )
    checkpoint = latest_checkpoint(output)
    saved = read_run(checkpoint)
    differing = [key for key in identity if saved["config"].get(key) != identity[key]]
    if differing:
        first = differing[0]
        raise UserError(
            f"{output}: can't resume with other settings: {', '.join(differing)} differ "
            f"({first} was {saved['config'].get(first)}, now {identity[first]})"
        )
    if saved["data"] != data_identity:
        raise UserError(f"{output}: can't resume: the latent store is not the one that the run began with")
    return checkpoint


def train_step(
    student: MeDUET,
    teacher: MeDUET,
    optimizer: torch.optim.Optimizer,
    batches: Batches,
    step: int,
    config: PretrainConfig,
    device: torch.device,
) -> StepValues:
    """One optimiser step, without waiting for the device.

    Returns:
        The step's losses, gradient norm and learning rate, on their way to the host.
    """
    objective = replace(config.objective, mftd=config.objective.mftd and step >= config.mftd_start_step)
    rate = learning_rate(step, config.steps, config.optimizer)
    for group in optimizer.param_groups:
        group["lr"] = rate
    sums: dict[str, Tensor] = {}
    volumes, waited = [], 0.0
    for micro in range(step * config.accumulate, (step + 1) * config.accumulate):
        began = time.perf_counter()
        batch = next(batches)
        waited += time.perf_counter() - began
        # Random numbers depend on the position in the run alone, so that a resumed run draws the same.
        generator = torch.Generator(device).manual_seed((config.seed << 40) + micro)
        latents = augment(batch["latents"].to(device, non_blocking=True), generator).float()
        domain = batch["domain"].to(device, non_blocking=True)
        mask = random_mix_mask(len(latents), config.model.num_tokens, generator, device)
        with torch.autocast("cuda", torch.bfloat16, enabled=device.type == "cuda"):
            losses = pretraining_losses(
                student, teacher, latents, domain, mask, objective, check_values=False
            )
        (losses["total"] / config.accumulate).backward()
        for name, loss in losses.items():
            sums[name] = sums.get(name, 0) + loss.detach() / config.accumulate
        volumes.append(batch["volume"])
    parameters = [parameter for parameter in student.parameters() if parameter.requires_grad]
    sums["grad_norm"] = torch.nn.utils.clip_grad_norm_(parameters, config.optimizer.clip_norm, foreach=True)
    optimizer.step()
    optimizer.zero_grad()
    update_teacher(teacher, student, teacher_momentum(step, config.steps, config.optimizer))
    sums["learning_rate"] = sums["grad_norm"].new_full((), rate)  # new_tensor would wait for the device
    return send_values(step, sums, volumes, waited)


def _checked(pending: StepValues, store: LatentStore, output: Path) -> dict[str, float]:
    """Fetch a step's values and refuse non-finite ones."""
    values = pending.fetch()
    bad = non_finite(values)
    if bad:
        names = sorted({store.entries[int(index)].name for part in pending.volumes for index in part})
        raise UserError(
            f"{output}: stopped at step {pending.step}: {bad[0]} is {values[bad[0]]}"
            + (f" (and {', '.join(bad[1:])})" if bad[1:] else "")
            + f"; volumes in the batch: {', '.join(names)}; {last_good(output / 'checkpoints')}"
        )
    return values


def pretrain(data: Path, output: Path, config: PretrainConfig, resume: bool = False) -> PretrainResult:
    """Pretrain on a latent store.

    SIGINT and SIGTERM write a checkpoint and end the run.

    Args:
        data: a latent store.
        output: the run's folder: ``checkpoints/``, ``metrics.jsonl``, ``tensorboard/``, ``run.json``.
        config: settings.
        resume: go on from the last checkpoint, if there is one; the result is that of a run never stopped.

    Raises:
        UserError: for bad settings, data that do not fit, a non-finite loss, a full disk.
    """
    device = select_device(config.device)
    store = LatentStore.open(data)
    _check_store(store, config)
    folder = output / "checkpoints"
    identity, data_identity = config.identity(), _data_identity(store)
    checkpoint = _find_start(output, identity, data_identity, resume)
    start = read_run(checkpoint)["step"] if checkpoint else 0
    if start >= config.steps:
        return PretrainResult(start, finished=True)

    torch.manual_seed(config.seed)
    student = MeDUET(config.model).to(device)
    student.siqc_log_scale.requires_grad_(config.objective.learn_siqc_scale)
    teacher = copy.deepcopy(student).requires_grad_(False)
    optimizer = build_optimizer(student, config.optimizer)
    if checkpoint:
        load_checkpoint(checkpoint, student, teacher, optimizer)
    crops = CropConfig(
        config.model.latent_size, config.batch_size, config.seed, held_out_fraction=config.held_out_fraction
    )
    loader = crop_loader(
        store,
        crops,
        start_step=start * config.accumulate,
        total_steps=config.steps * config.accumulate,
        workers=config.workers,
        pin_memory=device.type == "cuda",
    )
    prepare_folder(folder)
    with atomic_path(output / RUN_FILE) as temporary:
        temporary.write_text(json.dumps({"data": str(data.resolve()), "config": asdict(config)}, indent=1))

    def report(values: StepValues) -> None:
        text = log.report(values.step, _checked(values, store, output), values.waited)
        bar.update(1, text)

    def save(step: int) -> None:
        settings = {"config": identity, "data": data_identity}
        save_checkpoint(folder, step, student, teacher, optimizer, settings, config.keep_checkpoints)

    done = saved = start
    pending: StepValues | None = None
    batches = iter(loader)
    samples = config.batch_size * config.accumulate
    try:
        with (
            RunLog(output, start, config.log_every, samples, device) as log,
            progress_bar("Pretraining", config.steps, "step", start) as bar,
            StopRequest() as stop,
        ):
            while done < config.steps and stop.signal is None:
                values = train_step(student, teacher, optimizer, batches, done, config, device)
                done += 1
                # The previous step's values have arrived meanwhile: reading them costs no waiting.
                if pending is not None:
                    report(pending)
                pending = values
                if done % config.checkpoint_every == 0:
                    report(pending)  # only a state after finite steps may be kept
                    pending = None
                    save(done)
                    saved = done
            if pending is not None:
                report(pending)
            if done > saved:
                save(done)
    except OSError as error:
        raise UserError(f"{output}: {error.strerror or error}; {last_good(folder)}") from error
    return PretrainResult(done, done == config.steps, stop.signal)
