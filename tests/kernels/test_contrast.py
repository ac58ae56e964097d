"""The contrasts in plain PyTorch: chunks against the definition, gathered keys, edges, memory, refusals."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from torch import Tensor

from meduet_fast.kernels import (
    contrast,
    quadruplet_contrast,
    quadruplet_identities,
    supervised_contrast,
)
from meduet_fast.kernels.contrast import (
    Identity,
    quadruplet_contrast_reference,
    quadruplet_indices,
    supervised_contrast_reference,
)
from meduet_fast.kernels.verify import require

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "golden" / "meduet_reference_tiny.safetensors"
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
IDENTITIES: tuple[Identity, ...] = ("content", "style")


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything of more than four logits goes in chunks of sixteen rows."""
    monkeypatch.setattr(contrast, "CPU_LOGITS", 4)


def quadruplet(
    batch: int, ranks: int, rank: int, width: int, identity: Identity, dtype: torch.dtype, seed: int = 0
) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    rows = 4 * batch
    scale_dtype = dtype if dtype == torch.float64 else torch.float32
    return {
        "queries": torch.randn(rows, width, generator=generator).to(dtype).requires_grad_(),
        "keys": torch.randn(rows * ranks, width, generator=generator).to(dtype),
        "log_scale": torch.tensor(2.5, dtype=scale_dtype, requires_grad=True),
        "identity": identity,
        "key_offset": rank * batch,
    }


# In one dimension the gradient is zero but for rounding; in few rows PyTorch's own error may be nil by luck.
@pytest.mark.usefixtures("small_chunks")
@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 12), st.integers(1, 4), st.integers(0, 3), st.integers(2, 40),
    st.sampled_from(IDENTITIES), st.sampled_from(DTYPES), st.integers(0, 1000),
)  # fmt: skip
def test_chunks_of_quadruplets(
    batch: int, ranks: int, rank: int, width: int, identity: Identity, dtype: torch.dtype, seed: int
) -> None:
    inputs = quadruplet(batch, ranks, rank % ranks, width, identity, dtype, seed)
    require(quadruplet_contrast, quadruplet_contrast_reference, inputs, seed)


