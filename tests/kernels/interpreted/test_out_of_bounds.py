"""No kernel touches memory outside of its arguments.

While an operation runs, every tensor argument of a launch lives in memory of its own with a wide guard on
either side, and the address of every element that a program loads, stores or changes must be an element of an
argument, of the same size. A read that a mask or a product makes harmless counts as well. Results are held to
the definition, so the arguments really were moved.
"""

from __future__ import annotations

import importlib
import json
import pkgutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime import interpreter

from meduet_fast import kernels
from meduet_fast.kernels import (
    contrast,
    decoder_streams,
    group_norm,
    mix_index,
    patch_embed,
    pool,
    reconstruction,
    style_conv,
    token_mixing,
)
from meduet_fast.kernels.launch import CONFIG_FILE, override_config
from meduet_fast.kernels.mix_index import MixIndex
from meduet_fast.kernels.verify import require

GUARD = 1 << 20  # bytes on either side of a storage
# Of every configuration: several programs and steps even for the small inputs below, the last ones ragged.
SMALL = {
    "BLOCK": 16, "BLOCK_D": 4, "BLOCK_L": 16, "BLOCK_P": 2, "BLOCK_M": 16, "BLOCK_N": 16, "BLOCK_K": 16,
    "CHUNK": 16, "COLUMNS": 4, "PROGRAMS": 4, "ROWS": 2, "STEPS": 2, "TILE": 16,
}  # fmt: skip
SMALL_CONTRAST = {**SMALL, "COLUMNS": 16, "ROWS": 8}  # quadruplets come in multiples of 4 rows


# 1. The watch


class OutOfBoundsError(Exception):
    """A program touches what is no element of an argument."""


def _addresses(x: Tensor) -> np.ndarray:
    """Of every element, ascending."""
    offsets = np.zeros(1, np.int64)
    for size, stride in zip(x.shape, x.stride(), strict=True):
        offsets = np.add.outer(offsets, np.arange(size) * stride).ravel()
    return np.unique(x.data_ptr() + x.element_size() * offsets)


def _bytes(storage: torch.UntypedStorage) -> Tensor:
    return torch.tensor([], dtype=torch.uint8).set_(storage)  # type: ignore[call-overload]


