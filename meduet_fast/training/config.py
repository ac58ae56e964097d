"""Settings of a pretraining run."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from meduet_fast.model import MeDUETConfig
from meduet_fast.objectives import ObjectiveConfig


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

    Attributes:
        model: sizes of the network.
        objective: weights and variants of the losses.
        optimizer: AdamW, learning rate and teacher.
        steps: optimiser steps.
        batch_size: crops a device sees at once (even: sample i is mixed with sample B-1-i).
        accumulate: batches a step adds up.
        mftd_start_step: first step with the mixed-factor token distillation.
        held_out_fraction: part of every volume, at the right end of its left-right axis, never trained on
            (0 to 1).
        seed: of weights, crops, augmentation and masks.
        workers: processes that read crops; 0 reads in the main process.
        device: "auto" takes CUDA where there is one.
        log_every: steps between two logged lines.
        checkpoint_every: steps between two checkpoints.
        keep_checkpoints: checkpoints kept; older ones are removed.
    """

    model: MeDUETConfig = field(default_factory=MeDUETConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    steps: int = 200_000
    batch_size: int = 64
    accumulate: int = 1
    mftd_start_step: int = 40_000
    held_out_fraction: float = 0.0
    seed: int = 0
    workers: int = 4
    device: str = "auto"
    log_every: int = 10
    checkpoint_every: int = 1000
    keep_checkpoints: int = 3

    def __post_init__(self) -> None:
        for name in (
            "steps",
            "batch_size",
            "accumulate",
            "log_every",
            "checkpoint_every",
            "keep_checkpoints",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least 1")
        for name in ("mftd_start_step", "workers", "seed"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least 0")
        if self.batch_size % 2:
            raise ValueError(
                f"batch_size is {self.batch_size}, expected an even number: "
                "sample i is mixed with sample B-1-i"
            )
        if not 0 <= self.held_out_fraction < 1:
            raise ValueError(f"held_out_fraction is {self.held_out_fraction}, expected 0 <= fraction < 1")

    def identity(self) -> dict[str, Any]:
        """The settings that decide the result, under dotted names; a resumed run must have the same."""
        free = ("workers", "device", "log_every", "checkpoint_every", "keep_checkpoints")
        flat: dict[str, Any] = {}
        for name, value in asdict(self).items():
            if isinstance(value, dict):
                flat.update({f"{name}.{key}": item for key, item in value.items()})
            elif name not in free:
                flat[name] = value
        return flat
