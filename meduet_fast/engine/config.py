"""Settings that every kind of training has."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from meduet_fast.layers.attention import AttentionBackend
from meduet_fast.settings import FROM_0, FROM_1, POSITIVE, SEED, SHARE, Range, SettingError, check_numbers

from .loggers import logger_names
from .precision import Precision

MOST_BATCHES = 2**40  # of one seed, see engine.step.batch_generator
LONGEST_TIMEOUT_S = 10_000_000  # what the processes' own clocks can count is not much more

BATCHES_OF_A_STEP = "accumulate x processes"

# Settings that change how fast or where a run is, and not its result.
_FREE = (
    "accumulate", "workers", "device", "attention", "parallel", "shard_size", "recompute", "compile",
    "cuda_graph", "timeout_s", "grace_s", "log_every", "checkpoint_every", "keep_checkpoints",
    "async_checkpoints", "loggers",
)  # fmt: skip


@dataclass(frozen=True)
class AdamWConfig:
    """AdamW and its learning rate: a linear warm-up, then a cosine.

    Attributes:
        learning_rate: peak learning rate.
        initial_learning_rate: learning rate at step 0.
        final_learning_rate: learning rate at the last step.
        warmup_steps: steps of linear warm-up; a cosine follows.
        beta1: decay of AdamW's first moment.
        beta2: decay of AdamW's second moment.
        weight_decay: decoupled weight decay, not on biases and norms.
        clip_norm: largest norm of the gradient; null does not clip.
    """

    learning_rate: float = 1e-4
    initial_learning_rate: float = 1e-6
    final_learning_rate: float = 2e-5
    warmup_steps: int = 2000
    beta1: float = 0.9
    beta2: float = 0.95
    weight_decay: float = 0.01
    clip_norm: float | None = 1.0

    def __post_init__(self) -> None:
        check_numbers(self, POSITIVE, "learning_rate", "clip_norm")
        check_numbers(
            self, FROM_0, "initial_learning_rate", "final_learning_rate", "warmup_steps", "weight_decay"
        )
        check_numbers(self, SHARE, "beta1", "beta2")


@dataclass(frozen=True)
class EngineConfig:
    """A run of any task; a command's own configuration adds its part.

    With several processes, one for each GPU, all that is said of a device holds for each of them.

    Attributes:
        steps: optimiser steps.
        batch_size: samples a device sees at once.
        accumulate: batches a step adds up in each process; the step's batch is batch_size x accumulate x
            processes.
        seed: of weights, data order, augmentation and noise; up to 2^64 - 1.
        workers: processes that read data; 0 reads in the main process.
        device: "auto" takes CUDA where there is one.
        precision: of matrix products; weights stay float32. "auto" is "bfloat16" (autocast) on CUDA and
            "float32" elsewhere; "float8" is bfloat16 with float8 products in the transformer blocks (extra
            float8: torchao), for GPUs of compute capability 8.9 or more, and emulated on the CPU.
        attention: who computes it: "sdpa" is PyTorch's own choice; "flash2", "flash4" and "xformers" are
            optional extras for CUDA.
        parallel: how several processes share the work: "ddp" keeps all weights in each; "fsdp" gives each a
            shard; "hsdp" shards over groups of shard_size processes and keeps one copy in each group.
        shard_size: processes that share one copy in "hsdp"; 0 takes those of one machine.
        recompute: compute trained blocks again in backward, for a third more work and much less memory.
        compile: compile the transformer blocks, which takes a minute at the start.
        cuda_graph: launch losses and gradients as one CUDA graph; for one GPU, without torchrun.
        timeout_s: seconds to wait for another process, or for a batch, before the run is given up.
        grace_s: seconds that a step, or a checkpoint, may take after SIGTERM or SIGINT before the process is
            ended in the middle of it; less than whoever sends the signal waits before it kills.
        log_every: steps between two logged lines.
        checkpoint_every: steps between two checkpoints.
        keep_checkpoints: checkpoints kept; older ones are removed.
        async_checkpoints: write checkpoints while training goes on, from a copy in host memory.
        loggers: where figures go beside metrics.jsonl: "tensorboard", "wandb" and "mlflow" (optional extras),
            with commas between.
    """

    steps: int = 200_000
    batch_size: int = 64
    accumulate: int = 1
    seed: int = 0
    workers: int = 4
    device: str = "auto"
    precision: Precision = "auto"
    attention: AttentionBackend = "sdpa"
    parallel: Literal["ddp", "fsdp", "hsdp"] = "ddp"
    shard_size: int = 0
    recompute: bool = False
    compile: bool = False
    cuda_graph: bool = False
    timeout_s: int = 600
    grace_s: int = 25
    log_every: int = 10
    checkpoint_every: int = 1000
    keep_checkpoints: int = 3
    async_checkpoints: bool = False
    loggers: str = "tensorboard"

    def __post_init__(self) -> None:
        check_numbers(
            self, FROM_1, "steps", "batch_size", "accumulate", "grace_s", "log_every", "checkpoint_every",
            "keep_checkpoints",
        )  # fmt: skip
        check_numbers(self, FROM_0, "workers", "shard_size")
        check_numbers(self, SEED, "seed")
        check_numbers(self, Range(1, LONGEST_TIMEOUT_S), "timeout_s")
        try:
            logger_names(self.loggers)
        except ValueError as error:
            raise SettingError("loggers", str(error)) from error
        if self.steps * self.accumulate > MOST_BATCHES:
            raise SettingError(
                "steps", f"found {self.steps} of {self.accumulate} batches, expected {MOST_BATCHES} in all"
            )

    def flat(self) -> dict[str, Any]:
        """Return all settings under dotted names."""
        flat: dict[str, Any] = {}
        for name, value in asdict(self).items():
            flat |= (
                {f"{name}.{key}": item for key, item in value.items()}
                if isinstance(value, dict)
                else {name: value}
            )
        return flat

    def identity(self, processes: int = 1) -> dict[str, Any]:
        """Return the settings that decide the result, under dotted names.

        A resumed run must have the same, but for ``steps``.

        Args:
            processes: of the run. Their number is free as long as a step has the same batches.
        """
        flat = {name: value for name, value in self.flat().items() if name not in _FREE}
        return flat | {BATCHES_OF_A_STEP: self.accumulate * processes}