class Watch:
    """Runs launches on guarded copies of their arguments and checks every address.

    Attributes:
        launched: names of the kernels.
        checked: number of elements that programs touched.
    """

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.launched: set[str] = set()
        self.checked = 0
        self._kernel = ""
        self._arguments: dict[str, Tensor] = {}
        self._known: dict[int, np.ndarray] = {}
        call, core = interpreter.GridExecutor.__call__, interpreter._interpreter
        load, store, swap, change = core.load, core.store, core.atomic_cas, core.atomic_rmw

        def checked_load(pointers: np.ndarray, mask: np.ndarray, other: np.ndarray, dtype: Any) -> Any:
            self._check("reads", pointers, mask, np.dtype(dtype).itemsize)
            return load(pointers, mask, other, dtype)

        def checked_store(pointers: np.ndarray, value: np.ndarray, mask: np.ndarray) -> Any:
            self._check("writes", pointers, mask, value.itemsize)
            return store(pointers, value, mask)

        def checked_swap(pointers: np.ndarray, compared: np.ndarray, value: np.ndarray, order: Any) -> Any:
            self._check("swaps", pointers, np.ones_like(pointers, bool), value.itemsize)
            return swap(pointers, compared, value, order)

        def checked_change(
            operation: Any, pointers: np.ndarray, value: np.ndarray, mask: np.ndarray, order: Any
        ) -> Any:
            self._check("changes", pointers, mask, value.itemsize)
            return change(operation, pointers, value, mask, order)

        def guarded_call(executor: Any, *arguments: Any, **constants: Any) -> None:
            names = executor.arg_names[: len(arguments)]
            assert not any(isinstance(value, Tensor) for value in constants.values())
            self._kernel = executor.fn.__name__
            self.launched.add(self._kernel)
            self._launch(names, arguments, lambda *moved: call(executor, *moved, **constants))

        patch.setattr(core, "load", checked_load)
        patch.setattr(core, "store", checked_store)
        patch.setattr(core, "atomic_cas", checked_swap)
        patch.setattr(core, "atomic_rmw", checked_change)
        patch.setattr(interpreter.GridExecutor, "__call__", guarded_call)

    def _launch(self, names: list[str], arguments: tuple[Any, ...], run: Callable[..., None]) -> None:
        storages: dict[int, tuple[Tensor, Tensor]] = {}  # the bytes of a storage, here and within guards
        moved = list(arguments)
        for index, x in enumerate(arguments):
            if not isinstance(x, Tensor) or x.untyped_storage().nbytes() == 0:
                continue
            here = x.untyped_storage()
            if here.data_ptr() not in storages:
                within = _bytes(torch.UntypedStorage(here.nbytes() + 2 * GUARD))
                storages[here.data_ptr()] = _bytes(here), within[GUARD : GUARD + here.nbytes()]
                storages[here.data_ptr()][1].copy_(_bytes(here))
            guarded = storages[here.data_ptr()][1].untyped_storage()
            offset = x.storage_offset() + GUARD // x.element_size()
            base = torch.tensor([], dtype=x.dtype)
            moved[index] = base.set_(guarded, offset, x.shape, x.stride())  # type: ignore[call-overload]
        self._arguments = {
            name: x for name, x in zip(names, moved, strict=True) if isinstance(x, Tensor) and x.numel()
        }
        sizes = {x.element_size() for x in self._arguments.values()}
        self._known = {
            size: np.unique(
                np.concatenate([_addresses(x) for x in self._arguments.values() if x.element_size() == size])
            )
            for size in sizes
        }
        run(*moved)
        for original, copy in storages.values():
            original.copy_(copy)

    def _check(self, action: str, pointers: np.ndarray, mask: np.ndarray, size: int) -> None:
        touched = pointers[mask.astype(bool)].astype(np.int64)
        self.checked += touched.size
        outside = touched[~np.isin(touched, self._known.get(size, np.zeros(0, np.int64)))]
        if outside.size == 0:
            return

        def distance(name: str) -> int:
            x = self._arguments[name]
            first, last = _addresses(x)[[0, -1]]
            return max(int(first - outside[0]), int(outside[0] - last), 0)

        name = min(self._arguments, key=distance)
        x = self._arguments[name]
        raise OutOfBoundsError(
            f"{self._kernel} {action} {outside.size} elements of {size} bytes outside of its arguments, the "
            f"first {outside[0] - x.data_ptr()} bytes from the start of {name}, which has shape "
            f"{tuple(x.shape)}, strides {x.stride()} and dtype {x.dtype}"
        )


@pytest.fixture
def watch() -> Iterator[Watch]:
    with pytest.MonkeyPatch.context() as patch:
        yield Watch(patch)


# 2. The watch notices


@triton.jit
def _shifted(x, at, inside):
    return tl.load(x + at, mask=inside, other=0.0)


