"""Both objectives: golden values, worked out in plain Python from the formulas, and what inverts what."""

from __future__ import annotations

import pytest
import torch

from meduet_fast.synthesis.diffusion import (
    Objective,
    alphas_cumprod,
    draw_times,
    loss_weight,
    network_time,
    noisy,
    shifted,
    size_shift,
    target,
)

STEPS = torch.tensor([0, 1, 250, 500, 999])


def column(values: torch.Tensor) -> torch.Tensor:
    return values.reshape(-1, 1, 1, 1, 1)


def test_the_schedule_of_epsilon() -> None:
    expected = torch.tensor([0.9999, 0.9997800920720721, 0.5214230306, 0.0777966584, 4.0358297654e-05])
    alphas = alphas_cumprod()
    assert (alphas.shape, alphas.dtype) == ((1000,), torch.float32)
    torch.testing.assert_close(alphas[STEPS], expected, rtol=1e-6, atol=0)


def test_the_interpolant_of_flow() -> None:
    latents, noise = torch.full((4, 1, 1, 1, 1), 2.0), torch.full((4, 1, 1, 1, 1), -1.0)
    mixed = noisy(latents, noise, torch.tensor([0, 0.25, 0.9, 1]), "flow")
    torch.testing.assert_close(mixed, column(torch.tensor([2, 1.25, -0.7, -1])))
    assert (target(latents, noise, "flow") == -3).all()


def test_the_interpolant_of_epsilon() -> None:
    latents, noise = torch.full((3, 1, 1, 1, 1), 2.0), torch.full((3, 1, 1, 1, 1), -1.0)
    mixed = noisy(latents, noise, torch.tensor([0, 250, 999]), "epsilon")
    torch.testing.assert_close(mixed, column(torch.tensor([1.9898999975, 0.7523999735, -0.9872741845])))
    assert (target(latents, noise, "epsilon") == -1).all()


@pytest.mark.parametrize(("objective", "times"), [("flow", [0.01, 0.5, 0.99]), ("epsilon", [0, 400, 900])])
def test_the_target_leads_back_to_the_latents(objective: Objective, times: list[float]) -> None:
    latents, noise = torch.randn(2, 3, 4, 2, 5, 3, generator=torch.Generator().manual_seed(0))
    at = torch.tensor(times)
    mixed, predicted = noisy(latents, noise, at, objective), target(latents, noise, objective)
    if objective == "flow":
        clean = mixed - column(at) * predicted
    else:
        alphas = column(alphas_cumprod()[at])
        clean = (mixed - (1 - alphas).sqrt() * predicted) / alphas.sqrt()
    torch.testing.assert_close(clean, latents, rtol=1e-4, atol=1e-4)


def test_min_snr_weights() -> None:
    expected = torch.tensor([0.000500050005, 0.00109978149, 1, 1, 1])
    torch.testing.assert_close(loss_weight(STEPS, "epsilon", 5), expected)
    assert (loss_weight(STEPS, "epsilon", None) == 1).all()
    assert (loss_weight(torch.rand(5), "flow", 5) == 1).all()


def test_uniform_times_with_a_shift() -> None:
    numbers = torch.tensor([0, 0.1, 0.5, 0.9995])
    torch.testing.assert_close(
        draw_times(numbers, "uniform", 3, "flow"), torch.tensor([0, 0.25, 0.75, 0.99983328])
    )
    assert draw_times(numbers, "uniform", 1, "flow").equal(numbers)
    assert draw_times(numbers, "uniform", 3, "epsilon").tolist() == [0, 250, 750, 999]


def test_logit_normal_times_with_a_shift() -> None:
    numbers = torch.tensor([-2, -0.5, 0, 1.5])
    times = draw_times(numbers, "logit_normal", 1, "flow")
    torch.testing.assert_close(times, torch.tensor([0.1192029220, 0.3775406688, 0.5, 0.8175744762]))
    times = draw_times(numbers, "logit_normal", 2, "flow")
    torch.testing.assert_close(times, torch.tensor([0.2130139578, 0.5481372381, 2 / 3, 0.8996324353]))
    assert draw_times(numbers, "logit_normal", 2, "epsilon").tolist() == [213, 548, 666, 899]


def test_steps_of_epsilon_stay_within_training() -> None:
    """A normal number this large has a sigmoid of 1 in float32."""
    assert draw_times(torch.tensor([30.0, -200.0]), "logit_normal", 1, "epsilon").tolist() == [999, 0]


def test_what_the_network_gets() -> None:
    assert network_time(torch.tensor([0.25]), "flow").tolist() == [250]
    steps = network_time(torch.tensor([7]), "epsilon")
    assert (steps.tolist(), steps.dtype) == ([7], torch.float32)


def test_a_shift_for_the_size() -> None:
    assert size_shift(12**3, 12**3) == 1
    assert size_shift(24**3, 12**3) == pytest.approx(2)
    assert [shifted(end, 2.5) for end in (0.0, 1.0)] == [0, 1]
    assert shifted(shifted(0.3, 2.0), 3.0) == pytest.approx(shifted(0.3, 6.0))
