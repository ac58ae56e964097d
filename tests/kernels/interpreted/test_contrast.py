"""The contrast kernels against their definition."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from meduet_fast.kernels import contrast, quadruplet_contrast, supervised_contrast
from meduet_fast.kernels.contrast import quadruplet_contrast_reference, supervised_contrast_reference
from meduet_fast.kernels.launch import override_config
from meduet_fast.kernels.verify import require

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
SMALL = {"BLOCK_M": 16, "BLOCK_N": 16, "CHUNK": 16, "COLUMNS": 48, "HELD": 1, "PROGRAMS": 4, "num_warps": 4}


def log_scale(dtype: torch.dtype, value: float = 2.5) -> torch.Tensor:
    return torch.tensor(value, dtype=dtype if dtype == torch.float64 else torch.float32, requires_grad=True)


def quadruplet(
    batch: int, ranks: int, rank: int, width: int, identity: str, dtype: torch.dtype, seed: int = 0
) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    rows = 4 * batch
    queries = torch.randn(width, rows, generator=generator, dtype=torch.float64).to(dtype).T  # not contiguous
    keys = torch.randn(rows * ranks, width + 3, generator=generator, dtype=torch.float64).to(dtype)[:, 1:-2]
    return {
        "queries": queries.requires_grad_(),
        "keys": keys,
        "log_scale": log_scale(dtype),
        "identity": identity,
        "key_offset": rank * batch,
    }


def labelled(
    rows: int, key_rows: int, width: int, labels: int, dtype: torch.dtype, itself: bool, seed: int = 0
) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "queries": torch.randn(rows, width, generator=generator).to(dtype).requires_grad_(),
        "keys": torch.randn(key_rows, width, generator=generator).to(dtype),
        "query_labels": torch.randint(labels + 1, (rows,), generator=generator),  # some match no key
        "key_labels": torch.randint(labels, (key_rows,), generator=generator),
        "log_scale": log_scale(dtype),
        "self_index": torch.randint(key_rows, (rows,), generator=generator) if itself else None,
    }


# In one dimension the gradient is zero but for rounding; in few rows PyTorch's own error may be nil by luck.
@settings(max_examples=12, deadline=None)
@given(
    st.integers(1, 7), st.integers(1, 3), st.integers(0, 2), st.integers(2, 70),
    st.sampled_from(["content", "style"]), st.sampled_from(DTYPES), st.integers(0, 1000),
)  # fmt: skip
def test_any_quadruplets(
    batch: int, ranks: int, rank: int, width: int, identity: str, dtype: torch.dtype, seed: int
) -> None:
    inputs = quadruplet(batch, ranks, rank % ranks, width, identity, dtype, seed)
    require(quadruplet_contrast, quadruplet_contrast_reference, inputs, seed)


@settings(max_examples=10, deadline=None)
@given(
    st.integers(4, 40), st.integers(1, 70), st.integers(2, 50), st.integers(1, 8), st.sampled_from(DTYPES),
    st.booleans(), st.integers(0, 1000),
)  # fmt: skip
def test_any_labels(
    rows: int, key_rows: int, width: int, labels: int, dtype: torch.dtype, itself: bool, seed: int
) -> None:
    inputs = labelled(rows, key_rows, width, labels, dtype, itself, seed)
    require(supervised_contrast, supervised_contrast_reference, inputs, seed)


@pytest.mark.parametrize(
    ("held", "blocks", "width", "inline"),
    [  # widths within one group of columns, exactly, in two groups
        (0, (16, 32, 1), 13, 10**6),
        (0, (32, 16, 4), 48, 0),
        (1, (16, 32, 1), 48, 10**6),
        (1, (32, 16, 4), 35, 0),
        (1, (16, 16, 100), 70, 0),
    ],
)
def test_block_sizes(
    monkeypatch: pytest.MonkeyPatch, held: int, blocks: tuple[int, int, int], width: int, inline: int
) -> None:
    monkeypatch.setattr(contrast, "INLINE_LENGTHS", inline)
    values = dict(zip(("BLOCK_M", "BLOCK_N", "PROGRAMS"), blocks, strict=True))
    chosen = SMALL | values | {"HELD": held, "num_stages": 1}
    with override_config("contrast_small", chosen), override_config("contrast_large_ragged", chosen):
        inputs = quadruplet(8, 1, 0, width, "content", torch.bfloat16)
        require(quadruplet_contrast, quadruplet_contrast_reference, inputs)
    with override_config("contrast_float32", chosen):
        require(
            supervised_contrast,
            supervised_contrast_reference,
            labelled(20, 37, width, 5, torch.float32, itself=True),
        )


def test_last_program_adds_many_partial_sums() -> None:
    chosen = {"ROWS": 1, "BLOCK_P": 16, "num_warps": 4, "num_stages": 1}
    with override_config("contrast_finish", chosen):
        inputs = quadruplet(9, 1, 0, 5, "style", torch.float64)
        require(quadruplet_contrast, quadruplet_contrast_reference, inputs)


@pytest.mark.parametrize("value", [-8.0, 4.7, 2.0])
def test_scale_is_clamped_at_both_ends(value: float) -> None:
    for dtype in (torch.float64, torch.float16):
        inputs = quadruplet(3, 1, 0, 6, "content", dtype) | {"log_scale": log_scale(dtype, value)}
        require(quadruplet_contrast, quadruplet_contrast_reference, inputs)


def test_zero_vectors_and_large_ones_stay_finite() -> None:
    inputs = quadruplet(3, 1, 0, 6, "style", torch.float64)
    queries, keys = inputs["queries"].detach().clone(), inputs["keys"].clone()
    keys[1], keys[5] = 0.0, keys[5] * 1e-6
    half = {"queries": (1e4 * queries).half().requires_grad_(), "keys": (1e4 * keys).half()}
    half["keys"][5] = (keys[5] * 0.1).half()  # subnormal
    require(
        quadruplet_contrast,
        quadruplet_contrast_reference,
        inputs | half | {"log_scale": log_scale(torch.float16)},
    )
    queries[0] = queries[7] = 0.0
    require(
        quadruplet_contrast,
        quadruplet_contrast_reference,
        inputs | {"queries": queries.requires_grad_(), "keys": keys},
    )


def test_no_positive_anywhere_gives_zero() -> None:
    inputs = labelled(3, 5, 4, 1, torch.float32, itself=False) | {"query_labels": torch.full((3,), 7)}
    loss = supervised_contrast(**inputs)
    assert loss.item() == 0
    gradients = torch.autograd.grad(loss, [inputs["queries"], inputs["log_scale"]])
    assert all((item == 0).all() for item in gradients)
    alone = labelled(1, 1, 4, 1, torch.float32, itself=True)
    require(supervised_contrast, supervised_contrast_reference, alone)


def test_gradients_that_nobody_wants_are_not_computed() -> None:
    inputs = quadruplet(3, 1, 0, 6, "content", torch.float64)
    for name in ("queries", "log_scale"):
        require(quadruplet_contrast, quadruplet_contrast_reference, inputs | {name: inputs[name].detach()})
    keys = inputs["keys"].clone().requires_grad_()
    quadruplet_contrast(**(inputs | {"keys": keys})).backward()
    assert keys.grad is None
    with torch.no_grad():
        require(quadruplet_contrast, quadruplet_contrast_reference, inputs)


def test_mixed_dtypes_compute_in_the_wider() -> None:
    inputs = quadruplet(3, 2, 1, 6, "content", torch.float32)
    require(quadruplet_contrast, quadruplet_contrast_reference, inputs | {"keys": inputs["keys"].bfloat16()})
    scale = torch.tensor([2.0], requires_grad=True)  # one element
    require(quadruplet_contrast, quadruplet_contrast_reference, inputs | {"log_scale": scale})


def test_gradcheck_and_opcheck() -> None:
    inputs = quadruplet(1, 2, 1, 3, "style", torch.float64)
    tensors = inputs["queries"].detach().contiguous().requires_grad_(), inputs["log_scale"]
    style = contrast.IDENTITIES.index("style")

    def run(queries: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return contrast._contrast(queries, inputs["keys"], scale, None, None, None, style, 1, True, True)[0]

    assert torch.autograd.gradcheck(run, tensors)
    arguments = (tensors[0], inputs["keys"], tensors[1])
    torch.library.opcheck(contrast._contrast, (*arguments, None, None, None, style, 1, True, True))
    labels = torch.arange(4) % 3, torch.arange(8) % 4, torch.arange(4)
    torch.library.opcheck(contrast._contrast, (*arguments, *labels, contrast.LABELS, 0, True, True))


def test_compiles_as_one_graph() -> None:
    inputs = quadruplet(3, 2, 1, 5, "content", torch.float32)
    require(torch.compile(quadruplet_contrast, fullgraph=True), quadruplet_contrast_reference, inputs)
    labels = labelled(6, 9, 5, 3, torch.float32, itself=True)
    require(torch.compile(supervised_contrast, fullgraph=True), supervised_contrast_reference, labels)


def test_offsets_beyond_31_bits() -> None:
    # Views whose rows lie 2^29 elements apart touch little of the memory that they span.
    storage = torch.UntypedStorage(2 * (8 * 2**29 + 8))
    views = []
    for offset in (0, 8):
        base = torch.tensor([], dtype=torch.float16).set_(storage, offset, (8, 8), (2**29, 1))  # type: ignore[call-overload]
        views.append(base.copy_(torch.randn(8, 8)))
    inputs = quadruplet(2, 1, 0, 8, "content", torch.float16)
    inputs |= {"queries": views[0].requires_grad_(), "keys": views[1]}
    require(quadruplet_contrast, quadruplet_contrast_reference, inputs)
