"""Networks that make latents: sizes, conditions, gradients, what diffusers and the engine do with them."""

from __future__ import annotations

import logging
import socket
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from meduet_fast.layers import attention

pytest.importorskip("diffusers", reason="diffusers is not installed")

from .latent_networks import NETWORKS, SIZES, TRANSFORMERS, inputs, network


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize(("batch", "size"), [(1, (4, 6, 2)), (3, (2, 8, 4)), (5, (4, 4, 6))])
def test_any_box_and_batch(name: str, batch: int, size: tuple[int, int, int]) -> None:
    model, arguments = network(name), inputs(name, batch, size)
    out, features = model(*arguments, features=True)
    assert out.shape == (batch, 3, *size)
    assert features.shape == (batch, *(edge // 2 for edge in size), model.feature_width)
    assert torch.equal(out, model(*arguments))
    alone = torch.cat([model(*(item[row : row + 1] for item in arguments)) for row in range(batch)])
    torch.testing.assert_close(out, alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["transformer tokens", "U-Net tokens"])
def test_pooled_tokens_are_means(name: str) -> None:
    """What the network sees of a map is that of a coarser one."""
    kind, own = NETWORKS[name]
    coarse = network(name)
    fine = kind(**SIZES, **own, content_pool=2)
    fine.load_state_dict(coarse.state_dict())
    sample, times, content, *rest = inputs(name, size=(4, 8, 4))  # (3, 2, 4, 2, 12) of content
    wide = content.repeat_interleave(2, 1).repeat_interleave(2, 2).repeat_interleave(2, 3)
    wide[:, ::2] += 1
    wide[:, 1::2] -= 1
    torch.testing.assert_close(fine(sample, times, wide, *rest), coarse(sample, times, content, *rest))


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_it_starts_with_zeros(name: str) -> None:
    assert not network(name, started=False)(*inputs(name)).any()


@pytest.mark.parametrize("name", NETWORKS)
def test_what_is_dropped_has_no_part(name: str) -> None:
    model = network(name)
    sample, times, content, style, *_ = inputs(name)
    fixed = sample[:1].expand(3, -1, -1, -1, -1), times[:1].expand(3), content, style
    yes, no = torch.tensor([True, True, False]), torch.tensor([False, False, False])
    out = model(*fixed, yes, yes)
    assert torch.equal(out[0], out[1])
    assert not torch.allclose(out[0], out[2])
    assert not torch.allclose(*model(*fixed, yes, no)[:2])  # styles differ
    assert not torch.allclose(*model(*fixed, no, yes)[:2])  # contents do
    assert torch.equal(model(*fixed), model(*fixed, no, no))


@pytest.mark.parametrize("name", NETWORKS)
def test_every_parameter_is_used(name: str) -> None:
    """DDP waits for a gradient of each, whatever was dropped."""
    model = network(name)
    *given, content_dropped, style_dropped = inputs(name)
    model(*given, content_dropped, style_dropped).square().mean().backward()
    assert [key for key, item in model.named_parameters() if not item.grad.any()] == []
    model.zero_grad()
    model(*given).square().mean().backward()
    assert [key for key, item in model.named_parameters() if item.grad is None] == []


@pytest.mark.parametrize("name", NETWORKS)
def test_factors_are_standardised(name: str) -> None:
    model, arguments = network(name), inputs(name)
    expected = model(*arguments)
    mean, deviation, style_mean, style_deviation = (
        getattr(model, key).clone()
        for key in ("content_mean", "content_deviation", "style_mean", "style_deviation")
    )
    model.set_statistics(*(torch.zeros(12), torch.ones(12), torch.zeros(5), torch.zeros(5)))  # 0 counts as 1
    arguments[2] = (arguments[2] - mean) / deviation
    arguments[3] = (arguments[3] - style_mean) / style_deviation
    assert torch.equal(model(*arguments), expected)
    for wrong, message in (
        (torch.ones(11), "expected \\(12,\\)"),
        (-torch.ones(12), "is not finite and 0 or more"),
    ):
        with pytest.raises(ValueError, match=message):
            model.set_statistics(torch.zeros(12), wrong, torch.zeros(5), torch.ones(5))


@pytest.mark.parametrize("name", NETWORKS)
def test_narrow_weights_leave_the_statistics_alone(name: str) -> None:
    model, arguments = network(name), inputs(name)
    expected, mean = model(*arguments), model.content_mean.clone()
    narrow = model.to(torch.bfloat16)
    assert torch.equal(narrow.content_mean, mean)
    out = narrow(arguments[0].bfloat16(), *arguments[1:])
    assert out.dtype == torch.bfloat16
    assert (out - expected).norm() < 0.05 * expected.norm()


@pytest.mark.parametrize("name", NETWORKS)
def test_autocast_stays_close(name: str) -> None:
    model, arguments = network(name), inputs(name)
    expected = model(*arguments)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(*arguments)
    assert (out - expected).norm() < 0.05 * expected.norm()
    out.float().square().mean().backward()
    assert all(item.grad.isfinite().all() for item in model.parameters())


@pytest.mark.parametrize("name", NETWORKS)
def test_recomputed_blocks_give_the_same(name: str) -> None:
    model, arguments = network(name), inputs(name)
    out = model(*arguments)
    expected = torch.autograd.grad(out.square().mean(), list(model.parameters()))
    for block in model.transformer_blocks():
        block.forward = partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)
    again = model(*arguments)
    found = torch.autograd.grad(again.square().mean(), list(model.parameters()))
    assert all(torch.equal(a, b) for a, b in zip((out, *expected), (again, *found), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["transformer tokens", "U-Net tokens"])
def test_it_compiles_without_graph_breaks(name: str) -> None:
    """With a size that it was not made for, whose positions are computed in the graph."""
    model, arguments = network(name), inputs(name, 3, (4, 4, 6))
    out = torch.compile(model, fullgraph=True, backend="eager")(*arguments)
    torch.testing.assert_close(out, model(*arguments), rtol=1e-4, atol=1e-4)
    out.square().mean().backward()
    assert all(item.grad is not None for item in model.parameters())


@pytest.mark.parametrize("name", NETWORKS)
def test_diffusers_saves_and_loads_it(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a network was asked")

    model, arguments = network(name), inputs(name)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, low_cpu_mem_usage=False, local_files_only=True)
    assert capfd.readouterr() == ("", "")
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), loaded.state_dict().values()))  # noqa: B905
    assert torch.equal(loaded(*arguments), model.eval()(*arguments))
    assert dict(loaded.config).items() >= {"in_channels": 3, "sample_size": [4, 6, 2]}.items()
    narrow = type(model).from_pretrained(tmp_path, low_cpu_mem_usage=False, torch_dtype=torch.bfloat16)
    assert {item.dtype for item in narrow.parameters()} == {torch.bfloat16}
    assert torch.equal(narrow.style_mean, model.style_mean)


