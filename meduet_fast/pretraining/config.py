"""Settings of a pretraining run."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

from meduet_fast.data.held_out import HeldOutKind
from meduet_fast.engine.config import AdamWConfig, EngineConfig
from meduet_fast.engine.optimizer import cosine
from meduet_fast.models import MeDUETConfig
from meduet_fast.settings import FROM_0, SHARE, Range, check_numbers

from .losses import ObjectiveConfig

MOST_OF_START = 0.5  # of what it began with may be left in a teacher that is of use
SAMPLED_STEPS = 10_000  # that tell the momenta of a longer run


@dataclass(frozen=True)
class OptimizerConfig(AdamWConfig):
    """AdamW, learning rate and teacher; the defaults are the published ones at 40 steps an epoch.

    Attributes:
        teacher_momentum: the teacher's momentum at step 0.
        final_teacher_momentum: the teacher's momentum at the last step; a cosine between.
    """

    teacher_momentum: float = 0.997
    final_teacher_momentum: float = 0.9997

    def __post_init__(self) -> None:
        super().__post_init__()
        check_numbers(self, SHARE, "teacher_momentum")
        check_numbers(self, Range(0, 1), "final_teacher_momentum")


@dataclass(frozen=True)
class PretrainConfig(EngineConfig):
    """A pretraining run; the defaults are the published setting on one device.

    Attributes:
        model: sizes of the network.
        objective: weights and variants of the losses.
        optimizer: AdamW, learning rate and teacher.
        mftd_start_step: first step with the mixed-factor token distillation.
        siqc_start_step: first step with the quadruplet contrast; steps before it cost less than half.
        held_out: what is never trained on: "slab" is the right end of every volume's left-right axis;
            "volumes" are whole volumes of every domain that has two, chosen by name and seed, those that show
            one anatomy together.
        held_out_fraction: that part of the axis, or of a domain's volumes, at least one (0 to 1).
    """

    model: MeDUETConfig = field(default_factory=MeDUETConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    mftd_start_step: int = 40_000
    siqc_start_step: int = 0
    held_out: HeldOutKind = "slab"
    held_out_fraction: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_numbers(self, FROM_0, "mftd_start_step", "siqc_start_step")
        check_numbers(self, SHARE, "held_out_fraction")
        if self.held_out == "volumes" and not self.held_out_fraction:
            raise ValueError("held_out is 'volumes', expected held_out_fraction above 0, found 0")
        if self.batch_size % 2:
            raise ValueError(
                f"batch_size is {self.batch_size}, expected an even number: "
                "sample i is mixed with sample B-1-i"
            )
        if self.cuda_graph and self.objective.content_adversary == "erasure":
            raise ValueError(
                "cuda_graph is on, expected objective.content_adversary 'reversal': erasure is no part of it"
            )

    def teacher_momentum(self, step: int) -> float:
        """Return the teacher's momentum in a step: half a cosine over the run."""
        first, last = self.optimizer.teacher_momentum, self.optimizer.final_teacher_momentum
        return cosine(first, last, step / max(self.steps - 1, 1))

    def doubts(self, domains: int | None) -> list[str]:
        """Return :func:`doubts` of this run on a store of so many domains."""
        momenta = self.optimizer.teacher_momentum, self.optimizer.final_teacher_momentum
        return doubts(self.steps, *momenta, domains)

    def objective_at(self, step: int) -> ObjectiveConfig:
        """Return the losses of a step: MFTD and SiQC are off before their first one."""
        return replace(
            self.objective,
            mftd=self.objective.mftd and step >= self.mftd_start_step,
            siqc=self.objective.siqc and step >= self.siqc_start_step,
        )

    def identity(self, processes: int = 1) -> dict[str, Any]:
        """Return the settings that decide the result; see :meth:`EngineConfig.identity`.

        A contrast that sees all processes together depends on their number.
        """
        seen = {"processes": processes} if self.objective.global_negatives else {}
        return super().identity(processes) | seen


def doubts(
    steps: int,
    teacher_momentum: float,
    final_teacher_momentum: float,
    domains: int | None,
    done: int | None = None,
) -> list[str]:
    """Say what of a run is allowed and hardly meant, a line each.

    Args:
        steps, teacher_momentum, final_teacher_momentum: of its settings.
        domains: of its store; None if there is none yet.
        done: steps that a checkpoint has behind it; all of them if None.
    """
    found = []
    if domains == 1:
        found.append(
            "the store has one domain: there is nothing to tell apart, and style is not separated from "
            "content; make data sets that were acquired differently domains of their own"
        )
    done = steps if done is None else done
    kept = kept_of_start(steps, teacher_momentum, final_teacher_momentum, done)
    if kept > MOST_OF_START:
        found.append(
            f"the teacher keeps {100 * kept:.0f} % of what it began with over the {done} steps "
            f"(without --init, random weights): lower optimizer.teacher_momentum ({teacher_momentum}) and "
            f"optimizer.final_teacher_momentum ({final_teacher_momentum}), or train longer"
        )
    return found


def kept_of_start(
    steps: int, teacher_momentum: float, final_teacher_momentum: float, done: int | None = None
) -> float:
    """Compute the share of its first weights that a teacher still has, 0 to 1; see :func:`doubts`."""
    done = steps if done is None else done
    sampled = min(done, SAMPLED_STEPS)
    # Where in the run the sampled steps are: its last one has the final momentum.
    shares = (
        sample / max(sampled - 1, 1) * max(done - 1, 1) / max(steps - 1, 1) for sample in range(sampled)
    )
    product = math.prod(cosine(teacher_momentum, final_teacher_momentum, share) for share in shares)
    return float(product ** (done / max(sampled, 1)))
