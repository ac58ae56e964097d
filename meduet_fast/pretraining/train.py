"""The command ``pretrain``: a latent store into checkpoints of a student and a teacher."""

from __future__ import annotations

import sys
from pathlib import Path

from meduet_fast.data.crops import CropBatches
from meduet_fast.data.held_out import HELD_OUT_VOLUMES, HeldOut
from meduet_fast.data.loader import LoadedCrops
from meduet_fast.data.store import LatentStore
from meduet_fast.engine import Batches, FitResult, fit
from meduet_fast.engine.beginning import find_beginning
from meduet_fast.engine.distributed import launch_number
from meduet_fast.engine.dry_run import format_rows
from meduet_fast.errors import UserError
from meduet_fast.models import MeDUET

from .config import PretrainConfig
from .init_weights import read_initial
from .task import MeDUETPretraining


class LatentCrops(LoadedCrops, Batches):
    """Random crops of a store: ``latents`` (B, C, S, S, S) bfloat16, ``domain`` and ``volume`` (B,) int64.

    Attributes:
        held_out: what is never trained on.

    Raises:
        UserError: naming the store and the setting that does not fit; see :class:`CropBatches` too.
    """

    def __init__(self, store: LatentStore, config: PretrainConfig) -> None:
        if store.index.channels != config.model.in_channels:
            raise UserError(
                f"{store.path}: latents have {store.index.channels} channels, model.in_channels is "
                f"{config.model.in_channels}"
            )
        if len(store.domains) > config.model.num_domains:
            raise UserError(
                f"{store.path}: {len(store.domains)} domains ({', '.join(store.domains)}), "
                f"model.num_domains is {config.model.num_domains}; raise it"
            )
        self.identity = store.identity()
        self.held_out = HeldOut.choose(store, config.held_out, config.held_out_fraction, config.seed)
        if config.held_out == "volumes":
            self.record = {HELD_OUT_VOLUMES: self.held_out.names()}
        batches = CropBatches(store, config.model.latent_size, config.batch_size, config.seed, self.held_out)
        super().__init__(batches, config.workers, config.timeout_s)


def pretrain(
    data: Path, output: Path, config: PretrainConfig, resume: bool = False, init: Path | None = None
) -> FitResult:
    """Pretrain on a latent store; see :func:`meduet_fast.engine.fit`.

    Args:
        data: a latent store.
        output: the run's folder.
        config: settings.
        resume: go on from the last checkpoint, if there is one.
        init: weights to begin from, see :func:`~.init_weights.read_initial`; random ones if None. A resumed
            run must have begun from the same, or be given none.

    Raises:
        UserError: for bad settings, data or initial weights that do not fit, latents that can't be read, a
            non-finite loss, a full disk, a lost process, a killed reader.
    """

    def make() -> tuple[MeDUETPretraining, LatentCrops]:
        store = LatentStore.open(data)
        crops = LatentCrops(store, config)
        student = MeDUET(config.model)
        beginning = find_beginning(init, lambda path: read_initial(path, student).beginning(), output, resume)
        student.load_state_dict(beginning.tensors, strict=False)
        if launch_number("RANK", 0) == 0:
            doubts = crops.held_out.doubts(config.model.latent_size)
            for doubt in (*config.doubts(len(store.domains)), *doubts):
                print(f"warning: {doubt}", file=sys.stderr)
            if beginning.rows:
                print(format_rows(beginning.rows), file=sys.stderr)
        task = MeDUETPretraining(config, student)
        task.init = beginning.record
        return task, crops

    return fit(make, config, output, resume)