@triton.jit
def toy_kernel(x, y, counter, shift, readable, written, stride, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = _shifted(x, at * stride + shift, at < readable)
    tl.store(y + at, tl.where(value == value, 1.0, 2.0), mask=at < written)
    tl.atomic_add(counter + tl.program_id(0), 1)


def _run_toy(
    x: Tensor, shift: int = 0, readable: int = 10, written: int = 10, stride: int = 1, programs: int = 3
) -> Tensor:
    y = torch.zeros(10)
    toy_kernel[(programs,)](
        x, y, torch.zeros(3, dtype=torch.int32), shift, readable, written, stride, BLOCK=4
    )
    return y


def test_accesses_inside_pass_and_take_effect(watch: Watch) -> None:
    assert torch.equal(_run_toy(torch.arange(10.0)), torch.ones(10))
    assert torch.equal(_run_toy(torch.arange(20.0)[::2], stride=2), torch.ones(10))
    assert torch.equal(_run_toy(torch.full((1,), torch.nan).expand(10), stride=0), torch.full((10,), 2.0))
    assert watch.launched == {"toy_kernel"}
    assert watch.checked == 3 * (10 + 10 + 3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"readable": 11}, "reads 1 elements of 4 bytes .* 40 bytes from the start of x"),
        ({"readable": 12}, "reads 2 elements"),
        ({"shift": -1}, "reads 1 elements of 4 bytes .* -4 bytes from the start of x"),
        ({"shift": 100_000}, "reads 4 elements"),  # far away, but not another argument
        ({"written": 11}, "writes 1 elements of 4 bytes .* 40 bytes from the start of y"),
        ({"written": 12}, "writes 2 elements"),
        ({"programs": 4}, "changes 1 elements of 4 bytes .* 12 bytes from the start of counter"),
        ({"x": torch.arange(20.0)[::2]}, "reads 2 elements"),  # in the storage, but no element of the view
        ({"x": torch.arange(12.0)[1:-1], "shift": -1}, "reads 1 elements"),
    ],
)
def test_accesses_outside_are_caught(watch: Watch, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(interpreter.InterpreterError, match=f"OutOfBoundsError.*toy_kernel {message}"):
        _run_toy(**{"x": torch.arange(10.0), **changes})


# 3. The kernels


class Case(NamedTuple):
    """A call that must stay within its arguments.

    Attributes:
        run: the operation.
        reference: its definition.
        inputs: keyword arguments of both.
        kernels: what the forward and the backward pass launch.
    """

    run: Callable[..., Any]
    reference: Callable[..., Any]
    inputs: dict[str, Any]
    kernels: tuple[str, ...]


def _randn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape).to(dtype).requires_grad_()


def _tokens(batch: int, length: int, width: int) -> Tensor:
    """Neither contiguous nor the whole of its storage."""
    x = torch.randn(length + 1, batch + 1, width + 2)
    return x[1:, 1:, 1:-1].transpose(0, 1).detach().requires_grad_()


def _mask(batch: int, length: int, num_second: int) -> Tensor:
    return torch.rand(batch, length).argsort(1).argsort(1) < num_second


