"""A pipeline: saved and reloaded, sampled in any batch, in windows, from any source; bad input is told."""

from __future__ import annotations

import socket
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from nibabel.nifti1 import Nifti1Image
from nibabel.nifti1 import save as save_nifti
from torch import Tensor

from meduet_fast.autoencoder import load_tokenizer
from meduet_fast.data.sources import find_volumes
from meduet_fast.data.store import LatentStore
from meduet_fast.data.transforms import load_volume
from meduet_fast.encoding import Encoder
from meduet_fast.errors import UserError
from meduet_fast.synthesis.components import MeDUETAutoencoder, MeDUETEncoder, MeDUETFactors
from meduet_fast.synthesis.factors import FactorTable
from meduet_fast.synthesis.pipeline import MeDUETPipeline
from meduet_fast.synthesis.samplers import build_scheduler
from meduet_fast.synthesis.sources import Sources

from .pipelines import make_network, make_parts, make_pipeline, make_run


@pytest.fixture(autouse=True)
def _one_thread(one_thread: None) -> None:
    """Every test here."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("pipeline")


@pytest.fixture(scope="module")
def parts(folder: Path) -> dict[str, Any]:
    return make_parts(folder)


@pytest.fixture(scope="module")
def pipeline(parts: dict[str, Any]) -> MeDUETPipeline:
    return make_pipeline(parts)


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> NoReturn:
        raise AssertionError("the network was sought")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture(scope="module")
def scan(folder: Path) -> Path:
    """A scan in LPS order, 3 mm along z."""
    path = folder / "scan.nii.gz"
    voxels = np.random.default_rng(0).uniform(-170, 240, (48, 40, 24)).astype(np.float32)
    save_nifti(Nifti1Image(voxels, np.diag([-1.5, -1.5, 3.0, 1.0])), path)
    return path


class Spy(torch.nn.Module):
    """In the place of a network: remembers what it was told, and predicts nothing but zeros."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.config, self.told = network.config, list[tuple[Tensor, ...]]()

    def forward(self, *told: Tensor) -> Tensor:
        self.told.append(told)
        return torch.zeros_like(told[0])


def spied(pipeline: MeDUETPipeline, monkeypatch: pytest.MonkeyPatch) -> Spy:
    spy = Spy(pipeline.network)
    monkeypatch.setattr(MeDUETPipeline, "network", spy)
    return spy


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("tokens", [False, True])
def test_a_pipeline_comes_back_bit_by_bit(tokens: bool, parts: dict[str, Any], tmp_path: Path) -> None:
    pipeline = make_pipeline(parts, content="tokens" if tokens else "pooled")
    pipeline.save_pretrained(tmp_path / "saved", tokens=tokens)
    again = MeDUETPipeline.from_pretrained(tmp_path / "saved")
    asked = {"seeds": [3], "steps": 3, "content_scale": 2.0, "style_scale": 1.5}
    [one], [other] = (made("ct_a@2,0,0", "mr", **asked) for made in (pipeline, again))
    assert torch.equal(one.latents, other.latents)
    assert np.array_equal(pipeline.decode(one.latents), again.decode(other.latents))
    assert (one.record, one.affine.tolist()) == (other.record, other.affine.tolist())
    assert {path.name for path in (tmp_path / "saved").iterdir()} == {
        "model_index.json", "transformer", "scheduler", "vae", "encoder", "factors",
    }  # fmt: skip
    assert (tmp_path / "saved" / "factors" / "table.safetensors").is_file() == tokens
    if tokens:
        assert again.factors.table_file() == tmp_path / "saved" / "factors" / "table.safetensors"
    with pytest.raises(UserError, match="is there already: expected a new or empty folder"):
        pipeline.save_pretrained(tmp_path / "saved")


