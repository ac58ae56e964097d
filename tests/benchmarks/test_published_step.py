"""The peer that re-implements the published step: its numbers are the published ones, and so is its work."""

from __future__ import annotations

import copy
import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.published_step import Gate, Losses, PublishedStep, losses_and_gradients, published_losses
from benchmarks.step_parts import make_batch
from meduet_fast.models import MeDUET, MeDUETConfig
from meduet_fast.pretraining import ObjectiveConfig, OptimizerConfig, pretraining_losses, reference

GOLDEN = Path(__file__).parents[1] / "golden" / "meduet_reference_tiny.safetensors"
Case = tuple[MeDUET, MeDUET, tuple[Tensor, Tensor, Tensor]]


@pytest.fixture
def golden() -> dict[str, Tensor]:
    with safe_open(GOLDEN, "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118


@pytest.fixture
def case(golden: dict[str, Tensor]) -> Case:
    with safe_open(GOLDEN, "pt") as file:
        settings = json.loads(file.metadata()["config"])
    names = MeDUETConfig.__dataclass_fields__
    config = MeDUETConfig(**{key: value for key, value in settings.items() if key in names})
    student, teacher = (
        MeDUET.from_reference(
            {
                key.removeprefix(f"{name}/"): item
                for key, item in golden.items()
                if key.startswith(f"{name}/")
            },
            config,
        )
        for name in ("student", "teacher")
    )
    return student, teacher, (golden["input/x"], golden["input/domain"], golden["input/mask"].bool())


def test_losses_and_gradients_are_the_published_ones(case: Case, golden: dict[str, Tensor]) -> None:
    student, teacher, batch = case
    found = losses_and_gradients(published_losses, student, teacher, batch, ObjectiveConfig())
    scales = torch.stack([golden["grad_siqc/logit_scale_c"], golden["grad_siqc/logit_scale_s"]])
    expected = {"grad siqc_log_scale": scales}
    for key, value in golden.items():
        if key.startswith("loss/"):
            expected[key.removeprefix("loss/")] = value
        elif key.startswith("grad/"):
            expected[f"grad {key.removeprefix('grad/')}"] = value
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert (found[name] - value).norm() <= 1e-4 * value.norm(), name


@pytest.mark.parametrize("mftd", [True, False])
@pytest.mark.parametrize("amp", [None, torch.bfloat16])
def test_ours_passes_the_gate(case: Case, mftd: bool, amp: torch.dtype | None) -> None:
    student, teacher, batch = case
    gate = Gate(student, teacher, batch, mftd)
    gate.check(partial(pretraining_losses, check_values=False), student, teacher, amp)
    gate.check(published_losses, student, teacher, amp)


def test_bfloat16_costs_us_no_more_than_the_published_step() -> None:
    """Distance of the gradient from float32's; deep enough for a residual stream in bfloat16 to show."""
    torch.manual_seed(0)
    config = MeDUETConfig(
        latent_size=8, patch_size=2, embed_dim=48, depth=6, num_heads=2, decoder_embed_dim=48,
        decoder_depth=6, decoder_num_heads=2, num_domains=3,
    )  # fmt: skip
    student, teacher = MeDUET(config), MeDUET(config).requires_grad_(False)
    batch = make_batch(config, 4, torch.device("cpu"))
    objective = ObjectiveConfig(pairing="reference")

    def gradient(losses: Losses, amp: bool) -> Tensor:
        student.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=amp):
            total = losses(student, teacher, *batch, objective)["total"]
        total.backward()
        return torch.cat([item.grad.flatten() for item in student.parameters() if item.grad is not None])

    ours, published = (
        (gradient(losses, True) - gradient(losses, False)).norm()
        for losses in (pretraining_losses, published_losses)
    )
    assert ours < 1.2 * published


@pytest.mark.parametrize(
    ("amp", "other"),
    [
        (None, ObjectiveConfig(pairing="source")),
        (torch.bfloat16, ObjectiveConfig(pairing="reference", mftd=False)),
    ],
)
def test_the_gate_refuses_other_losses(case: Case, amp: torch.dtype | None, other: ObjectiveConfig) -> None:
    student, teacher, batch = case
    gate = Gate(student, teacher, batch, mftd=True)

    def wrong(student: MeDUET, teacher: MeDUET, *arguments: Any) -> dict[str, Tensor]:
        return pretraining_losses(student, teacher, *arguments[:3], other)

    with pytest.raises(AssertionError, match=r"differ from the published step; the worst: .* allowed"):
        gate.check(wrong, student, teacher, amp)


@pytest.mark.parametrize(("mftd", "expected"), [(True, 873.7e9), (False, 537.0e9)])
def test_flops_per_sample_at_vit_base(mftd: bool, expected: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Linear layers, forward and backward, on shapes alone, which masked_select cannot do."""
    monkeypatch.setattr(reference, "compact", lambda tokens, mask: tokens[:, ::2])
    with torch.device("meta"):
        student, teacher = MeDUET(), MeDUET()
        latents, mask = torch.empty(2, 4, 24, 24, 24), torch.empty(2, 216, dtype=torch.bool)
        domain = torch.empty(2, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter:
        objective = ObjectiveConfig(mftd=mftd)
        published_losses(student, teacher, latents, domain, mask, objective)["total"].backward()
    counts = {str(name): value for name, value in counter.get_flop_counts()["Global"].items()}
    linear = counter.get_total_flops() - counts["aten.bmm"]  # attention's products on the meta device
    assert linear / 2 == pytest.approx(expected, rel=1e-3)


def test_a_step_trains_the_student_and_moves_the_teacher(case: Case) -> None:
    student, teacher, batch = case
    before = copy.deepcopy(student), copy.deepcopy(teacher)
    step = PublishedStep(student, teacher, OptimizerConfig(), amp=None)
    first = step(*batch, ObjectiveConfig())
    for _ in range(4):
        last = step(*batch, ObjectiveConfig())
    assert last < first
    assert torch.equal(student.siqc_log_scale, before[0].siqc_log_scale)  # as published
    for name, now in teacher.named_parameters():
        if name != "siqc_log_scale":
            assert not torch.equal(now, before[1].get_parameter(name)), name