def _index(batch: int, length: int) -> MixIndex:
    return mix_index.build_mix_index_reference(_mask(batch, length, length // 2))


def _build_index(mask: Tensor) -> Case:
    def floats(function: Callable[[Tensor], MixIndex]) -> Callable[..., tuple[Tensor, ...]]:
        return lambda mask: tuple(table.double() for table in function(mask))

    names = ("token_order_kernel", "mix_index_kernel")
    return Case(
        floats(kernels.build_mix_index), floats(mix_index.build_mix_index_reference), {"mask": mask}, names
    )


def _mixing() -> Case:
    inputs = {"x": _tokens(3, 13, 9), "mask": _mask(3, 13, 5)}
    return Case(kernels.mix_tokens, token_mixing.mix_tokens_reference, inputs, ("mix_tokens_kernel",))


def _halves(inputs: dict[str, Any]) -> Case:
    run, reference = (
        (kernels.demix_tokens, token_mixing.demix_tokens_reference)
        if "x" in inputs
        else (kernels.remix_tokens, token_mixing.remix_tokens_reference)
    )
    return Case(run, reference, inputs, ("token_order_kernel", "token_halves_kernel"))


def _style(mixed: bool) -> Case:
    inputs = {
        "style": _tokens(2, 14, 9),
        "weight": _randn(9, 1, 3),
        "index": _index(2, 14) if mixed else None,
    }
    names = ("style_forward_kernel", "style_backward_kernel")
    return Case(kernels.style_convolution, style_conv.style_convolution_reference, inputs, names)


def _streams(straight: bool, swapped: bool, prefixes: int) -> Case:
    inputs = {
        "content": _tokens(3, 14, 9),
        "style": _tokens(3, 14, 9),
        "prefix": _tokens(3, prefixes, 9),
        "mask_token": _randn(9),
        "position": _randn(prefixes + 14, 9),
        "index": _index(3, 14),
        "straight": straight,
        "swapped": swapped,
    }
    names = ("streams_forward_kernel", "streams_backward_kernel")
    return Case(kernels.assemble_streams, decoder_streams.assemble_streams_reference, inputs, names)


def _group_norm(
    layout: torch.memory_format, weight: Tensor | None, bias: Tensor | None, activation: bool = True
) -> Case:
    x = torch.randn(2, 6, 3, 3, 5).contiguous(memory_format=layout)
    inputs = {
        "x": x.requires_grad_(),
        "num_groups": 2,
        "weight": weight,
        "bias": bias,
        "activation": activation,
    }
    steps = ("statistics", "combine", "apply", "sums", "reduce", "backward")
    names = tuple(f"group_norm_{step}_kernel" for step in steps)
    return Case(kernels.group_norm_silu, group_norm.group_norm_silu_reference, inputs, names)


def _pool(masked: bool) -> Case:
    inputs = {"x": _tokens(3, 29, 11), "mask": _mask(3, 29, 13) if masked else None}
    names = tuple(f"pool_{step}_kernel" for step in ("forward", "reduce", "backward"))
    return Case(kernels.pooled_layer_norm, pool.pooled_layer_norm_reference, inputs, names)


def _reconstruction(pairing: str) -> Case:
    inputs = {
        "prediction": _tokens(6, 2 * 2 * 3, 2 * 2 * 3 * 1),
        "target": torch.randn(3, 2, 3, 6, 5).transpose(2, 4)[:, :, 1:],
        "mask": _mask(3, 2 * 2 * 3, 5),
        "patch_size": (2, 3, 1),
        "pairing": pairing,
    }
    names = ("reconstruction_forward_kernel", "reconstruction_backward_kernel")
    reference = reconstruction.dual_reconstruction_loss_reference
    return Case(kernels.dual_reconstruction_loss, reference, inputs, names)


def _patch_embed(dtype: torch.dtype, tokens: bool, mixed: bool = True, prefixes: int = 1) -> Case:
    """Three samples of 3 x 2 x 3 patches; the middle one is its own partner."""
    inputs: dict[str, Any] = {
        "weight": _randn(2, 19, 2, 3, 1, dtype=dtype).detach().transpose(0, 1).requires_grad_(),
        "num_prefix_tokens": prefixes,
    }
    if mixed:
        inputs |= {"bias": _randn(19, dtype=dtype), "position": _randn(18, 19, dtype=dtype)}
    if tokens:
        inputs["tokens"] = _tokens(3, 18, 12).detach().to(dtype).requires_grad_()
        run, reference = kernels.patch_embed_tokens, patch_embed.patch_embed_tokens_reference
    else:
        x = torch.randn(3, 2, 4, 6, 7).to(dtype).transpose(2, 4)[:, :, 1:, :, 1:]
        inputs["x"] = x.detach().requires_grad_()
        inputs["source_mask"] = _mask(3, 18, 9) if mixed else None
        run, reference = kernels.patch_embed_3d, patch_embed.patch_embed_3d_reference
    names = tuple(f"patch_embed_{step}_kernel" for step in ("forward", "grad_x", "grad_weight"))
    return Case(run, reference, inputs, names)


CONTRAST = ("contrast_rows_kernel", "contrast_finish_kernel", "contrast_backward_kernel")


def _quadruplet(identity: str, dtype: torch.dtype, width: int) -> Case:
    inputs = {
        "queries": _tokens(12, width, 1)[:, :, 0].detach().to(dtype).requires_grad_(),
        "keys": torch.randn(24, width + 3).to(dtype)[:, 1:-2],
        "log_scale": torch.tensor(2.5, requires_grad=True),
        "identity": identity,
        "key_offset": 3,
    }
    reference = contrast.quadruplet_contrast_reference
    return Case(kernels.quadruplet_contrast, reference, inputs, CONTRAST)


def _supervised(itself: bool, dtype: torch.dtype, width: int) -> Case:
    inputs = {
        "queries": _randn(21, width, dtype=dtype),
        "keys": torch.randn(37, width + 3).to(dtype)[:, 1:-2],
        "query_labels": torch.arange(21) % 5,
        "key_labels": torch.arange(37) % 4,
        "log_scale": torch.tensor(2.5, requires_grad=True),
        "self_index": torch.arange(21) + 16 if itself else None,
    }
    reference = contrast.supervised_contrast_reference
    return Case(kernels.supervised_contrast, reference, inputs, CONTRAST)


half, single = torch.float16, torch.float32
CASES: dict[str, Callable[[], Case]] = {
    "tables": lambda: _build_index(_mask(3, 42, 21)),
    "tables of uneven halves": lambda: _build_index(torch.rand(4, 42) < torch.arange(4)[:, None] / 3),
    "mixing": _mixing,
    "demixing": lambda: _halves({"x": _tokens(3, 13, 9), "mask": _mask(3, 13, 5)}),
    "demixing of uneven halves": lambda: _halves(
        {"x": _tokens(4, 14, 5), "mask": torch.rand(4, 14) < torch.arange(4)[:, None] / 3}
    ),
    "remixing": lambda: _halves({"z1": _tokens(3, 8, 9), "z2": _tokens(3, 5, 9), "mask": _mask(3, 13, 5)}),
    "style": lambda: _style(True),
    "style without sources": lambda: _style(False),
    "streams": lambda: _streams(True, True, 1),
    "straight streams": lambda: _streams(True, False, 2),
    "swapped streams": lambda: _streams(False, True, 0),
    "group norm": lambda: _group_norm(torch.contiguous_format, _randn(6), _randn(6)),
    "group norm of channels last": lambda: _group_norm(torch.channels_last_3d, _randn(6), _randn(6)),
    "group norm alone": lambda: _group_norm(torch.channels_last_3d, None, None, activation=False),
    "group norm by sample": lambda: _group_norm(
        torch.channels_last_3d, _randn(2, 6), _tokens(2, 1, 6)[:, 0].detach().requires_grad_()
    ),
    "pool": lambda: _pool(False),
    "pool by source": lambda: _pool(True),
    "reconstruction by source": lambda: _reconstruction("source"),
    "reconstruction by reference": lambda: _reconstruction("reference"),
    "volume": lambda: _patch_embed(single, False),
    "volume in half": lambda: _patch_embed(half, False, prefixes=2),
    "volume alone": lambda: _patch_embed(single, False, mixed=False, prefixes=0),
    "tokens": lambda: _patch_embed(single, True),
    "content": lambda: _quadruplet("content", single, 35),
    "style of quadruplets in half": lambda: _quadruplet("style", half, 13),
    "labels": lambda: _supervised(False, half, 35),
    "labels without itself": lambda: _supervised(True, single, 13),
}


@pytest.mark.parametrize("small", [False, True], ids=["default blocks", "small blocks"])
@pytest.mark.parametrize("make", CASES.values(), ids=CASES.keys())
def test_kernels_stay_within_their_arguments(watch: Watch, make: Callable[[], Case], small: bool) -> None:
    torch.manual_seed(0)
    case = make()
    with ExitStack() as stack:
        if small:
            for name, entries in json.loads(CONFIG_FILE.read_text(encoding="utf-8"))["kernels"].items():
                sizes = SMALL_CONTRAST if name.startswith("contrast") else SMALL
                values = {key: sizes.get(key, value) for key, value in entries["default"].items()}
                stack.enter_context(override_config(name, values))
        require(case.run, case.reference, case.inputs)
    assert watch.launched == set(case.kernels)
    assert watch.checked > 0


@pytest.mark.parametrize("make", [CASES["content"], CASES["labels"]], ids=["content", "labels"])
def test_lengths_of_many_keys_stay_within_their_arguments(
    watch: Watch, monkeypatch: pytest.MonkeyPatch, make: Callable[[], Case]
) -> None:
    monkeypatch.setattr(contrast, "INLINE_LENGTHS", 0)
    torch.manual_seed(0)
    case = make()
    values = {"ROWS": 16, "CHUNK": 16, "num_warps": 4, "num_stages": 1}  # ragged in rows and columns
    with override_config("contrast_lengths", values):
        require(case.run, case.reference, case.inputs)
    assert watch.launched == {*case.kernels, "contrast_lengths_kernel"}


def test_every_kernel_is_watched() -> None:
    found = set()
    for module in pkgutil.iter_modules(kernels.__path__):
        for name, value in vars(importlib.import_module(f"{kernels.__name__}.{module.name}")).items():
            if isinstance(value, interpreter.InterpretedFunction) and name.endswith("_kernel"):
                found.add(name)
    watched = {name for make in CASES.values() for name in make().kernels}
    assert found == watched | {"contrast_lengths_kernel"}
