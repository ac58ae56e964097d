"""Settings of a pretraining run."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from meduet_fast.engine.precision import Precision
from meduet_fast.layers.attention import AttentionBackend
from meduet_fast.models import MeDUETConfig

from .losses import ObjectiveConfig

# Settings that change how fast or where a run is, and not its result.
_FREE = (
    "accumulate", "workers", "device", "attention", "parallel", "shard_size", "recompute", "compile",
    "cuda_graph", "timeout_s", "log_every", "checkpoint_every", "keep_checkpoints", "async_checkpoints",
)  # fmt: skip


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW, learning rate and teacher; the defaults are the published ones at 40 steps an epoch.

    Attributes:
        learning_rate: peak learning rate.
        initial_learning_rate: learning rate at step 0.
        final_learning_rate: learning rate at the last step.
        warmup_steps: steps of linear warm-up; a cosine follows.
        beta1: decay of AdamW's first moment.
        beta2: decay of AdamW's second moment.
        weight_decay: decoupled weight decay, not on biases and norms.
        clip_norm: largest norm of the gradient.
        teacher_momentum: the teacher's momentum at step 0.
        final_teacher_momentum: the teacher's momentum at the last step; a cosine between.
    """

    learning_rate: float = 1e-4
    initial_learning_rate: float = 1e-6
    final_learning_rate: float = 2e-5
    warmup_steps: int = 2000
    beta1: float = 0.9
    beta2: float = 0.95
    weight_decay: float = 0.01
    clip_norm: float = 1.0
    teacher_momentum: float = 0.997
    final_teacher_momentum: float = 0.9997


@dataclass(frozen=True)
class PretrainConfig:
    """A pretraining run; the defaults are the published setting on one device.

    With several processes, one for each GPU, all that is said of a device holds for each of them.

    Attributes:
        model: sizes of the network.
        objective: weights and variants of the losses.
        optimizer: AdamW, learning rate and teacher.
        steps: optimiser steps.
        batch_size: crops a device sees at once (even: sample i is mixed with sample B-1-i).
        accumulate: batches a step adds up in each process; the step's batch is batch_size x accumulate x
            processes.
        mftd_start_step: first step with the mixed-factor token distillation.
        siqc_start_step: first step with the quadruplet contrast; steps before it cost less than half.
        held_out_fraction: part of every volume, at the right end of its left-right axis, never trained on
            (0 to 1).
        seed: of weights, crops, augmentation and masks.
        workers: processes that read crops; 0 reads in the main process.
        device: "auto" takes CUDA where there is one.
        precision: of matrix products; weights stay float32. "auto" is "bfloat16" (autocast) on CUDA and
            "float32" elsewhere; "float8" is bfloat16 with float8 products in the transformer blocks (extra
            float8: torchao), for GPUs of compute capability 8.9 or more, and emulated on the CPU.
        attention: who computes it: "sdpa" is PyTorch's own choice; "flash2", "flash4" and "xformers" are
            optional extras for CUDA.
        parallel: how several processes share the work: "ddp" keeps all weights in each; "fsdp" gives each a
            shard; "hsdp" shards over groups of shard_size processes and keeps one copy in each group.
        shard_size: processes that share one copy in "hsdp"; 0 takes those of one machine.
        recompute: compute the student's blocks again in backward, for a third more work and much less memory.
        compile: compile the transformer blocks, which takes a minute at the start.
        cuda_graph: launch losses and gradients as one CUDA graph; for one GPU, without torchrun.
        timeout_s: seconds to wait for another process before the run is given up.
        log_every: steps between two logged lines.
        checkpoint_every: steps between two checkpoints.
        keep_checkpoints: checkpoints kept; older ones are removed.
        async_checkpoints: write checkpoints while training goes on, from a copy in host memory.
    """

    model: MeDUETConfig = field(default_factory=MeDUETConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    steps: int = 200_000
    batch_size: int = 64
    accumulate: int = 1
    mftd_start_step: int = 40_000
    siqc_start_step: int = 0
    held_out_fraction: float = 0.0
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
    log_every: int = 10
    checkpoint_every: int = 1000
    keep_checkpoints: int = 3
    async_checkpoints: bool = False

    def __post_init__(self) -> None:
        for name in (
            "steps",
            "batch_size",
            "accumulate",
            "timeout_s",
            "log_every",
            "checkpoint_every",
            "keep_checkpoints",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least 1")
        for name in ("mftd_start_step", "siqc_start_step", "workers", "seed", "shard_size"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least 0")
        if self.batch_size % 2:
            raise ValueError(
                f"batch_size is {self.batch_size}, expected an even number: "
                "sample i is mixed with sample B-1-i"
            )
        if self.cuda_graph and self.objective.content_adversary == "erasure":
            raise ValueError(
                "cuda_graph is on, expected objective.content_adversary 'reversal': erasure is no part of it"
            )
        if not 0 <= self.held_out_fraction < 1:
            raise ValueError(f"held_out_fraction is {self.held_out_fraction}, expected 0 <= fraction < 1")

    def objective_at(self, step: int) -> ObjectiveConfig:
        """The losses of a step: MFTD and SiQC are off before their first one."""
        return replace(
            self.objective,
            mftd=self.objective.mftd and step >= self.mftd_start_step,
            siqc=self.objective.siqc and step >= self.siqc_start_step,
        )

    def identity(self, processes: int = 1) -> dict[str, Any]:
        """The settings that decide the result, under dotted names; a resumed run must have the same.

        Args:
            processes: of the run. Their number is free as long as a step has the same batches, and as the
                contrast does not see them together.
        """
        flat: dict[str, Any] = {}
        for name, value in asdict(self).items():
            if isinstance(value, dict):
                flat.update({f"{name}.{key}": item for key, item in value.items()})
            elif name not in _FREE:
                flat[name] = value
        flat["accumulate x processes"] = self.accumulate * processes
        if self.objective.global_negatives:
            flat["processes"] = processes
        return flat
