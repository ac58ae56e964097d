"""Tables of factors: what is in them, how they are written and read, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from meduet_fast.data.store import LatentStore
from meduet_fast.encoding import encode_latents
from meduet_fast.errors import UserError
from meduet_fast.files import file_sha256
from meduet_fast.probing import StyleStatistics, restyle_region
from meduet_fast.synthesis import factors as factors_module
from meduet_fast.synthesis.factors import FactorsConfig, FactorTable, choose_donors, write_factors

from .material import PATCH_4, network, write_run, write_store

Make = Callable[..., FactorTable]


@pytest.fixture(autouse=True)
def _one_thread(one_thread: None) -> None:
    """Every test here."""


@pytest.fixture
def store(tmp_path: Path) -> LatentStore:
    return write_store(tmp_path / "store")


@pytest.fixture
def run(tmp_path: Path, store: LatentStore) -> Path:
    return write_run(tmp_path / "run", store.path)


@pytest.fixture
def make(tmp_path: Path, store: LatentStore, run: Path) -> Make:
    """``make(window=6)`` gives an open table."""

    def write(**settings: Any) -> FactorTable:
        config = FactorsConfig(**{"device": "cpu", "batch_size": 32, **settings})
        write_factors(run, store.path, tmp_path / "table.safetensors", config)
        return FactorTable.open(tmp_path / "table.safetensors")

    return write


def encoded(store: LatentStore, index: int, stride: int | None = None) -> tuple[Tensor, Tensor]:
    maps = encode_latents(network(), store.read_volume(index), stride)
    return maps.content, maps.style


def test_a_window_has_the_mean_of_its_tokens(store: LatentStore, make: Make) -> None:
    """Boxes, on the grid of patches, which lie in the middle of a volume; the last ends with the patches."""
    table = make(window=(6, 4, 2), stride=2, batch_size=3)
    assert table.window == (6, 4, 2)
    assert (table.tokens, table.exchanged, table.patch, table.tokenizer) == (False, 0, 2, "fake-1")
    row = 0
    for index, entry in enumerate(store.entries):
        content, style = encoded(store, index)
        for x, y, z in product(range(0, 9, 2), range(0, 5, 2), range(0, 8, 2)):
            if x + 6 > entry.grid[0] or z + 2 > entry.grid[2]:
                continue  # in a volume that is larger
            assert table.start[row].tolist() == [x, y, z]
            assert int(table.volume[row]) == index
            box = (slice(x // 2, x // 2 + 3), slice(y // 2, y // 2 + 2), slice(z // 2, z // 2 + 1))
            torch.testing.assert_close(table.content[row], content[box].mean((0, 1, 2)))
            torch.testing.assert_close(table.style[row], style[box].mean((0, 1, 2)))
            row += 1
    assert row == len(table.content) == len(table.style) == len(table.volume) == len(table.start)


def test_windows_begin_with_the_first_patch(tmp_path: Path) -> None:
    store = write_store(tmp_path / "store", {"a": ("a", (11, 10, 8))})
    run, model = write_run(tmp_path / "run", store.path, config=PATCH_4), network(PATCH_4)
    write_factors(run, store.path, tmp_path / "table", FactorsConfig(device="cpu", tokens=True))
    table = FactorTable.open(tmp_path / "table")
    assert table.window == (8, 8, 8)
    assert table.volumes[0]["first"] == (1, 1, 0)
    assert table.start.tolist() == [[1, 1, 0]]
    content = model(store.read_volume(0)[None, :, 1:9, 1:9].float()).content[0]  # (L, D)
    torch.testing.assert_close(table.content[0], content.mean(0))
    assert table.content_map(0, (1, 5, 4), (8, 4, 4)).shape == (2, 1, 1, 12)


def test_a_crop_of_the_network_has_the_mean_that_it_gives(store: LatentStore, make: Make) -> None:
    """Windows of the network's own that do not overlap."""
    table = make(stride=4, encode_stride=4)
    assert table.window == (4, 4, 4)
    model = network()
    row = torch.nonzero((table.volume == 0) & (table.start == torch.tensor([4, 0, 4])).all(1)).item()
    factors = model(store.read_volume(0)[None, :, 4:8, :4, 4:8].float())
    torch.testing.assert_close(table.content[row], factors.content[0].mean(0))
    torch.testing.assert_close(table.style[row], factors.style[0].mean(0))


