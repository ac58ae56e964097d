"""Samplers on data whose best prediction is known: N(0.7, 0.6^2) in every voxel."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from meduet_fast.errors import MissingExtra, UserError
from meduet_fast.synthesis.diffusion import Objective, alphas_cumprod, noisy, shifted, target
from meduet_fast.synthesis.samplers import (
    SAMPLERS,
    Step,
    build_scheduler,
    objective_of,
    require_objective,
    sampling_steps,
    scheduler_name,
    start_from,
)

diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")
MEAN, DEVIATION = 0.7, 0.6
ALL = [(objective, name) for objective, names in SAMPLERS.items() for name in names]
FIRST_ORDER: list[tuple[Objective, str]] = [("flow", "euler"), ("epsilon", "ddim")]


def best_prediction(
    objective: Objective, step: Step, x: Tensor, deviation: float = DEVIATION, mean: float = MEAN
) -> Tensor:
    """What a perfect network says of normal data."""
    noise_rate = step.sigma
    rate = 1 - noise_rate if objective == "flow" else (1 - noise_rate**2) ** 0.5
    surprise = (x - rate * mean) / (rate**2 * deviation**2 + noise_rate**2)
    noise, latents = noise_rate * surprise, mean + rate * deviation**2 * surprise
    return noise - latents if objective == "flow" else noise


def sample(
    objective: Objective,
    name: str,
    x: Tensor,
    steps: int,
    predict: Callable[..., Tensor] = best_prediction,
    **how: Any,
) -> Tensor:
    scheduler = build_scheduler(name, objective)
    generator = {"generator": torch.Generator().manual_seed(0)} if name == "ddpm" else {}
    for step in sampling_steps(scheduler, steps, **how):
        x = scheduler.step(predict(objective, step, x), step.timestep, x, return_dict=False, **generator)[0]
    return x


def errors(objective: Objective, name: str, steps: int, **how: Any) -> tuple[float, float]:
    """Relative errors of mean and variance, exact: every step is a straight line, so two points tell all."""
    at_0, at_1 = sample(objective, name, torch.tensor([0.0, 1.0]), steps, **how).double()
    return float(at_0 / MEAN - 1), float((at_1 - at_0) ** 2 / DEVIATION**2 - 1)


@pytest.mark.parametrize("objective", ["flow", "epsilon"])
def test_the_default_reaches_mean_and_variance(objective: Objective) -> None:
    assert SAMPLERS[objective][0] == "dpm++"
    mean, variance = errors(objective, "dpm++", 30)
    assert abs(mean) < 0.02
    assert abs(variance) < 0.02


@pytest.mark.parametrize(("objective", "name"), FIRST_ORDER)
def test_twice_the_steps_halve_the_error(objective: Objective, name: str) -> None:
    """Also with steps that do not divide 1000, where DDIM as it comes misses its own times."""
    variances = [errors(objective, name, steps)[1] for steps in (35, 70, 140, 280)]
    for fewer, more in itertools.pairwise(variances):
        assert 1.8 < fewer / more < 2.2


@pytest.mark.parametrize("steps", [30, 61, 95, 150, 600, 1000])
def test_ddim_is_the_first_order_of_the_solver(steps: int) -> None:
    """Whose times may be any."""
    first_order = diffusers.DPMSolverMultistepScheduler(solver_order=1)
    x, expected = torch.tensor([0.0, 1.0]), torch.tensor([0.0, 1.0])
    scheduler = build_scheduler("ddim", "epsilon")
    plan = sampling_steps(scheduler, steps)
    first_order.set_timesteps(timesteps=[int(step.network_time) for step in plan])
    for step, timestep in zip(plan, first_order.timesteps, strict=True):
        x = scheduler.step(best_prediction("epsilon", step, x), step.timestep, x, return_dict=False)[0]
        prediction = best_prediction("epsilon", step, expected)
        expected = first_order.step(prediction, timestep, expected, return_dict=False)[0]
    torch.testing.assert_close(x, expected, rtol=1e-4, atol=1e-4)


def test_ddpm_converges() -> None:
    noise = torch.randn(40_000, 1, generator=torch.Generator().manual_seed(1))
    found = [sample("epsilon", "ddpm", noise, steps) for steps in (30, 120, 480)]
    variances = [float(samples.var()) / DEVIATION**2 - 1 for samples in found]
    assert [abs(variance) < limit for variance, limit in zip(variances, (0.35, 0.1, 0.04), strict=True)] == [
        True
    ] * 3
    assert abs(variances[0]) > 2 * abs(variances[1]) > 4 * abs(variances[2])
    assert float(found[-1].mean()) == pytest.approx(MEAN, rel=0.02)


@pytest.mark.parametrize(("objective", "name"), ALL)
def test_no_latent_is_clipped(objective: Objective, name: str) -> None:
    """All data is one value far from [-1, 1]."""
    for value in (10.0, -10.0):
        x = sample(
            objective, name, torch.randn(5, 1), 12,
            predict=lambda objective, step, x, value=value: best_prediction(objective, step, x, 0, value),
        )  # fmt: skip
        torch.testing.assert_close(x, torch.full((5, 1), value), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("objective", "name"), ALL)
@pytest.mark.parametrize("steps", [1, 2, 7, 30, 61, 103, 1000])
def test_so_many_steps_are_so_many_evaluations(objective: Objective, name: str, steps: int) -> None:
    """At times that fall, and never leave the range of training."""
    plan = sampling_steps(build_scheduler(name, objective), steps)
    times, sigmas = [step.network_time for step in plan], [step.sigma for step in plan]
    assert len(plan) == steps
    assert 1000 >= times[0] >= 999
    assert times == sorted(set(times), reverse=True)
    assert times[-1] >= 0
    assert sigmas == sorted(set(sigmas), reverse=True)


@pytest.mark.parametrize(("objective", "name"), ALL)
def test_the_network_is_told_how_noisy_the_sample_is(objective: Objective, name: str) -> None:
    for step in sampling_steps(build_scheduler(name, objective), 30, shift=1.7):
        if objective == "flow":
            assert step.network_time == pytest.approx(1000 * step.sigma, abs=1e-4)
        else:
            assert step.sigma == pytest.approx(float((1 - alphas_cumprod()[int(step.network_time)]) ** 0.5))


@pytest.mark.parametrize(("objective", "name"), ALL)
def test_the_true_target_gives_the_latents_back(objective: Objective, name: str) -> None:
    """From any start on: sampler, interpolant and targets have one convention."""
    latents, noise = torch.randn(2, 2, 3, 4, 3, 2, generator=torch.Generator().manual_seed(2))
    scheduler = build_scheduler(name, objective)
    plan = sampling_steps(scheduler, 20, strength=0.5)
    x = start_from(scheduler, latents, noise, plan[0])
    time = torch.tensor([plan[0].sigma if objective == "flow" else int(plan[0].network_time)])
    torch.testing.assert_close(x, noisy(latents, noise, time, objective))
    truth = target(latents, noise, objective)
    if name != "ddpm":  # whose noise is new in every step
        for step in plan:
            x = scheduler.step(truth, step.timestep, x, return_dict=False)[0]
        torch.testing.assert_close(x, latents, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("objective", "name"), ALL)
def test_strength_leaves_the_first_steps_out(objective: Objective, name: str) -> None:
    scheduler = build_scheduler(name, objective)
    full = sampling_steps(scheduler, 20)
    assert sampling_steps(scheduler, 20, strength=0.25) == full[15:]
    assert sampling_steps(scheduler, 20, strength=0.001) == full[19:]


@pytest.mark.parametrize(("objective", "name"), FIRST_ORDER)
def test_a_late_start_goes_on_where_the_whole_was(objective: Objective, name: str) -> None:
    scheduler, x = build_scheduler(name, objective), torch.tensor([0.0, 1.0])
    for step in sampling_steps(scheduler, 20)[:15]:
        x = scheduler.step(best_prediction(objective, step, x), step.timestep, x, return_dict=False)[0]
    whole = sample(objective, name, torch.tensor([0.0, 1.0]), 20)
    assert sample(objective, name, x, 20, strength=0.25).equal(whole)


@pytest.mark.parametrize("objective", ["flow", "epsilon"])
def test_normal_data_stays_so_from_a_late_start(objective: Objective) -> None:
    scheduler = build_scheduler("dpm++", objective)
    first = sampling_steps(scheduler, 40, strength=0.5)[0]
    rate = 1 - first.sigma if objective == "flow" else (1 - first.sigma**2) ** 0.5
    deviation = (rate**2 * DEVIATION**2 + first.sigma**2) ** 0.5
    x = torch.tensor([rate * MEAN, rate * MEAN + deviation])
    at_mean, above = sample(objective, "dpm++", x, 40, strength=0.5)
    assert float(at_mean) == pytest.approx(MEAN, rel=0.02)
    assert float(above - at_mean) == pytest.approx(DEVIATION, rel=0.01)


@pytest.mark.parametrize(("objective", "name"), ALL)
def test_a_shift_is_applied_once(objective: Objective, name: str) -> None:
    """Though set before, and though the scheduler brings one of its own."""
    scheduler = build_scheduler(name, objective)
    plain = [step.network_time / 1000 for step in sampling_steps(scheduler, 10)]
    own = {"dpm++": {"flow_shift": 3.0}, "euler": {"shift": 3.0}}.get(name, {}) if objective == "flow" else {}
    for of in (scheduler, scheduler, type(scheduler).from_config(scheduler.config, **own)):
        times = [step.network_time / 1000 for step in sampling_steps(of, 10, shift=2.0)]
        assert times == pytest.approx(
            [shifted(time, 2.0) for time in plain], abs=1e-6 if objective == "flow" else 2e-3
        )
    assert [step.network_time / 1000 for step in sampling_steps(scheduler, 10)] == pytest.approx(
        plain, abs=1e-6
    )


@pytest.mark.parametrize(("steps", "shift"), [(60, 2.0), (400, 4.0)])
def test_a_shift_still_leads_to_the_data(steps: int, shift: float) -> None:
    """Also where the first times are one and the same number to the scheduler, which cuts them down."""
    mean, variance = errors("flow", "dpm++", steps, shift=shift)
    assert abs(mean) < 0.02
    assert abs(variance) < 0.02


@pytest.mark.parametrize(("objective", "name"), ALL)
def test_schedulers_say_what_they_are_also_out_of_a_file(
    tmp_path: Path, objective: Objective, name: str
) -> None:
    scheduler = build_scheduler(name, objective)
    before = sampling_steps(scheduler, 8, shift=1.5)
    scheduler.save_pretrained(tmp_path)
    again = type(scheduler).from_pretrained(tmp_path)
    assert (scheduler_name(again), objective_of(again)) == (name, objective)
    assert sampling_steps(again, 8, shift=1.5) == before
    require_objective(again, objective)


@pytest.mark.parametrize(("objective", "name"), ALL)
def test_a_scheduler_of_the_other_objective(objective: Objective, name: str) -> None:
    other: Objective = "epsilon" if objective == "flow" else "flow"
    scheduler = build_scheduler(name, objective)
    known = ", ".join(type(build_scheduler(of_other, other)).__name__ for of_other in SAMPLERS[other])
    with pytest.raises(UserError) as caught:
        require_objective(scheduler, other)
    assert str(caught.value) == (
        f"scheduler: found {type(scheduler).__name__} for {objective}, "
        f"expected one for {other}, which the network was trained for: {known}"
    )


@pytest.mark.parametrize(("objective", "name"), [("flow", "ddim"), ("epsilon", "euler"), ("flow", "heun")])
def test_names_that_an_objective_does_not_have(objective: Objective, name: str) -> None:
    known = ", ".join(SAMPLERS[objective])
    with pytest.raises(UserError) as caught:
        build_scheduler(name, objective)
    assert str(caught.value) == f"sampler: found {name}, expected one for {objective}: {known}"


def test_a_class_that_is_not_known() -> None:
    with pytest.raises(
        UserError, match=r"^scheduler: found PNDMScheduler, expected one of DPMSolverMultistepSch"
    ):
        objective_of(diffusers.PNDMScheduler())


@pytest.mark.parametrize(
    ("scheduler", "message"),
    [
        (
            lambda: diffusers.DDIMScheduler(timestep_spacing="trailing"),
            "clip_sample=True, expected clip_sample=False",
        ),
        (
            lambda: diffusers.DPMSolverMultistepScheduler(timestep_spacing="trailing", thresholding=True),
            "thresholding=True, expected thresholding=False",
        ),
        (
            lambda: diffusers.DDPMScheduler.from_config(
                build_scheduler("ddim", "epsilon").config, beta_end=0.012
            ),
            "beta_end=0.012, expected beta_end=0.02",
        ),
        (
            lambda: diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
            "use_dynamic_shifting=True, expected use_dynamic_shifting=False",
        ),
    ],
)
def test_settings_that_would_change_the_samples(scheduler: Callable[[], Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        sampling_steps(scheduler(), 10)
    assert str(caught.value).endswith(f"with {message}")


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"steps": 0}, "steps: found 0, expected 1 or more"),
        ({"steps": -3}, "steps: found -3, expected 1 or more"),
        ({"steps": 1001}, "steps: found 1001, expected fewer: only 1000 of their times differ"),
        ({"steps": 900, "shift": 4.0}, "steps: found 900, expected fewer: only 632 of their times differ"),
        ({"steps": 10, "shift": 0.0}, "shift: found 0.0, expected more than 0"),
        ({"steps": 10, "shift": float("inf")}, "shift: found inf, expected more than 0"),
        ({"steps": 10, "strength": 0.0}, "strength: found 0.0, expected 0 < value <= 1"),
        ({"steps": 10, "strength": 1.5}, "strength: found 1.5, expected 0 < value <= 1"),
        ({"steps": 10, "strength": float("nan")}, "strength: found nan, expected 0 < value <= 1"),
    ],
    ids=str,
)
def test_numbers_that_make_no_sense(how: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        sampling_steps(build_scheduler("ddim", "epsilon"), **how)
    assert str(caught.value) == message


def test_without_diffusers_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(MissingExtra, match=r"^diffusers is not installed: pip install '\.\[synthesis\]'"):
        build_scheduler("dpm++", "flow")
