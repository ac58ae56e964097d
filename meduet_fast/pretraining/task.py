"""What every training step does on the device.

Nothing here waits for it, so all of it can be captured; but for the erasure of domains, which looks at its
means.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from meduet_fast.engine.optimizer import update_teacher
from meduet_fast.engine.precision import Precision, low_precision
from meduet_fast.models import MeDUET

from .erasure import DomainMeans
from .losses import ObjectiveConfig, pretraining_losses


class PretrainStep(nn.Module):
    """Student and teacher under one roof, whose call is the losses of a batch.

    DDP and FSDP must see a single call a step: it is where they gather weights and begin to reduce gradients.
    """

    def __init__(self, student: MeDUET, teacher: MeDUET, domain_means: DomainMeans | None = None) -> None:
        super().__init__()
        self.student, self.teacher, self.domain_means = student, teacher, domain_means

    def forward(
        self, latents: Tensor, domain: Tensor, mask: Tensor, objective: ObjectiveConfig
    ) -> dict[str, Tensor]:
        """See :func:`meduet_fast.pretraining.pretraining_losses`; values are not looked at."""
        losses = pretraining_losses(
            self.student, self.teacher, latents, domain, mask, objective, False, self.domain_means
        )
        scale = self.student.siqc_log_scale
        if not objective.siqc and scale.requires_grad:
            # DDP waits for the gradient of every parameter, and checkpoints hold every parameter's moments.
            losses["total"] = losses["total"] + 0 * scale.sum()
        return losses


def add_gradients(
    step: nn.Module,
    latents: Tensor,
    domain: Tensor,
    mask: Tensor,
    objective: ObjectiveConfig,
    share: float = 1.0,
    precision: Precision = "auto",
) -> dict[str, Tensor]:
    """Losses of one batch; the student's gradients grow by ``share`` of theirs.

    Arguments and result are those of :func:`meduet_fast.pretraining.pretraining_losses`.

    Args:
        step: a :class:`PretrainStep`, parallelized or not.
        share: of this batch in the step.
        precision: that ``step`` was made for.
    """
    device = latents.device
    with torch.autocast(device.type, torch.bfloat16, enabled=low_precision(precision, device)):
        losses = step(latents, domain, mask, objective)
    (losses["total"] * share).backward()
    return {name: loss.detach() for name, loss in losses.items()}


def update(
    student: MeDUET,
    teacher: MeDUET,
    optimizer: torch.optim.Optimizer,
    clip_norm: float,
    momentum: float,
    domain_means: DomainMeans | None = None,
    keep_gradients: bool = False,
) -> Tensor:
    """Clip the gradients, use them up, and let the teacher follow.

    Args:
        domain_means: what to erase from the content of both, if anything.
        keep_gradients: zero their memory and do not free it.

    Returns:
        The gradient's norm before clipping, a scalar on the device.
    """
    parameters = [parameter for parameter in student.parameters() if parameter.requires_grad]
    norm = get_total_norm([item.grad for item in parameters if item.grad is not None], foreach=True)
    if isinstance(norm, DTensor):  # the norm of this process's shards: add up all of them
        norm = norm.full_tensor()
    clip_grads_with_norm_(parameters, clip_norm, norm, foreach=True)
    optimizer.step()
    optimizer.zero_grad(set_to_none=not keep_gradients)
    update_teacher(teacher, student, momentum)
    if domain_means is not None:
        domain_means.step(*(model.disentangled_factorizer.proj_c.weight for model in (student, teacher)))
    return norm