@pytest.mark.parametrize("name", NETWORKS)
def test_shapes_alone_count_flops_and_become_real(name: str) -> None:
    with torch.device("meta"):
        model = network(name, started=False)
    with FlopCounterMode(display=False) as counter:
        model(*(item.to("meta") for item in inputs(name))).sum().backward()
    assert counter.get_total_flops() > 3 * sum(
        item.numel() for item in model.transformer_blocks()[0].parameters()
    )
    model.to_empty(device="cpu")
    model.reset_parameters()
    assert all(item.isfinite().all() for item in (*model.parameters(), *model.buffers()))
    assert torch.equal(model(*inputs(name)), network(name, started=False)(*inputs(name)))


@pytest.mark.parametrize("name", NETWORKS)
def test_the_chosen_attention_is_looked_up_in_every_pass(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, arguments = network(name), inputs(name)
    model(*arguments)
    called: list[torch.Size] = []

    def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        called.append(query.shape)
        return torch.zeros_like(query)

    monkeypatch.setattr(attention, "attend", attend)
    model(*arguments)
    assert called
    assert {(shape[0], len(shape)) for shape in called} == {(3, 4)}


@pytest.mark.parametrize("name", NETWORKS)
def test_unfit_inputs_and_settings_get_one_line(name: str) -> None:
    model, arguments = network(name), inputs(name)
    with pytest.raises(ValueError, match="spatial axis 1 has size 5, expected"):
        model(torch.zeros(3, 3, 4, 5, 2), *arguments[1:])
    for position, what, shape in (
        (0, ".*", (3, 2, 4, 6, 2)),
        (2, "content", (3, 11)),
        (3, "style", (3, 4, 5)),
    ):
        wrong = [*arguments]
        wrong[position] = torch.zeros(*shape)
        with pytest.raises(ValueError, match=f"{what} has shape .*, expected"):
            model(*wrong)
    for setting, value in (
        ("content", "both"), ("prediction", "v"), ("latents_mean", (0.0,)), ("latents_std", (1.0,)),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=f"^{setting}: found .*, expected"):
            type(model)(**{**SIZES, **NETWORKS[name][1], setting: value})


def test_logging_is_as_it_was() -> None:
    assert logging.root.manager.disable == 0