@pytest.mark.usefixtures("offline")
def test_a_run_becomes_a_pipeline(parts: dict[str, Any], folder: Path) -> None:
    run = make_run(folder, make_network())
    made = MeDUETPipeline.from_run(run)
    [one], [other] = (p("ct_b", "ct", seeds=[1], steps=2) for p in (made, make_pipeline(parts)))
    assert torch.equal(one.latents, other.latents)
    assert made.about()["network"]["weights"] == str(run / "checkpoints" / "7" / "power_0.100.safetensors")
    assert made.about()["encoder"]["weights"] == str(folder / "encoder.safetensors")
    with pytest.raises(UserError, match=r"average: found best, expected one of .*7: network, power_0.100"):
        MeDUETPipeline.from_run(run, "best")


def test_samples_do_not_depend_on_their_batch(parts: dict[str, Any]) -> None:
    for scheduler, prediction in (("dpm++", "flow"), ("ddpm", "epsilon")):
        pipeline = make_pipeline(parts, scheduler, prediction=prediction)
        seeds, asked = [5, 2, 9, 7], {"steps": 4, "content_scale": 1.5}
        many = pipeline("random", "random", seeds, batch_size=3, **asked)
        for number in (3, 1):
            [one] = pipeline("random", "random", [seeds[number]], batch_size=1, **asked)
            assert one.record == many[number].record
            torch.testing.assert_close(one.latents, many[number].latents, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(many[0].latents, many[1].latents, atol=0.1)


def test_one_window_is_one_pass(pipeline: MeDUETPipeline, parts: dict[str, Any]) -> None:
    """By Euler, whose steps are easily written down."""
    factors = parts["factors"]
    [made] = pipeline("ct_a@4,2,0", "mr@4,0,0", [11], steps=4, sampler="euler")
    content, other = factors.pooled_content(0, (4, 2, 0), (8, 8, 8))[0], factors.nearest(2, (4, 0, 0))
    assert factors.start[other].tolist() == [4, 0, 0]
    x = torch.randn(4, 8, 8, 8, generator=torch.Generator().manual_seed(11))[None]
    network, levels = pipeline.network, torch.tensor([1.0, 0.75, 0.5, 0.25, 0.0])
    with torch.no_grad():
        for level, after in pairwise(levels):
            x = x + (after - level) * network(
                x, 1000 * level[None], content[None], factors.style[other][None]
            )
    mean, deviation = (
        torch.tensor(v)[:, None, None, None]
        for v in (network.config.latents_mean, network.config.latents_std)
    )
    assert torch.equal(made.latents, x[0] * deviation + mean)


def test_each_window_is_told_its_own_place(
    parts: dict[str, Any], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = make_pipeline(parts, content="tokens")
    spy = spied(pipeline, monkeypatch)
    table = FactorTable.open(folder / "factors.safetensors")
    [made] = pipeline("ct_a", "ct", [0], size=(12, 8, 8), start=(2, 0, 0), steps=1)
    [told] = spy.told
    assert made.record["windows"] == 2
    for number, start in enumerate([(2, 0, 0), (6, 0, 0)]):
        assert torch.equal(told[2][number], table.content_map(0, start, (8, 8, 8)))
    style = table.style[table.volume < 2].mean(0)
    torch.testing.assert_close(told[3], style.expand(2, -1), rtol=1e-6, atol=1e-6)
    noise = torch.randn(4, 12, 8, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(told[0], torch.stack([noise[:, :8], noise[:, 4:]]))
    assert not told[4].any()
    assert not told[5].any()


def test_the_row_of_a_place_is_sought_once(parts: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """And not in every step: on a GPU each search is waited for."""
    factors = parts["factors"]
    search = Mock(wraps=factors.nearest)
    monkeypatch.setattr(factors, "nearest", search)
    content = Sources(factors, None, False, False, (8, 8, 8)).content("ct_a", 0)
    assert content is not None
    for start in ((0, 0, 0), (4, 2, 0)) * 2:
        content.factor(start, (8, 8, 8))
    assert search.call_count == 2


@pytest.mark.parametrize("asked", ["ct_a", "scan"])
def test_tokens_can_be_told_standardised_within_their_volume(
    parts: dict[str, Any], folder: Path, scan: Path, asked: str
) -> None:
    """As training gives them, of a volume of the table and of a scan, place by place."""
    table = FactorTable.open(folder / "factors.safetensors")
    parts = {**parts, "factors": MeDUETFactors.from_table(table, folder / "store", whole=True)}
    pipeline = make_pipeline(parts, content="tokens", content_by_volume=True)
    settings: dict[str, Any] = {"content": scan if asked == "scan" else asked, "style": "mr", "steps": 1}
    told: list[Tensor] = []
    network = pipeline.network
    hook = network.register_forward_pre_hook(lambda _, inputs: told.append(inputs[2]))
    [sample] = pipeline(**settings, size=(8, 8, 8), start=(0, 0, 0))
    hook.remove()
    content = Sources(parts["factors"], pipeline._encoder(), True, True, (8, 8, 8)).content(
        settings["content"], 0
    )
    assert content is not None
    x, y, z = (edge // 2 * 2 for edge in content.grid)
    tokens = content.factor(content.first, (x, y, z)).flatten(0, 2)  # (L, D)
    torch.testing.assert_close(tokens.mean(0), torch.zeros(24), rtol=0, atol=0.01)
    torch.testing.assert_close(tokens.std(0, correction=0), torch.ones(24), rtol=0, atol=0.01)
    i, j, k = content.first
    assert torch.equal(told[0][0], content.factor((i, j, k), (8, 8, 8)))
    assert sample.latents.shape == (4, 8, 8, 8)


def test_pooled_content_is_the_boxs_own_where_the_table_has_its_tokens(
    parts: dict[str, Any], folder: Path
) -> None:
    """A window's own factor where it is the box; another's only without tokens."""
    factors, table = parts["factors"], FactorTable.open(folder / "factors.safetensors")
    row = factors.nearest(0, (4, 2, 0))
    assert factors.start[row].tolist() == [4, 0, 0]
    content, borrowed = factors.pooled_content(0, (4, 0, 0), (8, 8, 8))
    assert (torch.equal(content, table.content[row]), borrowed) == (True, None)
    for start, size in (((4, 2, 0), (8, 8, 8)), ((4, 0, 0), (4, 8, 2))):
        content, borrowed = factors.pooled_content(0, start, size)
        assert (torch.equal(content, table.content_map(0, start, size).mean((0, 1, 2))), borrowed) == (
            True,
            None,
        )
        assert not torch.allclose(content, table.content[row], rtol=1e-3)
    arguments = {**_arguments(factors), "table": str(folder / "absent")}
    alone = MeDUETFactors(**arguments)
    alone.load_state_dict(factors.state_dict())
    content, borrowed = alone.pooled_content(0, (4, 2, 0), (8, 8, 8))
    assert (torch.equal(content, table.content[row]), borrowed) == (True, row)
    with pytest.raises(UserError, match="absent: absent, or another table of factors than when the pipeline"):
        alone.content_map(0, (4, 2, 0), (8, 8, 8), standardised=False)


def test_a_record_names_the_windows_whose_content_was_borrowed(parts: dict[str, Any], folder: Path) -> None:
    arguments = {**_arguments(parts["factors"]), "table": str(folder / "absent")}
    alone = MeDUETFactors(**arguments)
    alone.load_state_dict(parts["factors"].state_dict())
    asked = {"size": (12, 8, 8), "start": (4, 2, 0), "steps": 1}
    [own], [made] = (
        make_pipeline({**parts, "factors": f})("ct_a", "mr", **asked) for f in (parts["factors"], alone)
    )
    assert own.record["content"] == {"volume": "ct_a", "domain": "ct"}
    assert made.record["content"]["borrowed"] == [
        {"window": [4, 2, 0], "of": [4, 0, 0]}, {"window": [8, 2, 0], "of": [8, 0, 0]},
    ]  # fmt: skip
    [window] = make_pipeline({**parts, "factors": alone})("ct_a@4,0,0", "mr", steps=1)
    assert "borrowed" not in window.record["content"]


def test_windows_that_agree_are_blended_without_a_trace(
    pipeline: MeDUETPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A network that looks at each voxel alone says the same in any window."""

    class Pointwise(Spy):
        def forward(self, *told: Tensor) -> Tensor:
            return told[0].tanh() + 0.1 * told[1][:, None, None, None, None] / 1000

    network = Pointwise(pipeline.network)
    monkeypatch.setattr(MeDUETPipeline, "network", network)
    [made] = pipeline("none", "none", [4], size=(20, 14, 8), steps=5, batch_size=3)
    network.config = {**network.config, "sample_size": (20, 14, 8)}  # type: ignore[assignment]
    network.config = type(pipeline.transformer.config)(network.config)
    [whole] = pipeline("none", "none", [4], size=(20, 14, 8), steps=5)
    assert (made.record["windows"], whole.record["windows"]) == (12, 1)
    torch.testing.assert_close(made.latents, whole.latents, rtol=1e-5, atol=1e-5)


def test_borders_of_windows_do_not_show(pipeline: MeDUETPipeline) -> None:
    """Of the borders between patches every second is one of windows, which begin every 4 voxels."""
    made = pipeline("none", "none", range(24), size=(40, 8, 8), steps=4, batch_size=27)
    latents = torch.stack([one.latents for one in made])  # (B, C, X, Y, Z)
    jumps = latents.diff(dim=2).abs().mean((0, 1, 3, 4))  # (X - 1,)
    inner = torch.arange(39)[8:-8]
    border, elsewhere = (jumps[inner[inner % 4 == rest]].mean() for rest in (3, 1))
    assert 0.9 < border / elsewhere < 1.1


@pytest.mark.parametrize("strength", [0.5, 0.1])
def test_strength_begins_with_the_volumes_own_latents(
    strength: float, pipeline: MeDUETPipeline, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spy = spied(pipeline, monkeypatch)
    [made] = pipeline("mr@2,2,0", "ct", [8], steps=10, strength=strength, sampler="euler")
    store = LatentStore.open(folder / "store")
    own = store.read_crops([2], [(2, 2, 0)], (8, 8, 8))[0].float()
    mean, deviation = (
        torch.tensor(v)[:, None, None, None] for v in (spy.config.latents_mean, spy.config.latents_std)
    )
    noise = torch.randn(4, 8, 8, 8, generator=torch.Generator().manual_seed(8))
    expected = (1 - strength) * (own - mean) / deviation + strength * noise
    torch.testing.assert_close(made.latents, expected * deviation + mean, rtol=1e-5, atol=1e-5)
    assert len(spy.told) == round(10 * strength)
    with pytest.raises(UserError, match="strength: found less than 1, and there is no content to begin from"):
        pipeline("none", "ct", strength=strength)


@pytest.mark.usefixtures("offline")
def test_a_scan_gives_content_and_style(
    parts: dict[str, Any], pipeline: MeDUETPipeline, scan: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = Encoder(parts["encoder"].network, parts["vae"].tokenizer)
    [entry] = find_volumes(scan).volumes
    encoded, prepared = encoder.encode(entry), load_volume(entry, encoder.transform)
    spy = spied(pipeline, monkeypatch)
    [made] = pipeline(scan, str(scan), [0], size=(8, 8, 8), start=(4, 2, 0), steps=1)
    [told] = spy.told
    assert torch.equal(told[2][0], encoded.content[2:6, 1:5, :4].mean((0, 1, 2)))
    assert torch.equal(told[3][0], encoded.pooled_style)
    shift = prepared.affine[:3, :3] @ [16, 8, 0]
    assert np.array_equal(made.affine[:3, 3], prepared.affine[:3, 3] + shift)
    assert made.record["content"]["scan"] == str(scan)
    assert made.intensity == encoded.intensity
    [whole] = pipeline(scan, None, [0], steps=1)
    assert tuple(whole.latents.shape) == (4, 12, 10, 12)
    assert spy.told[-1][5].all()


def test_nothing_is_the_null_of_the_network(
    pipeline: MeDUETPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    spy = spied(pipeline, monkeypatch)
    pipeline(["none", "mr@0,0,0"], ["mr", None], [0, 1], steps=1, content_scale=2.0, interval=(0.0, 1.0))
    [told] = spy.told  # none, content, and both, of two samples each
    assert told[4].tolist() == [True, True, True, False, True, False]
    assert told[5].tolist() == [True, True, True, True, False, True]


def test_size_and_place_of_a_crop(pipeline: MeDUETPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    spied(pipeline, monkeypatch)
    one, two, three = (
        made[0].record
        for made in (
            pipeline("ct_a", "mr", size=(8, 8, 8), steps=1),
            pipeline("ct_a@random", "mr@random", [2], size=(16, 8, 8), steps=1),
            pipeline("random", "mr", [3], size=(16, 12, 8), steps=1),
        )
    )
    assert (one["start"], one["size"]) == ([4, 2, 0], [8, 8, 8])
    assert (two["start"][0], two["size"]) == (0, [16, 8, 8])
    assert three["content"]["volume"] == "ct_a"
    assert three["size"] == [16, 12, 8]


def test_a_tokenizer_whose_weights_are_not_ours_stays_where_it_is(tmp_path: Path) -> None:
    tokenizer = load_tokenizer()
    tokenizer.identity = "maisi-0f3012f53074"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("meduet_fast.synthesis.components.load_tokenizer", lambda _: tokenizer)
        wrapped = MeDUETAutoencoder.from_tokenizer(tokenizer, tmp_path / "autoencoder.pt")
        wrapped.save_pretrained(tmp_path / "vae")
        assert [path.name for path in (tmp_path / "vae").iterdir()] == ["config.json"]
        again = MeDUETAutoencoder.from_pretrained(tmp_path / "vae")
        assert again.tokenizer.identity == tokenizer.identity
    expected = "vae: the weights of maisi-0f3012f53074 are no part of a pipeline: tokenizer .*autoencoder.pt"
    with pytest.raises(UserError, match=expected):
        MeDUETAutoencoder.from_pretrained(tmp_path / "vae")


KNOWN = "ct_a, ct_b, mr"


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ({"content": "liver"}, f"content: found liver, .* the path of a scan, a volume: {KNOWN}$"),
        ({"style": "pet"}, f"style: found pet, .* a volume or domain: {KNOWN}, ct$"),
        ({"content": "ct"}, "content: found ct, expected .* a volume: "),
        (
            {"content": "ct_a@1"},
            "content: found ct_a@1, expected NAME@x,y,z in latent voxels, or NAME@random",
        ),
        ({"style": "ct@0,0,0"}, "style: found ct@0,0,0, expected a place in a volume; ct is a domain"),
        ({"sampler": "heun"}, r"sampler: found heun, expected one for flow: dpm\+\+, euler"),
        ({"sampler": "ddim"}, r"sampler: found ddim, expected one for flow: dpm\+\+, euler"),
        ({"steps": 0}, "steps: found 0, expected 1 or more"),
        ({"content_scale": -1.0}, "content_scale: found -1, expected 0 or more"),
        ({"style_scale": float("inf")}, "style_scale: found inf, expected 0 or more"),
        ({"strength": 0.0}, "strength: found 0, expected 0 < value <= 1"),
        ({"size": (9, 8, 8)}, r"size: found \(9, 8, 8\) latent voxels, expected multiples of 2"),
        ({"size": (24, 8, 8)}, r"size: found \(24, 8, 8\) latent voxels, ct_a has \(17, 12, 10\)"),
        (
            {"start": (12, 0, 0)},
            r"start: found \(12, 0, 0\), expected from \(0, 0, 0\) to \(8, 4, 2\) in steps of 2",
        ),
        ({"start": (1, 0, 0)}, r"start: found \(1, 0, 0\), expected from"),
        ({"content": None, "start": (0, 0, 0)}, "start: found .* there is no content"),
        (
            {"content": "random", "size": (32, 8, 8)},
            r"content: no volume of the table has \(32, 8, 8\) latent",
        ),
        ({"seeds": [-1]}, "seeds: found -1, expected a whole number"),
        ({"style": ["ct", "mr"]}, "content and style: found 2 for 1 seeds, expected one for each"),
        ({"content": "absent.nii.gz"}, "absent.nii.gz: no such file or folder"),
    ],
)
def test_what_does_not_fit_is_told_in_a_line(
    asked: dict[str, Any], expected: str, pipeline: MeDUETPipeline
) -> None:
    with pytest.raises(UserError, match=expected) as raised:
        pipeline(**{"content": "ct_a", "style": "mr", "steps": 1, **asked})
    assert "\n" not in str(raised.value)


def test_a_damaged_scan_is_told_in_a_line(pipeline: MeDUETPipeline, scan: Path, tmp_path: Path) -> None:
    cut = tmp_path / "cut.nii.gz"
    cut.write_bytes(scan.read_bytes()[:4000])
    for asked in ({"content": cut, "style": "mr"}, {"content": "ct_a", "style": cut}):
        with pytest.raises(UserError, match=r"cut.nii.gz: .*(truncated|damaged|end)") as raised:
            pipeline(**asked)
        assert "\n" not in str(raised.value)


def test_parts_of_other_origin_are_refused(parts: dict[str, Any], folder: Path) -> None:
    def build(**changes: Any) -> MeDUETPipeline:
        return make_pipeline({**parts, **changes})

    factors = parts["factors"]
    other = MeDUETFactors(**{**_arguments(factors), "tokenizer": "builtin-000000000000"})
    with pytest.raises(
        UserError, match=r"factors of latents of builtin-0{12}, found the tokenizer builtin-0f3"
    ):
        build(factors=other)
    about = {"weights": "there", "weights_sha256": "0"}
    encoder = MeDUETEncoder.from_model(parts["encoder"].network, 1.5, about)
    with pytest.raises(UserError, match=r"factors of the encoder .*, found there, which is another"):
        build(encoder=encoder)
    with pytest.raises(
        UserError, match=r"table of factors: content and style of \(12, 6\) values, the network"
    ):
        build(factors=MeDUETFactors(**{**_arguments(factors), "content_dim": 12}))
    network = make_network(prediction="epsilon")
    with pytest.raises(
        UserError,
        match=r"scheduler: found FlowMatchEulerDiscreteScheduler for flow, expected one for epsilon",
    ):
        MeDUETPipeline(build_scheduler("euler", "flow"), transformer=network, **parts)
    with pytest.raises(UserError, match="pipeline: expected either a transformer or a unet"):
        MeDUETPipeline(build_scheduler("euler", "flow"), **parts)
    store = LatentStore.open(folder / "store")
    table = FactorTable.open(folder / "factors.safetensors")
    table.tokenizer = "builtin-000000000000"
    with pytest.raises(UserError, match="expected a table of this store"):
        MeDUETFactors.from_table(table, store.path)


def _arguments(factors: MeDUETFactors) -> dict[str, Any]:
    return {name: value for name, value in factors.config.items() if not name.startswith("_")}


@pytest.mark.usefixtures("offline")
def test_a_folder_without_a_pipeline_is_told_in_a_line(pipeline: MeDUETPipeline, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="absent: no such folder, expected a pipeline"):
        MeDUETPipeline.from_pretrained(tmp_path / "absent")
    with pytest.raises(UserError, match=r"no model_index.json in it, expected a pipeline"):
        MeDUETPipeline.from_pretrained(tmp_path)
    for damage in ("transformer/config.json", "vae/diffusion_pytorch_model.safetensors", "model_index.json"):
        folder = tmp_path / damage.replace("/", "-")
        pipeline.save_pretrained(folder)
        (folder / damage).write_text("{")
        with pytest.raises(UserError, match=f"{folder.name}: not a readable pipeline") as raised:
            MeDUETPipeline.from_pretrained(folder)
        assert "\n" not in str(raised.value)
