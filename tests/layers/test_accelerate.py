"""Models before and after ``accelerate``: same numbers, gradients, names, hooks; refusals to swap."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from meduet_fast.layers import accelerate, fused, restore
from meduet_fast.layers.fused import FusedSequential, PatchConv3d

LAST = torch.channels_last_3d


def outputs(model: nn.Module, inputs: tuple[Any, ...]) -> list[Tensor]:
    torch.manual_seed(0)
    result = model(*inputs)
    flat: list[Tensor] = []
    for item in [result] if isinstance(result, Tensor) else result:
        flat += [item] if isinstance(item, Tensor) else item
    return flat


def require_same(model: nn.Module, inputs: tuple[Any, ...], tolerance: float = 1e-9) -> nn.Module:
    """The accelerated copy, after outputs, gradients and names of the state dict were compared."""
    faster = copy.deepcopy(model)
    assert accelerate(faster)
    assert accelerate(faster) == []
    assert list(faster.state_dict()) == list(model.state_dict())
    found = []
    for version in (model, faster):
        own = [
            item.detach().clone().requires_grad_() if item.is_floating_point() else item for item in inputs
        ]
        version.zero_grad()
        values = outputs(version, tuple(own))
        torch.stack([value.square().mean() for value in values if value.requires_grad]).sum().backward()
        gradients = [item.grad for item in [*own, *version.parameters()] if item.grad is not None]
        found.append([*values, *gradients])
    assert len(found[0]) == len(found[1])
    for before, after in zip(*found, strict=True):
        assert before.shape == after.shape
        assert before.dtype == after.dtype
        assert (before - after).abs().max() <= tolerance * max(before.abs().max().item(), 1e-3)
    faster.load_state_dict(model.state_dict())
    return faster


@pytest.fixture
def as_if_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "pays", lambda x: True)


@pytest.mark.usefixtures("as_if_on_a_gpu")
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("size", [(4, 6, 8), (5, 7, 11)])
def test_convolution_with_kernel_and_stride_alike(size: tuple[int, int, int], bias: bool) -> None:
    conv = nn.Conv3d(3, 5, (2, 3, 4), (2, 3, 4), bias=bias).double()
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    faster = require_same(conv, (x,))
    assert type(faster) is PatchConv3d
    assert faster(x).is_contiguous()
    assert faster(x.contiguous(memory_format=LAST)).is_contiguous(memory_format=LAST)
    assert torch.allclose(faster(x[0]), conv(x[0]))  # without a batch
    with pytest.raises(RuntimeError, match="expected input"):
        faster(torch.randn(2, 4, 4, 6, 8, dtype=torch.float64))
    with pytest.raises(RuntimeError, match=r"[Kk]ernel size"):
        faster(x[..., :3])


@pytest.mark.parametrize(
    "options",
    [
        {"kernel_size": 3, "stride": 2}, {"kernel_size": 2, "stride": 2, "padding": 1},
        {"kernel_size": 2, "stride": 2, "dilation": 2}, {"kernel_size": 2, "stride": 2, "groups": 2},
        {"kernel_size": 1, "stride": 1},
    ],
)  # fmt: skip
def test_other_convolutions_are_left_alone(options: dict[str, int]) -> None:
    assert accelerate(nn.Conv3d(4, 4, **options)) == []  # type: ignore[arg-type]


def pair(channels: int = 4) -> nn.Sequential:
    return nn.Sequential(nn.GroupNorm(2, channels), nn.SiLU(), nn.Conv3d(channels, 3, 3, padding=1))


def test_group_norm_and_silu_in_a_sequential() -> None:
    model = nn.Sequential(pair(), nn.ReLU(), nn.GroupNorm(1, 3), nn.SiLU()).double()
    faster = require_same(model, (torch.randn(2, 4, 3, 4, 5, dtype=torch.float64),))
    assert type(faster) is type(faster[0]) is FusedSequential
    assert type(faster[1:]) is FusedSequential  # slices work
    flat = torch.randn(2, 4, 3, 4, dtype=torch.float64)
    two_dimensional = nn.Sequential(nn.GroupNorm(2, 4), nn.SiLU()).double()
    require_same(two_dimensional, (flat,))
    assert accelerate(nn.Sequential(nn.GroupNorm(2, 4), nn.ReLU(), nn.SiLU())) == []


@pytest.mark.usefixtures("as_if_on_a_gpu")
def test_autocast_keeps_dtypes() -> None:
    x = torch.randn(2, 4, 4, 4, 4).bfloat16()
    for model in (pair(), nn.Sequential(nn.GroupNorm(2, 4), nn.SiLU()), nn.Conv3d(4, 3, 2, 2)):
        faster = copy.deepcopy(model)
        accelerate(faster)
        with torch.autocast("cpu", torch.bfloat16):
            before, after = model(x), faster(x)
        assert before.dtype == after.dtype
        assert torch.allclose(before.float(), after.float(), atol=0.05)


@pytest.mark.usefixtures("as_if_on_a_gpu")
def test_hooks_and_everything_else_stay() -> None:
    model = nn.Sequential(pair(), nn.Conv3d(3, 2, 2, 2))
    calls: list[str] = []
    model[1].register_forward_hook(lambda *_: calls.append("conv"))
    model[0][0].weight.requires_grad_(False)
    model[1].eval()
    objects = [*model.modules(), *model.parameters()]
    assert [swap.path for swap in accelerate(model)] == ["0", "1"]
    assert all(a is b for a, b in zip(objects, [*model.modules(), *model.parameters()], strict=True))
    assert not model[1].training
    assert model[0].training
    x = torch.randn(1, 4, 4, 4, 4)
    model(x)
    assert calls == ["conv"]
    # A hook on a part that the fused pass would pass over is called, too, whenever it was registered.
    handle = model[0][1].register_forward_hook(lambda *_: calls.append("silu"))
    hooked = model(x)
    assert calls == ["conv", "silu", "conv"]
    handle.remove()
    assert torch.allclose(model(x), hooked, atol=1e-6)
    assert torch.allclose(pickle.loads(pickle.dumps(model[0]))(x), model[0](x))


def test_shared_modules_are_swapped_once_and_unknown_ones_never() -> None:
    class Own(nn.Conv3d):
        pass

    shared = nn.Conv3d(2, 2, 2, 2)
    changed = nn.Conv3d(2, 2, 2, 2)
    changed.forward = lambda x: x  # type: ignore[method-assign,assignment]
    model = nn.ModuleDict({"a": shared, "b": shared, "own": Own(2, 2, 2, 2), "changed": changed})
    assert accelerate(model) == [("a", "torch.nn.modules.conv.Conv3d", "patch_embed_3d")]
    assert model["a"] is model["b"]


@pytest.mark.usefixtures("as_if_on_a_gpu")
def test_compiles_as_one_graph() -> None:
    model = nn.Sequential(pair(), nn.Conv3d(3, 2, 2, 2))
    x = torch.randn(1, 4, 4, 4, 5)
    expected = model(x)
    accelerate(model)
    assert torch.allclose(torch.compile(model, fullgraph=True)(x), expected, atol=1e-5)


@pytest.mark.usefixtures("as_if_on_a_gpu")
def test_restore_gives_the_model_back() -> None:
    model = nn.Sequential(pair(), nn.ReLU(), nn.Sequential(nn.Conv3d(3, 2, 2, 2)))
    calls: list[str] = []
    model[1].register_forward_hook(lambda *_: calls.append("relu"))
    x = torch.randn(1, 4, 4, 4, 4)
    expected, objects, classes = model(x), list(model.modules()), [type(m) for m in model.modules()]
    assert restore(model) == []
    for part in (model, model[0], model):  # as a whole, in part, and once more
        accelerate(part)
        faster = pickle.loads(pickle.dumps(copy.deepcopy(part[2] if part is model else part)))
        assert any(isinstance(module, fused.Fused) for module in faster.modules())
        assert restore(model) == (["0", "2.0"] if part is model else ["0"])
        assert restore(model) == []
        assert [type(module) for module in model.modules()] == classes
        assert all(a is b for a, b in zip(model.modules(), objects, strict=True))
        assert torch.equal(model(x), expected)
    assert calls == ["relu"] * 4

    class Sharded(PatchConv3d):  # what fully_shard makes of a class
        pass

    accelerate(model)
    model[2][0].__class__ = Sharded
    with pytest.raises(ValueError, match=r"module '2.0' is a Sharded, .* before fully_shard"):
        restore(model)
    assert type(model[0]) is FusedSequential


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_scripting_asks_for_restore() -> None:
    model = nn.Sequential(pair(), nn.Conv3d(3, 2, 2, 2))
    x = torch.randn(1, 4, 4, 4, 4)
    expected = torch.jit.script(model)(x)
    accelerate(model)
    with pytest.raises(RuntimeError, match=r"FusedSequential.*restore\(model\) first"):
        torch.jit.script(model)
    with pytest.raises(RuntimeError, match=r"PatchConv3d.*restore\(model\) first"):
        torch.jit.script(nn.Sequential(model[1]))
    restore(model)
    assert torch.allclose(torch.jit.script(model)(x), expected)
