"""Sample by diffusers' schedulers, at times that are ours.

A sampler of N steps calls the network at the noise levels u = 1 - k/N for k = 0 to N - 1, shifted, and ends
at clean latents. For flow u is sigma (in DPM-Solver++ 0.999 u is), for epsilon 1000 u - 1 is the step. The
times that diffusers would take are not used, because

- FlowMatchEuler ends with a step 0.001 wide, and applies a shift twice;
- DPM-Solver++ for flow cuts its times down to whole numbers, so only its noise levels are read here;
- DDIM goes on by 1000 // N, which misses its own times unless N divides 1000: 150 steps miss a mean by 7 %;
- "trailing" yields one time too many for 61 steps and some other numbers.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from meduet_fast.errors import UserError, needs_extra
from meduet_fast.settings import POSITIVE, Range, SettingError

from .diffusion import TRAINING_STEPS, Objective, alphas_cumprod, noisy, shifted

SAMPLERS: dict[Objective, tuple[str, ...]] = {
    "flow": ("dpm++", "euler"),
    "epsilon": ("dpm++", "ddim", "ddpm"),
}
"""Names of the samplers of each objective; the first is the default."""

_CLASSES = {
    "dpm++": "DPMSolverMultistepScheduler",
    "euler": "FlowMatchEulerDiscreteScheduler",
    "ddim": "DDIMScheduler",
    "ddpm": "DDPMScheduler",
}
_SETTINGS: dict[tuple[Objective, str], dict[str, Any]] = {
    ("flow", "dpm++"): {"use_flow_sigmas": True, "prediction_type": "flow_prediction"},
    ("flow", "euler"): {},
    ("epsilon", "dpm++"): {"timestep_spacing": "trailing"},
    ("epsilon", "ddim"): {"timestep_spacing": "trailing", "clip_sample": False},
    ("epsilon", "ddpm"): {"timestep_spacing": "trailing", "clip_sample": False},
}
_SHIFTS = {"shift", "flow_shift"}  # set for each sampling


class Step(NamedTuple):
    """Hold one evaluation of the network.

    Attributes:
        timestep: () tensor, what ``scheduler.step`` gets.
        network_time: what the network gets.
        sigma: standard deviation of the noise, from 0 to 1; for epsilon sqrt(1 - a).
    """

    timestep: Tensor
    network_time: float
    sigma: float


def build_scheduler(name: str, objective: Objective) -> Any:
    """Build diffusers' scheduler for a sampler's name; no scheduler of ours clips latents.

    Raises:
        SettingError: for a name that the objective does not have.
        MissingExtra: without diffusers.
    """
    if name not in SAMPLERS[objective]:
        known = ", ".join(SAMPLERS[objective])
        raise SettingError("sampler", f"found {name}, expected one for {objective}: {known}")
    from meduet_fast.models.mixins import quiet  # here, because it takes seconds and the names do not need it

    with needs_extra("synthesis"), quiet():
        import diffusers

        return getattr(diffusers, _CLASSES[name])(**_SETTINGS[objective, name])


def scheduler_name(scheduler: Any) -> str:
    """Return the name of a scheduler of diffusers.

    Raises:
        UserError: if none of ours is of its class.
    """
    for name, of_class in _CLASSES.items():
        if type(scheduler).__name__ == of_class:
            return name
    known = ", ".join(_CLASSES.values())
    raise UserError(f"scheduler: found {type(scheduler).__name__}, expected one of {known}")


def objective_of(scheduler: Any) -> Objective:
    """Return what a scheduler takes the network's output for.

    Raises:
        UserError: for a class that is not known, and for settings that would change the samples: latents are
            not limited to [-1, 1], and other noise levels than those of training are not met.
    """
    name = scheduler_name(scheduler)
    flow = name == "euler" or (name == "dpm++" and scheduler.config.prediction_type == "flow_prediction")
    objective: Objective = "flow" if flow else "epsilon"
    expected = build_scheduler(name, objective).config
    different = [
        key
        for key, value in expected.items()
        if not key.startswith("_") and key not in _SHIFTS and repr(scheduler.config.get(key)) != repr(value)
    ]
    if different:
        found = ", ".join(f"{key}={scheduler.config.get(key)}" for key in different)
        wanted = ", ".join(f"{key}={expected[key]}" for key in different)
        raise UserError(f"scheduler: found {type(scheduler).__name__} with {found}, expected {wanted}")
    return objective


def require_objective(scheduler: Any, objective: Objective) -> None:
    """Refuse a scheduler that a network of this objective can't be sampled with.

    Raises:
        UserError: for one of the other objective, and as :func:`objective_of`.
    """
    found = objective_of(scheduler)
    if found != objective:
        known = ", ".join(_CLASSES[name] for name in SAMPLERS[objective])
        raise UserError(
            f"scheduler: found {type(scheduler).__name__} for {found}, "
            f"expected one for {objective}, which the network was trained for: {known}"
        )


def sampling_steps(scheduler: Any, steps: int, shift: float = 1.0, strength: float = 1.0) -> list[Step]:
    """Set a scheduler's times and return the evaluations of the network, from noise to data.

    Feed ``scheduler.step`` float32 predictions: it returns samples of the prediction's dtype.

    Args:
        scheduler: of :func:`build_scheduler`, or alike.
        steps: from noise to data.
        shift: see :func:`~.diffusion.shifted`; takes the place of the scheduler's own, and is applied once.
        strength: share of the steps that is gone, the last ones, and at least one. Below 1 begin with
            :func:`start_from`.

    Raises:
        SettingError: for numbers out of their ranges, and for epsilon more steps than there are times.
        UserError: as :func:`objective_of`.
    """
    for name, number, allowed in (
        ("steps", steps, Range(1)),
        ("shift", shift, POSITIVE),
        ("strength", strength, Range(0, 1, above=True)),
    ):
        if not (allowed.holds(number) and number < float("inf")):
            raise SettingError(name, f"found {number}, expected {allowed}")
    name, objective = scheduler_name(scheduler), objective_of(scheduler)
    levels = [1 - k / steps for k in range(steps)]
    if objective == "flow":
        if name == "euler":
            scheduler.set_shift(shift)
            scheduler.set_timesteps(sigmas=levels)
        else:
            scheduler.register_to_config(flow_shift=shift)
            scheduler.set_timesteps(steps)
        sigmas = scheduler.sigmas[:-1].tolist()
        network_times = [TRAINING_STEPS * sigma for sigma in sigmas]
    else:
        network_times = [max(0, round(TRAINING_STEPS * shifted(level, shift)) - 1) for level in levels]
        if len(set(network_times)) < steps:
            few = len(set(network_times))
            raise SettingError("steps", f"found {steps}, expected fewer: only {few} of their times differ")
        alphas = alphas_cumprod()[network_times]  # (N,)
        sigmas = (1 - alphas).sqrt().tolist()
        if name == "ddim":  # told of a training of N steps, of which it makes each
            scheduler.alphas_cumprod = alphas.flip(0)
            scheduler.num_inference_steps = TRAINING_STEPS
            scheduler.timesteps = torch.arange(steps - 1, -1, -1)
        else:
            scheduler.set_timesteps(timesteps=network_times)
    first = steps - max(1, round(steps * strength))
    if hasattr(scheduler, "set_begin_index"):  # else DPM-Solver++ skips a time that it has twice
        scheduler.set_begin_index(first)
    return [
        Step(timestep, float(time), sigma)
        for timestep, time, sigma in zip(scheduler.timesteps, network_times, sigmas, strict=True)
    ][first:]


def start_from(scheduler: Any, latents: Tensor, noise: Tensor, first: Step) -> Tensor:
    """Return latents (B, C, X, Y, Z) with as much of the noise as the first step expects."""
    objective = objective_of(scheduler)
    time = torch.tensor(
        [first.sigma if objective == "flow" else int(first.network_time)], device=latents.device
    )
    return noisy(latents, noise, time, objective)