@pytest.mark.usefixtures("small_chunks")
@settings(max_examples=40, deadline=None)
@given(
    st.integers(4, 40), st.integers(1, 50), st.integers(2, 20), st.sampled_from(DTYPES), st.booleans(),
    st.integers(0, 1000),
)  # fmt: skip
def test_chunks_of_labels(
    rows: int, key_rows: int, width: int, dtype: torch.dtype, itself: bool, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    scale_dtype = dtype if dtype == torch.float64 else torch.float32
    inputs = {
        "queries": torch.randn(rows, width, generator=generator).to(dtype).requires_grad_(),
        "keys": torch.randn(key_rows, width, generator=generator).to(dtype),
        "query_labels": torch.randint(6, (rows,), generator=generator),
        "key_labels": torch.randint(5, (key_rows,), generator=generator),
        "log_scale": torch.tensor(2.5, dtype=scale_dtype, requires_grad=True),
        "self_index": torch.randint(key_rows, (rows,), generator=generator) if itself else None,
    }
    require(supervised_contrast, supervised_contrast_reference, inputs, seed)


@pytest.mark.parametrize("batch", [1, 2, 5, 8])
@pytest.mark.parametrize("identity", IDENTITIES)
def test_positives_in_closed_form(batch: int, identity: Identity) -> None:
    itself, positives = quadruplet_indices(batch, batch, identity, 0, torch.device("cpu"))
    assert torch.equal(itself, torch.arange(4 * batch))
    labels = quadruplet_identities(batch, identity)
    for row in range(4 * batch):
        expected = {other for other in range(4 * batch) if labels[other] == labels[row] and other != row}
        assert set(positives[row].tolist()) == expected


@pytest.mark.parametrize("batch", [1, 3, 4])
@pytest.mark.parametrize("identity", IDENTITIES)
def test_three_ranks_equal_their_rows_of_the_global_batch(batch: int, identity: Identity) -> None:
    generator = torch.Generator().manual_seed(batch)
    ranks = 3
    # (block, rank, row, width): gathering puts every rank's rows behind each other within a block.
    keys, queries = (torch.randn(4, ranks, batch, 7, generator=generator).double() for _ in range(2))
    log_scale = torch.tensor(2.0, dtype=torch.float64)
    gathered = keys.flatten(0, 2)
    key_labels = torch.empty(4, ranks, batch, dtype=torch.int64)
    for rank in range(ranks):
        key_labels[:, rank] = 100 * rank + quadruplet_identities(batch, identity).view(4, batch)
    rows = torch.arange(4 * ranks * batch).view(4, ranks, batch)
    losses = []
    for rank in range(ranks):
        mine = queries[:, rank].flatten(0, 1).requires_grad_()
        again = mine.detach().clone().requires_grad_()
        loss = quadruplet_contrast(mine, gathered, log_scale, identity, rank * batch)
        expected = supervised_contrast(
            again,
            gathered,
            key_labels[:, rank].flatten(),
            key_labels.flatten(),
            log_scale,
            rows[:, rank].flatten(),
        )
        torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
        torch.testing.assert_close(*torch.autograd.grad(loss + expected, (mine, again)))
        losses.append(loss)
    everything = supervised_contrast(
        queries.flatten(0, 2), gathered, key_labels.flatten(), key_labels.flatten(), log_scale, rows.flatten()
    )
    torch.testing.assert_close(torch.stack(losses).mean(), everything)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("case", [0, 1, 2])
@pytest.mark.parametrize("identity", IDENTITIES)
def test_chunks_against_the_published_code(case: int, identity: Identity) -> None:
    with safe_open(GOLDEN, "pt") as file:
        golden = {
            name: file.get_tensor(f"contrast{case}/{name}")
            for name in ("q", "k", *(f"{identity}_{kind}" for kind in ("loss", "grad_q", "grad_logit_scale")))
        }
    query = golden["q"].requires_grad_()
    log_scale = torch.tensor(1 / 0.07).log().requires_grad_()
    loss = quadruplet_contrast(query, golden["k"], log_scale, identity)
    loss.backward()
    for found, name in ((loss, "loss"), (query.grad, "grad_q"), (log_scale.grad, "grad_logit_scale")):
        expected = golden[f"{identity}_{name}"]
        assert found is not None
        assert (found.detach() - expected).norm() / expected.norm() < 1e-4, name


@pytest.mark.usefixtures("small_chunks")
def test_chunks_at_the_edges() -> None:
    for value in (-8.0, 4.7):  # beyond both ends of the scale
        inputs = quadruplet(5, 1, 0, 6, "content", torch.float64)
        scale = torch.tensor(value, dtype=torch.float64, requires_grad=True)
        require(quadruplet_contrast, quadruplet_contrast_reference, inputs | {"log_scale": scale})
    queries, keys = inputs["queries"].detach().clone(), inputs["keys"].clone()
    queries[3] = keys[4] = keys[9] = 0.0
    zeros = inputs | {"queries": queries.requires_grad_(), "keys": keys}
    require(quadruplet_contrast, quadruplet_contrast_reference, zeros)
    large = quadruplet(5, 1, 0, 6, "style", torch.float16)
    for name in ("queries", "keys"):
        large[name] = (1e4 * large[name].detach()).requires_grad_(name == "queries")
    scale = torch.tensor(4.6, requires_grad=True)
    require(quadruplet_contrast, quadruplet_contrast_reference, large | {"log_scale": scale})
    with torch.autocast("cpu", torch.bfloat16):
        require(quadruplet_contrast, quadruplet_contrast_reference, inputs)


@pytest.mark.usefixtures("small_chunks")
def test_chunks_pass_gradcheck_and_opcheck_and_compile() -> None:
    inputs = quadruplet(5, 2, 1, 3, "style", torch.float64)
    queries, keys, log_scale = inputs["queries"], inputs["keys"], inputs["log_scale"]
    assert torch.autograd.gradcheck(
        lambda q, s: quadruplet_contrast(q, keys, s, "style", 5), (queries, log_scale)
    )
    style = contrast.IDENTITIES.index("style")
    torch.library.opcheck(
        contrast._contrast, (queries, keys, log_scale, None, None, None, style, 5, True, False)
    )
    require(torch.compile(quadruplet_contrast, fullgraph=True), quadruplet_contrast_reference, inputs)
    for name in ("queries", "log_scale"):
        require(quadruplet_contrast, quadruplet_contrast_reference, inputs | {name: inputs[name].detach()})


def test_rows_without_positives_are_not_counted() -> None:
    queries, keys = torch.randn(3, 4, dtype=torch.float64), torch.randn(5, 4, dtype=torch.float64)
    key_labels, log_scale = torch.tensor([0, 0, 1, 1, 1]), torch.tensor(1.0)
    both = supervised_contrast(queries, keys, torch.tensor([0, 9, 1]), key_labels, log_scale)
    without = supervised_contrast(queries[[0, 2]], keys, torch.tensor([0, 1]), key_labels, log_scale)
    torch.testing.assert_close(both, without)
    none = supervised_contrast(queries, keys, torch.full((3,), 9), key_labels, log_scale)
    assert none.item() == 0
    # The only key of its label, left out as itself: no positive either.
    alone = supervised_contrast(
        queries[:1], keys[:1], torch.tensor([0]), key_labels[:1], log_scale, torch.tensor([0])
    )
    assert alone.item() == 0


@pytest.mark.slow
def test_memory_grows_with_rows_and_not_with_their_square() -> None:
    command = [sys.executable, "-m", "benchmarks.bench_contrast_memory", "--only", "ours"]
    done = subprocess.run(
        [*command, "--rows", "16384", "--width", "256"], check=True, capture_output=True, text=True, cwd=ROOT
    )
    assert json.loads(done.stdout)["bytes"] < 400e6


def test_refusals_name_the_argument() -> None:
    scale, queries, labels = torch.zeros(()), torch.zeros(8, 3), torch.zeros(8, dtype=torch.int64)

    def quadruplets(
        queries: Tensor, keys: Tensor, scale: Tensor = scale, identity: str = "style", offset: int = 0
    ) -> None:
        quadruplet_contrast(queries, keys, scale, identity, offset)  # type: ignore[arg-type]

    with pytest.raises(ValueError, match=r"queries has shape \(8, 3\) and keys \(8, 4\)"):
        quadruplets(queries, torch.zeros(8, 4))
    with pytest.raises(ValueError, match=r"queries has shape \(6, 3\)"):
        quadruplets(torch.zeros(6, 3), torch.zeros(6, 3))
    with pytest.raises(ValueError, match=r"keys \(12, 3\), expected both"):
        quadruplets(queries, torch.zeros(12, 3))
    with pytest.raises(ValueError, match="key_offset is 1, expected a multiple of 2 from 0 to 2"):
        quadruplets(queries, torch.zeros(16, 3), offset=1)
    with pytest.raises(ValueError, match="key_offset is 4, expected a multiple of 2 from 0 to 2"):
        quadruplets(queries, torch.zeros(16, 3), offset=4)
    with pytest.raises(ValueError, match="key_offset is -2"):
        quadruplets(queries, torch.zeros(16, 3), offset=-2)
    with pytest.raises(ValueError, match="identity is 'organ'"):
        quadruplets(queries, queries, identity="organ")
    with pytest.raises(ValueError, match=r"log_scale has shape \(2,\), expected a scalar"):
        quadruplets(queries, queries, torch.zeros(2))
    with pytest.raises(ValueError, match=r"key_labels is torch\.float32 of shape"):
        supervised_contrast(queries, queries, labels, labels.float(), scale)
    with pytest.raises(ValueError, match=r"query_labels is torch\.int64 of shape \(7,\)"):
        supervised_contrast(queries, queries, labels[:7], labels, scale)
    with pytest.raises(ValueError, match=r"self_index is torch\.int64 of shape \(7,\)"):
        supervised_contrast(queries, queries, labels, labels, scale, labels[:7])
    with pytest.raises(ValueError, match="keys has no rows"):
        supervised_contrast(queries, queries[:0], labels, labels[:0], scale)


@pytest.mark.usefixtures("small_chunks")
def test_chunks_have_all_derivatives_of_the_definition() -> None:
    generator = torch.Generator().manual_seed(0)
    queries, keys, tangent = (torch.randn(16, 3, generator=generator, dtype=torch.float64) for _ in range(3))
    scale = torch.tensor(1.0, dtype=torch.float64).requires_grad_()

    def second(function: Callable[..., Tensor]) -> list[Tensor]:
        values = (queries.clone().requires_grad_(), scale)
        first = torch.autograd.grad(function(values[0], keys, scale, "style"), values, create_graph=True)
        total = first[0].square().sum() + first[1].square()
        along = torch.func.jvp(lambda q: function(q, keys, scale, "style"), (queries,), (tangent,))[1]
        return [*first, *torch.autograd.grad(total, values), along]

    found, expected = second(quadruplet_contrast), second(contrast.quadruplet_contrast_reference)
    for value, true in zip(found, expected, strict=True):
        assert true.any()
        assert torch.allclose(value, true, atol=1e-12)
