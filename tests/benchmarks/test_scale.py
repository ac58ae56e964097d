"""The model of many GPUs: what must hold whatever the assumptions are."""

from __future__ import annotations

from dataclasses import replace

import pytest

from benchmarks.results import Row
from benchmarks.scale import (
    GPUS,
    Links,
    Step,
    count_parameters,
    describe,
    gather,
    keys,
    main,
    measured_steps,
    plans,
    step_seconds,
)
from meduet_fast.models import MeDUET, MeDUETConfig

from .made_up import make_results, timed

CONFIG, LINKS = MeDUETConfig(), Links()
NAMES = [plan.name for plan in plans(CONFIG, LINKS)]


def efficiencies(step: Step, name: str, links: Links = LINKS) -> list[float]:
    plan = next(plan for plan in plans(CONFIG, links) if plan.name == name)
    return [step.seconds / step_seconds(step, plan, gpus, CONFIG, links) for gpus in GPUS]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("seconds", [0.001, 0.09, 10.0])
def test_one_gpu_is_100_percent_and_more_are_never_more_efficient(name, seconds):
    values = efficiencies(Step(seconds, 64, "assumed"), name)
    assert values[0] == 1
    assert values == sorted(values, reverse=True)
    assert all(0 < value < 1 for value in values[1:])


@pytest.mark.parametrize("name", NAMES)
def test_faster_links_are_never_less_efficient(name):
    step = Step(0.01, 64, "assumed")
    fast = replace(LINKS, in_node=10 * LINKS.in_node, between=10 * LINKS.between)
    assert all(a <= b for a, b in zip(efficiencies(step, name), efficiencies(step, name, fast), strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_what_cannot_hide_behind_a_short_step_shows(name):
    reduction = next(plan for plan in plans(CONFIG, LINKS) if plan.name == name)
    seconds = reduction.traffic[512].seconds
    step = Step(seconds / 100, 2, "assumed")
    assert step_seconds(step, reduction, 512, CONFIG, LINKS) >= step.seconds + 0.98 * seconds


def test_gathering_is_the_ring_in_a_node():
    links = replace(LINKS, reached=1.0, in_node_hop=0.0)
    sent = gather(800.0, 8, links)
    assert sent.in_node == 700
    assert sent.between == 0
    assert sent.seconds == pytest.approx(700 / links.in_node)


def test_between_nodes_each_gpu_sends_its_share():
    links = replace(LINKS, between_hop=0.0)  # a ring
    assert gather(800.0, 16, links).between == 50  # one of the two nodes' halves of an eighth
    tree = gather(800.0, 512, replace(LINKS, between=1e15))
    ring_of_hops = 63 * LINKS.between_hop
    assert tree.seconds < ring_of_hops


def test_one_gpu_sends_nothing():
    assert gather(1e9, 1, LINKS) == (0, 0, 0)


def test_a_node_that_is_not_full_is_refused():
    with pytest.raises(ValueError, match="12 GPUs do not fill nodes of 8"):
        gather(1.0, 12, LINKS)


def test_gradients_of_every_parameter_are_reduced():
    small = MeDUETConfig(
        embed_dim=48, depth=2, num_heads=2, decoder_embed_dim=24, decoder_depth=1, decoder_num_heads=2
    )
    parameters = sum(p.numel() for p in MeDUET(small).parameters())
    assert sum(count_parameters(small)) == parameters
    reduction = plans(small, LINKS)[0].traffic[8]
    assert reduction.in_node == pytest.approx(2 * 7 / 8 * 4 * parameters)


def test_keys_grow_with_the_gpus():
    traffic, products = keys(CONFIG, 64, 8, LINKS)
    rows = 4 * 64
    assert traffic.in_node == 7 * rows * (768 + 192) * 4
    assert products == pytest.approx(6 * rows * 7 * rows * 960 / LINKS.matrix_rate)
    assert keys(CONFIG, 64, 1, LINKS) == ((0, 0, 0), 0)


def test_the_best_batch_of_every_form_of_the_step_is_taken():
    found = measured_steps(make_results())
    assert [(step.batch, step.seconds) for step in found] == [(128, pytest.approx(0.148))] * 2
    assert all(step.source.startswith("measured: ViT-B B=128 with") for step in found)


def test_a_processors_step_is_not_scaled_to_gpus(tmp_path, capsys):
    path = make_results(device="Some CPU").save(tmp_path / "cpu.json")
    with pytest.raises(SystemExit, match="2"):
        main([str(path)])
    assert "no row of our training step on a CUDA device" in capsys.readouterr().err


def test_what_is_not_measured_says_so(capsys):
    assert main([]) == 0
    printed = capsys.readouterr().out
    assert "Computed, not measured" in printed
    assert "step time of one H100 is not measured" in printed
    assert "efficiency |" not in printed


def test_an_assumed_step_says_so(capsys):
    assert main(["--step-ms", "90", "--batch", "32"]) == 0
    printed = capsys.readouterr().out
    assert "From 90.0 ms a step of 32 samples on one GPU (assumed)" in printed
    assert "| 1 | 90.0 ms | 356 | 100 % |" in printed


def test_a_measured_step_names_its_run():
    text = describe(measured_steps(make_results()))
    assert "NVIDIA H100 80GB HBM3, 2026-01-02T10:00:00+00:00, c02" in text


@pytest.mark.parametrize("value", ["0", "-1", "nan", "inf"])
def test_impossible_step_times_are_refused(value, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["--step-ms", value])
    assert "must be positive" in capsys.readouterr().err


def test_rows_of_other_variants_are_not_ours():
    row = Row("step", "ViT-B B=64", "published", "step", shape={"batch": 64}, **timed(1e5))
    assert measured_steps(make_results(rows=[row])) == []
