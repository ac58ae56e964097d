"""Pretraining as a task of the engine: a student, the teacher that follows it, and their losses."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from meduet_fast.data.augment import augment
from meduet_fast.engine.optimizer import update_average
from meduet_fast.engine.task import Batch, Task
from meduet_fast.kernels import random_mix_mask
from meduet_fast.models import MeDUET

from .config import PretrainConfig
from .cost import flops_per_sample
from .erasure import DomainMeans
from .losses import ObjectiveConfig, pretraining_losses


class MeDUETPretraining(Task):
    """Student and teacher under one roof, whose call is the losses of a batch of latents.

    Args:
        config: of the run.
        student: the network to start from; a new one if None. The teacher starts as its copy.
        teacher: what to start from instead.
    """

    title, sample = "Pretraining", "crop"
    tokens: int
    labels = {  # noqa: RUF012  read only
        "total": "loss", "reconstruction": "rec", "domain_content": "dom_c", "domain_style": "dom_s",
        "mftd": "mftd", "siqc": "siqc",
    }  # fmt: skip

    def __init__(
        self, config: PretrainConfig, student: MeDUET | None = None, teacher: MeDUET | None = None
    ) -> None:
        super().__init__()
        self.config, self.adamw, self.tokens = config, config.optimizer, config.model.num_tokens
        self.student = MeDUET(config.model) if student is None else student
        self.student.siqc_log_scale.requires_grad_(config.objective.learn_siqc_scale)
        self.teacher = (copy.deepcopy(self.student) if teacher is None else teacher).requires_grad_(False)
        self.domain_means = None
        if config.objective.content_adversary == "erasure":
            self.domain_means = DomainMeans(config.model.num_domains, config.model.embed_dim)
        if config.objective.lambda_whole:
            self.labels = {**self.labels, "whole": "whole"}
        self._phases = [(start, config.objective_at(start)) for start in sorted({0, *self.phase_starts()})]

    def prepare(self, batch: Batch, generator: torch.Generator) -> Batch:
        """Flip and turn the crops, and draw the mixing mask.

        Args:
            batch: ``latents`` (B, C, S, S, S) of any float dtype, ``domain`` (B,) int64.
            generator: on the device.

        Returns:
            ``latents`` float32, ``domain``, and ``mask`` (B, L) bool.
        """
        latents = augment(batch["latents"], generator).float()  # (B, C, S, S, S)
        mask = random_mix_mask(len(latents), self.tokens, generator, latents.device)  # (B, L)
        return {"latents": latents, "domain": batch["domain"], "mask": mask}

    def forward(self, batch: Batch, step: int) -> dict[str, Tensor]:
        """Compute :func:`~.losses.pretraining_losses`; the mask is right by construction."""
        losses = pretraining_losses(
            self.student, self.teacher, **batch, config=self.phase(step), check_values=False,
            domain_means=self.domain_means,
        )  # fmt: skip
        scale = self.student.siqc_log_scale  # (2,)
        if not self.phase(step).siqc and scale.requires_grad:
            # DDP waits for the gradient of every parameter, and checkpoints hold every parameter's moments.
            losses["total"] = losses["total"] + 0 * scale.sum()
        return losses

    def trained(self) -> MeDUET:
        """Return the student."""
        return self.student

    def blocks(self) -> Sequence[nn.Module]:
        """Return the transformer blocks of both."""
        return [block for model in (self.student, self.teacher) for block in model.transformer_blocks()]

    def phase(self, step: int) -> ObjectiveConfig:
        """Return which losses are on."""
        return next(objective for start, objective in reversed(self._phases) if step >= start)

    def after_step(self, step: int) -> None:
        """Let the teacher follow, and erase the domains from the content of both, if that was asked for."""
        update_average(self.teacher, self.student, self.config.teacher_momentum(step))
        if self.domain_means is not None:
            self.domain_means.step(
                *(model.disentangled_factorizer.proj_c.weight for model in (self.student, self.teacher))
            )

    def exports(self) -> Mapping[str, nn.Module]:
        """Return both networks."""
        return {"student": self.student, "teacher": self.teacher}

    def write_export(self, name: str, state: Mapping[str, Tensor], path: Path) -> None:
        """Write a network for :meth:`MeDUET.from_pretrained`."""
        with torch.device("meta"):
            model = MeDUET(self.config.model)
        model.load_state_dict(state, assign=True)
        model.save_pretrained(path)

    def phase_starts(self) -> Sequence[int]:
        """Return the first steps with MFTD and with SiQC."""
        return self.config.mftd_start_step, self.config.siqc_start_step

    def flops(self, step: int) -> int:
        """Return a sample's FLOPs; see :func:`~.cost.flops_per_sample`."""
        return flops_per_sample(self.config.model, self.phase(step))