def test_statistics_are_those_of_windows_tokens_and_voxels(store: LatentStore, make: Make) -> None:
    table = make(window=6, stride=2)
    maps = [encoded(store, index) for index in range(len(store.entries))]
    content, style = (torch.cat([item[kind].flatten(0, 2) for item in maps]) for kind in (0, 1))
    latents = torch.cat([store.read_volume(index).float().flatten(1) for index in range(4)], 1).T
    for found, values in (
        ((table.content_mean, table.content_deviation), table.content),
        ((table.style_mean, table.style_deviation), table.style),
        ((table.token_mean, table.token_deviation), content),
        ((table.style_token_mean, table.style_token_deviation), style),
        ((table.latents_mean, table.latents_deviation), latents),
    ):
        torch.testing.assert_close(found[0], values.mean(0), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(found[1], values.std(0, correction=0), rtol=1e-4, atol=1e-6)


def test_a_single_window_has_no_deviation_but_can_be_divided_by_it(tmp_path: Path) -> None:
    store = write_store(tmp_path / "store", {"a": ("a", (4, 4, 4))})
    run = write_run(tmp_path / "run", store.path)
    summary = write_factors(run, store.path, tmp_path / "table", FactorsConfig(device="cpu"))
    assert str(summary).startswith(f"{tmp_path / 'table'}: 1 windows of 4x4x4 latent voxels, of 1 volume\n")
    table = FactorTable.open(tmp_path / "table")
    assert torch.allclose(table.content_deviation, torch.tensor(1e-6))
    assert torch.equal(table.volume_factors()[0], table.content)


def test_a_volumes_factors_are_the_means_over_its_windows(make: Make) -> None:
    table = make(window=6, stride=4)
    content, style = table.volume_factors()
    assert len(content) == len(style) == 4
    for index in range(4):
        own = table.volume == index
        torch.testing.assert_close(content[index], table.content[own].mean(0))
        torch.testing.assert_close(style[index], table.style[own].mean(0))


def test_a_table_tells_where_it_comes_from(store: LatentStore, run: Path, make: Make) -> None:
    table = make(window=6, tokens=True, exchanged=1)
    weights = run / "checkpoints" / "12" / "teacher.safetensors"
    assert table.encoder == {
        "weights": str(weights), "weights_sha256": file_sha256(weights), "step": 12, "crop": 4, "stride": 2,
    }  # fmt: skip
    donors = choose_donors(store, 1, 0)
    for index, (entry, record) in enumerate(zip(store.entries, table.volumes, strict=True)):
        assert record == {
            "name": entry.name, "domain": entry.domain, "body_part": "chest", "shape": entry.shape,
            "content_key": entry.content_key, "spacing": [1.5, 1.5, 1.5], "first": (0, 0, 0),
            "donors": [store.entries[donors[index][0]].name],
        }  # fmt: skip


def test_maps_are_read_by_boxes(store: LatentStore, make: Make) -> None:
    table = make(window=6, tokens=True)
    for index in range(4):
        content, style = (tokens.bfloat16().float() for tokens in encoded(store, index))
        box = (slice(1, 4), slice(0, 2), slice(1, 2))
        assert torch.equal(table.content_map(index, (2, 0, 2), (6, 4, 2)), content[box])
        assert torch.equal(table.style_map(index, (2, 0, 2), (6, 4, 2)), style[box])
        whole = [edge // 2 * 2 for edge in store.entries[index].grid]
        assert torch.equal(table.content_map(index, (0, 0, 0), whole), content)
    for start, size in (
        ((1, 0, 0), (6, 4, 2)),
        ((0, 0, 0), (5, 4, 2)),
        ((8, 0, 0), (6, 4, 2)),
        ((-2, 0, 0), (2, 2, 2)),
    ):
        with pytest.raises(ValueError, match="is not on the patches of a0, of 2 from"):
            table.content_map(0, start, size)
    with pytest.raises(UserError, match="no exchanged style 0, the table has 0"):
        table.content_map(0, (0, 0, 0), (2, 2, 2), exchanged=0)
    with pytest.raises(UserError, match="a table without tokens; make one with `factors --tokens true`"):
        make(window=6).content_map(0, (0, 0, 0), (2, 2, 2))


@pytest.mark.parametrize("lambda_whole", [0.0, 1.0])
def test_exchanged_maps_are_in_the_style_of_their_donors(
    tmp_path: Path, store: LatentStore, lambda_whole: float
) -> None:
    run = write_run(tmp_path / "other", store.path, lambda_whole)
    config = FactorsConfig(tokens=True, exchanged=2, device="cpu", seed=3)
    write_factors(run, store.path, tmp_path / "table", config)
    table = FactorTable.open(tmp_path / "table")
    assert table.exchanged == 2
    statistics = [StyleStatistics.of(encoded(store, index)[1].flatten(0, 2)) for index in range(4)]
    names = [entry.name for entry in store.entries]
    for index in (0, 2):
        maps = [table.content_map(index, (0, 0, 0), (12, 8, 8))]
        for number, name in enumerate(table.volumes[index]["donors"]):
            donor = names.index(name)
            assert store.entries[donor].domain != store.entries[index].domain
            restyled = restyle_region(
                network(), store.read_volume(index), store.read_volume(donor), statistics[index],
                statistics[donor], whole=bool(lambda_whole),
            ).result.by_statistics  # fmt: skip
            box = (12, 8, 8)
            latents = table.exchanged_latents(index, (1, 0, 2), box, number)
            close = {"rtol": 0.02, "atol": 0.01}
            torch.testing.assert_close(latents.float(), restyled[:, 1:13, :8, 2:10], **close)
            expected = encode_latents(network(), restyled)
            style = table.style_map(index, (0, 0, 0), box, number)
            torch.testing.assert_close(style, expected.style[:6, :4, :4], **close)
            found = table.content_map(index, (0, 0, 0), box, number)
            torch.testing.assert_close(found, expected.content[:6, :4, :4], **close)
            assert all(not torch.allclose(found, other, atol=0.05) for other in maps)
            maps.append(found)


def test_donors_are_of_as_many_domains_as_can_be(tmp_path: Path) -> None:
    volumes = {f"{domain}{number}": (domain, (4, 4, 4)) for domain in "abc" for number in range(3)}
    store = write_store(tmp_path / "store", volumes)
    domains = [entry.domain for entry in store.entries]
    for seed in range(5):
        for index, donors in enumerate(choose_donors(store, 4, seed)):
            assert len(set(donors)) == 4
            others = sorted({*"abc"} - {domains[index]})
            assert (
                {domains[donor] for donor in donors[:2]}
                == {domains[donor] for donor in donors[2:]}
                == {*others}
            )
    assert choose_donors(store, 4, 1) == choose_donors(store, 4, 1) != choose_donors(store, 4, 2)
    assert choose_donors(store, 6, 1)
    with pytest.raises(
        UserError, match=r"exchanged: found 7, .*store has 6 volumes of other domains than a0's"
    ):
        choose_donors(store, 7, 1)


def test_a_table_is_the_same_each_time(tmp_path: Path, make: Make) -> None:
    first = make(window=6, tokens=True, exchanged=2)
    content = first.path.read_bytes()
    again = make(window=6, tokens=True, exchanged=2)
    assert again.path.read_bytes() == content
    assert again.identity == first.identity
    assert make(window=6, tokens=True, exchanged=2, seed=1).identity != first.identity
    assert make(window=6, tokens=True, exchanged=1).identity != first.identity


@pytest.mark.parametrize("stopped_at", ["encode_latents", "restyle_region_by_statistics"])
def test_a_table_is_written_whole_or_not_at_all(
    tmp_path: Path, make: Make, stopped_at: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "table.safetensors").write_text("what was there")
    before = {path.name for path in tmp_path.iterdir()}
    original, calls = getattr(factors_module, stopped_at), []

    def stop(*arguments: Any) -> Any:
        calls.append(arguments)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(*arguments)

    monkeypatch.setattr(factors_module, stopped_at, stop)
    with pytest.raises(KeyboardInterrupt):
        make(tokens=True, exchanged=1)
    assert {path.name for path in tmp_path.iterdir()} == before
    assert (tmp_path / "table.safetensors").read_text() == "what was there"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"window": 5}, "window: found 5, expected multiples of the network's patch size, 2"),
        ({"window": (4, 4, 3)}, r"window: found \(4, 4, 3\), expected multiples of the network's patch"),
        (
            {"window": (4, 4, 0)},
            r"window: found \(4, 4, 0\), expected 1 or more",
        ),
        (
            {"window": 6, "stride": 3},
            "stride: found 3, expected a multiple of the network's patch size, 2, up to",
        ),
        ({"window": (8, 6, 4), "stride": 6}, "stride: found 6, expected .* up to a window's edge, 4"),
        ({"encode_stride": 6}, "stride: found 6, expected .* up to its crop size, 4"),
        ({"exchanged": 1}, "exchanged: found 1, expected 0 without tokens"),
        ({"exchanged": 3, "tokens": True}, "exchanged: found 3, .* has 2 volumes of other domains than a0's"),
        ({"exchanged": -1}, "exchanged: found -1, expected 0 or more"),
        ({"batch_size": 0}, "batch_size: found 0, expected 1 or more"),
        (
            {"window": 8},
            r"smaller than \(8, 8, 8\) latent voxels, a window and the network's crop: c0 \(12, 8, 6\)$",
        ),
    ],
)
def test_bad_settings_are_named(make: Make, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make(**settings)


def test_a_volume_smaller_than_the_networks_crop_is_named(tmp_path: Path, run: Path) -> None:
    store = write_store(
        tmp_path / "small", {"a": ("a", (4, 4, 4)), "b": ("a", (3, 4, 4)), "c": ("b", (4, 2, 4))}
    )
    with pytest.raises(UserError, match=r"a window and the network's crop: b \(3, 4, 4\), c \(4, 2, 4\)$"):
        write_factors(run, store.path, tmp_path / "table", FactorsConfig(window=2))
    with pytest.raises(UserError, match="no volumes, expected one or more"):
        write_factors(run, write_store(tmp_path / "none", {}).path, tmp_path / "table")


def test_a_store_of_another_tokenizer_is_refused(
    tmp_path: Path, store: LatentStore, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = write_store(tmp_path / "other", tokenizer="fake-2")
    with pytest.raises(
        UserError, match=r"other: latents of tokenizer fake-2, .* latents of fake-1 \(.*store\)"
    ):
        write_factors(run, other.path, tmp_path / "table")
    assert "warning" not in capsys.readouterr().err
    for name, why in (("reference-cache", "was imported"), (None, "its store is not known")):
        shutil.rmtree(store.path)
        if name:
            write_store(store.path, tokenizer=name)
        write_factors(run, other.path, tmp_path / "table", FactorsConfig(device="cpu"))
        error = capsys.readouterr().err
        assert why in error
        assert "if it was not fake-2, the factors mean nothing" in error


def test_factors_that_are_not_finite_are_named(tmp_path: Path, store: LatentStore, run: Path) -> None:
    model = network()
    model.embed_layer.proj.weight.mul_(3e38)  # finite itself
    weights = tmp_path / "weights.safetensors"
    model.save_pretrained(weights)
    with pytest.raises(UserError, match="store: a0: its factors are not finite"):
        write_factors(weights, store.path, tmp_path / "table", FactorsConfig(device="cpu"))
    assert not (tmp_path / "table").exists()


def damage(path: Path, how: str) -> None:
    content = path.read_bytes()
    if how == "cut":
        path.write_bytes(content[:-10])
    elif how == "text":
        path.write_text("no table")
    elif how == "gone":
        path.unlink()
    elif how == "weights":
        save_file({"content": torch.zeros(2)}, path)
    else:
        tensors, length = load_file(path), int.from_bytes(content[:8], "little")
        metadata = json.loads(content[8 : 8 + length])["__metadata__"]
        if how == "no window":
            del metadata["window"]
        elif how == "bad volumes":
            metadata["volumes"] = "[1]"
        elif how == "a map less":
            del tensors["style/b0"]
        elif how == "another shape":
            tensors["start"] = tensors["start"][:-1].clone()
        save_file(tensors, path, metadata)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("cut", "a damaged or cut-off safetensors file"),
        ("text", "a damaged or cut-off safetensors file"),
        ("gone", "can't be read: "),
        ("weights", "not a table of factors as this version makes them; make one with `meduet-fast factors`"),
        ("no window", "damaged: KeyError.'window'. in what the table says of itself"),
        ("bad volumes", "damaged: TypeError"),
        ("a map less", r"damaged: style/b0: found nothing, expected \(7, 4, 4, 3\)"),
        ("another shape", r"damaged: start: found \(\d+, 3\), expected \(\d+, 3\)"),
    ],
)
def test_a_damaged_table_is_refused_in_one_line(make: Make, how: str, message: str) -> None:
    path = make(window=6, tokens=True).path
    damage(path, how)
    with pytest.raises(UserError, match=f"table.safetensors: {message}") as error:
        FactorTable.open(path)
    assert "\n" not in str(error.value)


def test_little_of_a_table_is_read(make: Make) -> None:
    """Windows and maps are mapped: what is not touched takes no memory, and writing changes no file."""
    table = make(window=6, tokens=True)
    before = table.path.read_bytes()
    assert isinstance(table._file.array("content/a0"), np.memmap)
    table.content.zero_()
    assert table.path.read_bytes() == before
    assert FactorTable.open(table.path).content.any()
