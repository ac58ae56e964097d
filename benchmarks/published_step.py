"""The pretraining step as published, re-implemented from its description: what ours is held to.

Source: MeDUET sections "Network" to "Optimisation", with the work of section 6 done as published: every pass
on its own, sources compacted by ``masked_select``, straight and exchanged styles decoded one after the other
and decoded again for the distillation, predicted volumes put together and cut into patches again, the
teacher's pass on the flipped batch, its average in a Python loop, a loss fetched in every step.

Weights are held by :class:`meduet_fast.models.MeDUET`, whose names are the published ones; of its code only
the transformer blocks are used.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property

import torch
from torch import Tensor

from meduet_fast.engine.optimizer import build_optimizer
from meduet_fast.kernels.verify import FACTOR
from meduet_fast.models import MeDUET
from meduet_fast.pretraining import ObjectiveConfig
from meduet_fast.pretraining.config import OptimizerConfig
from meduet_fast.pretraining.reference import reference_losses

TOLERANCE = 1e-4  # of losses and gradients in float32, relative; the same as on the published tensors
Losses = Callable[..., dict[str, Tensor]]


def published_losses(
    student: MeDUET,
    teacher: MeDUET,
    latents: Tensor,
    domain: Tensor,
    mask: Tensor,
    config: ObjectiveConfig,
) -> dict[str, Tensor]:
    """Compute the plain method's losses with the published pairing, whatever the configuration says."""
    return reference_losses(student, teacher, latents, domain, mask, replace(config, pairing="reference"))


class PublishedStep:
    """Loss, backward, clipping, AdamW and the teacher's average, as published.

    Args:
        student: trained in place; the contrast's scales are not, as published.
        teacher: follows it.
        config: of the optimiser; learning rate and momentum stay as they are at the peak and at the start.
        amp: float16 goes with a gradient scaler as published, bfloat16 without; None computes in float32.
        losses: :func:`published_losses`, or that compiled.
    """

    def __init__(
        self,
        student: MeDUET,
        teacher: MeDUET,
        config: OptimizerConfig,
        amp: torch.dtype | None,
        losses: Losses = published_losses,
    ) -> None:
        self.student, self.teacher, self.config, self.amp, self.losses = student, teacher, config, amp, losses
        self.device = student.cls_token.device
        # The groups are ours, but for the contrast's scales; not the fused form, as published.
        groups = [
            {
                "params": [item for item in group["params"] if item is not student.siqc_log_scale],
                "weight_decay": group["weight_decay"],
            }
            for group in build_optimizer(student, config).param_groups
        ]
        self.trained = [item for group in groups for item in group["params"]]
        self.optimizer = torch.optim.AdamW(
            groups, lr=config.learning_rate, betas=(config.beta1, config.beta2)
        )
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=amp is torch.float16)

    def __call__(self, latents: Tensor, domain: Tensor, mask: Tensor, objective: ObjectiveConfig) -> float:
        """One step, which waits for the device; the total loss."""
        with torch.autocast(self.device.type, self.amp or torch.bfloat16, enabled=self.amp is not None):
            losses = self.losses(self.student, self.teacher, latents, domain, mask, objective)
        total = losses["total"].item()
        self.scaler.scale(losses["total"]).backward()
        self.scaler.unscale_(self.optimizer)
        torch.nn.utils.clip_grad_norm_(self.trained, self.config.clip_norm or math.inf)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        momentum = self.config.teacher_momentum
        with torch.no_grad():
            for own, average in zip(self.student.parameters(), self.teacher.parameters(), strict=True):
                average.mul_(momentum).add_((1 - momentum) * own)
        return total


