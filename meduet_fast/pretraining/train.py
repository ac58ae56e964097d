"""The pretraining loop; it reads top to bottom."""

from __future__ import annotations

import copy
import json
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from meduet_fast.data.augment import augment
from meduet_fast.data.crops import CropConfig
from meduet_fast.data.loader import CropLoader, crop_loader, lost_reader
from meduet_fast.data.store import LatentStore
from meduet_fast.engine.checkpoint import (
    CheckpointWriter,
    Trained,
    last_good,
    load_checkpoint,
    prepare_folder,
    read_run,
)
from meduet_fast.engine.cuda_graph import GraphedGradients
from meduet_fast.engine.distributed import World, join_world
from meduet_fast.engine.metrics import RunLog, StepValues, non_finite, send_values
from meduet_fast.engine.optimizer import build_optimizer, learning_rate, teacher_momentum
from meduet_fast.engine.parallel import parallelize, plain_step, without_reduction
from meduet_fast.engine.prefetch import prefetch
from meduet_fast.engine.resume import check_store, data_identity, find_start
from meduet_fast.engine.stop import Agreement, StopRequest
from meduet_fast.errors import UserError
from meduet_fast.files import atomic_path
from meduet_fast.layers import set_attention_backend
from meduet_fast.models import MeDUET
from meduet_fast.progress import progress_bar

from .config import PretrainConfig
from .erasure import DomainMeans
from .losses import ObjectiveConfig, random_mix_mask
from .task import PretrainStep, add_gradients, update

RUN_FILE = "run.json"
Batches = Iterator[dict[str, Tensor]]
Gradients = Callable[[Tensor, Tensor, Tensor, ObjectiveConfig], dict[str, Tensor]]


@dataclass(frozen=True)
class PretrainResult:
    """How a run ended.

    Attributes:
        step: steps done.
        finished: whether that is all of them.
        stopped_by: the signal that stopped it, or None.
        rank: which of the run's processes says so.
    """

    step: int
    finished: bool
    stopped_by: signal.Signals | None = None
    rank: int = 0


def gradients_of(model: nn.Module, config: PretrainConfig, world: World) -> Gradients:
    """What adds a batch's gradients and gives its losses.

    Args:
        model: a :class:`PretrainStep`, as :func:`parallelize` left it.

    Raises:
        UserError: for a CUDA graph where there can't be one.
    """
    share = 1 / config.accumulate
    if not config.cuda_graph:
        return partial(add_gradients, model, share=share, precision=config.precision)
    if world.grouped or world.device.type != "cuda":
        raise UserError(
            "cuda_graph is for one GPU, without torchrun: "
            f"found device {world.device}, {world.size} process{'es' * (world.size > 1)}"
        )
    return GraphedGradients(plain_step(model), share, config.precision)


def train_step(
    model: nn.Module,
    gradients: Gradients,
    optimizer: torch.optim.Optimizer,
    batches: Batches,
    step: int,
    config: PretrainConfig,
    device: torch.device,
) -> StepValues:
    """One optimiser step, without waiting for the device.

    Args:
        model: a :class:`PretrainStep`, as :func:`parallelize` left it.
        gradients: of it, see :func:`gradients_of`.
        optimizer: of its student.
        batches: this process's share of the stream, at the step's place.

    Returns:
        The step's losses in this process, gradient norm and learning rate, on their way to the host.
    """
    inner = plain_step(model)
    objective = config.objective_at(step)
    rate = learning_rate(step, config.steps, config.optimizer)
    for group in optimizer.param_groups:
        group["lr"] = rate
    rank, processes = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    sums: dict[str, Tensor] = {}
    volumes, waited = [], 0.0
    for turn in range(config.accumulate):
        began = time.perf_counter()
        batch = next(batches)
        waited += time.perf_counter() - began
        # Random numbers depend on the batch's number in the stream alone: the same for a resumed run, and
        # for any number of processes.
        number = (step * config.accumulate + turn) * processes + rank
        generator = torch.Generator(device).manual_seed((config.seed << 40) + number)
        latents = augment(batch["latents"].to(device, non_blocking=True), generator).float()
        domain = batch["domain"].to(device, non_blocking=True)
        mask = random_mix_mask(len(latents), config.model.num_tokens, generator, device)
        last = turn + 1 == config.accumulate
        with nullcontext() if last else without_reduction(model):
            losses = gradients(latents, domain, mask, objective)
        for name, loss in losses.items():
            sums[name] = sums.get(name, 0) + loss / config.accumulate
        volumes.append(batch["volume"])
    momentum = teacher_momentum(step, config.steps, config.optimizer)
    sums["grad_norm"] = update(
        inner.student, inner.teacher, optimizer, config.optimizer.clip_norm, momentum, inner.domain_means,
        keep_gradients=config.cuda_graph,
    )  # fmt: skip
    sums["learning_rate"] = sums["grad_norm"].new_full((), rate)  # new_tensor would wait for the device
    return send_values(step, sums, volumes, waited)


def _checked(pending: StepValues, store: LatentStore, output: Path) -> dict[str, float]:
    """Fetch a step's values and refuse non-finite ones."""
    values = pending.fetch()
    bad = non_finite(values)
    if bad == ["grad_norm"] and dist.is_initialized():
        raise UserError(
            f"{output}: stopped at step {pending.step}: grad_norm is {values['grad_norm']}, though this "
            "process's losses are finite; see what the others say"
        )
    if bad:
        names = sorted({store.entries[int(index)].name for part in pending.volumes for index in part})
        raise UserError(
            f"{output}: stopped at step {pending.step}: {bad[0]} is {values[bad[0]]}"
            + (f" (and {', '.join(bad[1:])})" if bad[1:] else "")
            + f"; volumes in the batch: {', '.join(names)}; {last_good(output / 'checkpoints')}"
        )
    return values