def losses_and_gradients(
    losses_of: Losses,
    student: MeDUET,
    teacher: MeDUET,
    batch: tuple[Tensor, Tensor, Tensor],
    objective: ObjectiveConfig,
    amp: torch.dtype | None = None,
) -> dict[str, Tensor]:
    """Every loss, and ``grad NAME`` of every parameter of the student that asks for one, in float32."""
    device = student.cls_token.device.type
    trained = {name: item for name, item in student.named_parameters() if item.requires_grad}
    # Scaled as a gradient scaler would: small float16 gradients must not vanish.
    scale = 1024.0 if amp is torch.float16 else 1.0
    # cuDNN's convolutions are TF32 unless told otherwise.
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=amp is not None):
        with torch.autocast(device, amp or torch.bfloat16, enabled=amp is not None):
            losses = losses_of(student, teacher, *batch, objective)
        gradients = torch.autograd.grad(scale * losses["total"], list(trained.values()))
    found = {name: loss.detach().float() for name, loss in losses.items()}
    return found | {
        f"grad {name}": item.float() / scale for name, item in zip(trained, gradients, strict=True)
    }


def relative(value: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of ``expected``; over 1 where that is 0."""
    size = expected.norm().item()
    return (value - expected).norm().item() / size if size else value.norm().item()


def _whole_gradient(values: dict[str, Tensor]) -> dict[str, Tensor]:
    """The losses, and all gradients as one vector."""
    losses = {name: item for name, item in values.items() if not name.startswith("grad ")}
    return losses | {"gradient": torch.cat([values[name].flatten() for name in values if name not in losses])}


class Gate:
    """The published losses and gradients of one batch, which implementations of the losses are held to.

    In float32 every loss and every gradient must agree to 1e-4. In lower precision the losses and the
    gradient as a whole may err three times as much as the published ones do when everything, weights too, is
    bfloat16.

    Args:
        student, teacher: stay as they are.
        batch: latents (B, C, S, S, S) float32, domain (B,), mask (B, L).
        mftd: whether the distillation term is on.
    """

    def __init__(
        self, student: MeDUET, teacher: MeDUET, batch: tuple[Tensor, Tensor, Tensor], mftd: bool
    ) -> None:
        self.batch, self.objective = batch, ObjectiveConfig(mftd=mftd, pairing="reference")
        self.truth = losses_and_gradients(published_losses, student, teacher, batch, self.objective)
        self._models = student, teacher

    @cached_property
    def _allowed(self) -> dict[str, float]:
        student, teacher = (copy.deepcopy(model).bfloat16() for model in self._models)
        batch = (self.batch[0].bfloat16(), *self.batch[1:])
        rough = _whole_gradient(
            losses_and_gradients(published_losses, student, teacher, batch, self.objective)
        )
        epsilon = torch.finfo(torch.bfloat16).eps
        return {
            name: FACTOR * (relative(rough[name], exact) + epsilon)
            for name, exact in _whole_gradient(self.truth).items()
        }

    def check(
        self, losses_of: Losses, student: MeDUET, teacher: MeDUET, amp: torch.dtype | None = None
    ) -> None:
        """Hold an implementation of the losses to the published one.

        Args:
            losses_of: called like ``pretraining_losses``, under autocast to ``amp``.
            student, teacher: with the weights that this gate was made with.

        Raises:
            AssertionError: naming the worst of what differs.
        """
        truth = self.truth
        tested = losses_and_gradients(losses_of, student, teacher, self.batch, self.objective, amp)
        if truth.keys() != tested.keys():
            raise AssertionError(f"found {sorted(tested)}, expected {sorted(truth)}")
        if amp is None:
            allowed = dict.fromkeys(truth, TOLERANCE)
        else:
            truth, tested, allowed = _whole_gradient(truth), _whole_gradient(tested), self._allowed
        errors = {name: relative(tested[name], truth[name]) for name in truth}
        wrong = [name for name, error in errors.items() if not error <= allowed[name]]
        if wrong:
            worst = max(wrong, key=lambda name: errors[name] / allowed[name])
            raise AssertionError(
                f"{len(wrong)} of {len(errors)} losses and gradients differ from the published step; the "
                f"worst: {worst} by {errors[worst]:.3g}, allowed {allowed[worst]:.3g}"
            )