def _domain_means(config: PretrainConfig, world: World) -> DomainMeans | None:
    """What erasure keeps, if it was asked for."""
    if config.objective.content_adversary != "erasure":
        return None
    return DomainMeans(config.model.num_domains, config.model.embed_dim).to(world.device)


def _loader(store: LatentStore, config: PretrainConfig, start: int, world: World) -> CropLoader:
    """This process's share of the batches from a step on."""
    crops = CropConfig(
        config.model.latent_size, config.batch_size, config.seed, held_out_fraction=config.held_out_fraction
    )
    per_step = config.accumulate * world.size
    return crop_loader(
        store,
        crops,
        rank=world.rank,
        world_size=world.size,
        start_step=start * per_step,
        total_steps=config.steps * per_step,
        workers=config.workers,
        pin_memory=world.device.type == "cuda",
    )


def pretrain(data: Path, output: Path, config: PretrainConfig, resume: bool = False) -> PretrainResult:
    """Pretrain on a latent store.

    SIGINT and SIGTERM write a checkpoint and end the run. All processes that torchrun started call this, with
    the same folders ``data`` and ``output``.

    Args:
        data: a latent store.
        output: the run's folder: ``checkpoints/``, ``metrics.jsonl`` (of rank 0; the others have
            ``metrics.rankN.jsonl``), ``tensorboard/``, ``run.json``.
        config: settings.
        resume: go on from the last checkpoint, if there is one; the result is that of a run never stopped, on
            another number of processes to rounding.

    Raises:
        UserError: for bad settings, data that do not fit, latents that can't be read, a non-finite loss, a
            full disk, a lost process, a killed reader.
    """
    # The request first: a launcher that ends this process while it finds out what happened must not win.
    with StopRequest() as stop, join_world(config.device, config.timeout_s) as world:
        try:
            return _pretrain(data, output, config, resume, world, stop)
        except Exception as error:
            stop.ignore_children()
            what = lost_reader(data, error)
            if what is None and isinstance(error, OSError):
                what = error.strerror or str(error)
            if what is None:
                raise
            raise UserError(f"{output}: {what}; {last_good(output / 'checkpoints')}") from error


def _pretrain(
    data: Path, output: Path, config: PretrainConfig, resume: bool, world: World, stop: StopRequest
) -> PretrainResult:
    set_attention_backend(config.attention, world.device)
    store = LatentStore.open(data)
    check_store(store, config)
    folder = output / "checkpoints"
    identity, data_id = config.identity(world.size), data_identity(store)
    checkpoint = find_start(output, identity, data_id, resume)
    start = read_run(checkpoint)["step"] if checkpoint else 0
    world.barrier()  # all have looked before anything is written
    if start >= config.steps:
        return PretrainResult(start, finished=True, rank=world.rank)

    torch.manual_seed(config.seed)
    student = MeDUET(config.model).to(world.device)
    student.siqc_log_scale.requires_grad_(config.objective.learn_siqc_scale)
    teacher = copy.deepcopy(student).requires_grad_(False)
    means = _domain_means(config, world)
    model = parallelize(PretrainStep(student, teacher, means), config, world)
    gradients = gradients_of(model, config, world)
    optimizer = build_optimizer(student, config.optimizer)
    trained = Trained(student, teacher, optimizer, means)
    if checkpoint:
        load_checkpoint(checkpoint, trained, world)
    batches = prefetch(iter(_loader(store, config, start, world)), world.device)
    if world.rank == 0:
        prepare_folder(folder)
        with atomic_path(output / RUN_FILE) as temporary:
            temporary.write_text(
                json.dumps({"data": str(data.resolve()), "config": asdict(config)}, indent=1)
            )
    world.barrier()

    done = saved = start
    pending: StepValues | None = None
    stopped: signal.Signals | None = None
    agreement = Agreement(world)
    with ExitStack() as stack:
        log = stack.enter_context(RunLog(output, start, config, world))
        bar = stack.enter_context(progress_bar("Pretraining", config.steps, "step", start, world.rank == 0))
        settings = {"config": identity, "data": data_id}
        writer = CheckpointWriter(folder, settings, config.keep_checkpoints, world, config.async_checkpoints)

        def report(values: StepValues) -> None:
            checked = _checked(values, store, output)
            bar.update(1, log.report(values.step, checked, values.waited, values.done_at))

        while done < config.steps and stopped is None:
            values = train_step(model, gradients, optimizer, batches, done, config, world.device)
            done += 1
            # The previous step's values have arrived meanwhile: reading them costs no waiting.
            if pending is not None:
                report(pending)
            pending = values
            if done % config.checkpoint_every == 0:
                report(pending)  # only a state after finite steps may be kept
                pending = None
                writer.save(done, trained)
                saved = done
            world.look_at_store()
            stopped, look = agreement.exchange(stop.signal, writer.failed())
            if look:
                writer.finish()
        agreement.settle()
        if pending is not None:
            report(pending)
        if done > saved:
            writer.save(done, trained)
        writer.finish()
    return PretrainResult(done, done == config.steps, stopped, world.rank)
