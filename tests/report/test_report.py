"""The whole report: what is in it, that it stands alone, and what stops it."""

from __future__ import annotations

import base64
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from io import BytesIO
from pathlib import Path

import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread
from PIL import Image

from meduet_fast.cli import main
from meduet_fast.data.store import LatentStore
from meduet_fast.data.store_writer import StoreWriter, VolumeRecord
from meduet_fast.errors import UserError
from meduet_fast.pretraining import pretrain
from meduet_fast.pretraining.dry_run import format_plan
from meduet_fast.report import read_numbers, write_report
from meduet_fast.report.curves import draw_losses
from meduet_fast.report.inputs import Findings, measure, open_run
from meduet_fast.report.pictures import prepared_image

from .conftest import CONFIG, point_to, write_tokenizer

SECTIONS = ["summary", "styles", "separation", "filling-in", "losses", "speed", "settings"]


class Page(HTMLParser):
    """Collects what the tests look at; complains about tags that do not close."""

    VOID = frozenset({"meta", "img", "br"})

    def __init__(self, html: str) -> None:
        super().__init__()
        self.images: list[dict[str, str | None]] = []
        self.targets: list[str] = []
        self.anchors: list[str] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(html)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        if tag not in self.VOID:
            self._open.append(tag)
        if tag == "img":
            self.images.append(values)
        if tag == "section":
            self.anchors.append(str(values["id"]))
        self.targets += [str(values[key]) for key in ("href", "src") if key in values]

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="session")
def findings(finished: Path) -> Findings:
    """What is measured on the finished run, which takes seconds."""
    return measure(open_run(finished / "run", None))


@pytest.fixture(scope="session")
def written(finished: Path, findings: Findings) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("meduet_fast.report.write.measure", lambda inputs: findings)
        return write_report(finished / "run")


@pytest.fixture
def _known_findings(findings: Findings, monkeypatch: pytest.MonkeyPatch) -> None:
    """Measure nothing anew."""
    monkeypatch.setattr("meduet_fast.report.write.measure", lambda inputs: findings)


@pytest.fixture
def _blank_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw all figures, but render none, which takes as long as to measure."""

    def save_blank(figure: Figure, path: Path) -> None:
        Image.new("RGB", (8, 8)).save(path)

    monkeypatch.setattr("meduet_fast.report.write.save_png", save_blank)


def test_the_page_has_every_section_and_stands_alone(written: Path) -> None:
    html = written.read_text()
    page = Page(html)
    assert page.anchors == SECTIONS
    assert {target for target in page.targets if not target.startswith("data:")} == {
        f"#{s}" for s in SECTIONS
    }
    assert not re.search(r"https?:|url\(|@import|<script|<link", html)
    assert "Warning: the teacher keeps 99 % of what it began with over the 8 steps" in page.text
    for domain in ("sharp", "bright", "head"):
        assert domain in page.text


def test_images_are_embedded_and_lie_beside_the_page(written: Path) -> None:
    embedded = []
    for image in Page(written.read_text()).images:
        assert image["alt"]
        kind, data = str(image["src"]).split(",", 1)
        assert kind == "data:image/png;base64"
        content = base64.b64decode(data, validate=True)
        pixels = imread(BytesIO(content), format="png")
        assert min(pixels.shape[:2]) > 200
        assert pixels.std() > 0.05
        embedded.append(content)
    files = [path.read_bytes() for path in written.parent.glob("*.png")]
    assert sorted(embedded) == sorted(files)
    # Losses, factors, speed; bright in the style of sharp and of head; bright and head filled in.
    assert len(files) == 7


def test_tensorboard_gets_the_figures(written: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(written.parents[1] / "tensorboard" / "report"), size_guidance={"images": 0})
    board.Reload()
    assert set(board.Tags()["images"]) == {path.stem for path in written.parent.glob("*.png")}
    assert {event.step for name in board.Tags()["images"] for event in board.Images(name)} == {8}


def test_a_loss_that_the_report_does_not_know_is_drawn_under_its_own_name() -> None:
    records = [{"step": step, "mftd": 1.0, "rotation": 2.0, "total": 3.0, "time": 0.0} for step in range(9)]
    axes = draw_losses(records, {"rotation": 4}, num_domains=3).axes
    titles = ["Total (weighted sum)", "Token distillation (MFTD)", "rotation"]
    assert [ax.get_title(loc="left") for ax in axes] == titles
    assert "rotation starts" in [text.get_text() for text in axes[0].get_legend().get_texts()]


def test_numbers_agree_with_the_page(written: Path, finished: Path) -> None:
    numbers = read_numbers(finished / "run")
    assert numbers == json.loads((written.parent / "separation.json").read_text())
    found = numbers["separation"]
    assert found["domains"] == ["bright", "sharp"]
    assert found["same_anatomy"]
    assert found["unseen"]
    assert found["probe_chance"] == 0.5
    text = Page(written.read_text()).text
    for value in (*found["probe"].values(), *found["retrieval"].values()):
        assert 0 <= value <= 1
        assert f"{100 * value:.1f} %" in text
    assert f"{numbers['reconstruction_loss']['last_tenth']:.3f}" in text
    (pair,) = numbers["style_pairs"]
    assert (pair["first"], pair["second"]) == ("bright", "sharp")
    for error in ("kept", "by_statistics", "by_rank", "own"):
        assert f"{pair[error]:.3f}" in text
    best = max(numbers["style_gain"], key=numbers["style_gain"].get)
    verdict = "works" if pair[f"works_{best}"] else "does not work"
    assert f"bright and sharp: {verdict}" in text
    assert f"bright and sharp: {verdict}" in numbers["headline"]
    assert [(item["domain"], item["style_of"]) for item in numbers["style_panels"]] == [
        ("bright", "sharp"),
        ("sharp", "bright"),
        ("bright", "head"),
        ("head", "bright"),
    ]
    assert [item["domain"] for item in numbers["filled"]] == ["bright", "head", "sharp"]
    for item in numbers["filled"]:
        assert f"{item['network'] / item['interpolation']:.2f}" in text
    assert [item["domain"] for item in numbers["pictures"]] == [
        "bright",
        "head",
        "bright",
        "bright",
    ]
    assert "black is 0 HU, white 250 HU (level 125, window 250); the bar is 50 mm" in text
    assert "style above content:" in numbers["headline"]
    assert numbers["step"] == 8
    assert numbers["network"] == "teacher"


def test_the_command_prints_what_was_found(
    written: Path, finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", str(finished / "run")]) == 0
    printed = capsys.readouterr().out
    assert printed == f"{read_numbers(finished / 'run')['headline']}\n{written}: open it in a browser\n"
    assert "Hidden tokens on held-out crops: the network does" in printed


@pytest.mark.usefixtures("_known_findings", "_blank_pictures")
def test_a_second_report_is_not_made_twice_but_a_stale_one_is(written: Path, copied: Path) -> None:
    shutil.copytree(written.parent, copied / "report")
    first = copied / "report" / written.name
    before = {path.name: path.stat().st_mtime_ns for path in first.parent.iterdir()}
    assert write_report(copied) == first
    assert {path.name: path.stat().st_mtime_ns for path in first.parent.iterdir()} == before
    (first.parent / "old.png").write_bytes(b"of an earlier report")
    metrics = copied / "metrics.jsonl"
    lines = metrics.read_text().splitlines()
    metrics.write_text("\n".join(lines[:-1]) + "\n")
    write_report(copied)
    names = {path.name for path in first.parent.iterdir()}
    assert names == set(before)
    assert first.stat().st_mtime_ns != before["index.html"]


def test_the_input_is_shown_only_if_it_is_as_it_was(finished: Path, tmp_path: Path) -> None:
    store = LatentStore.open(finished / "store")
    image = prepared_image(store, 0)
    assert image is not None
    assert image.shape == tuple(4 * size for size in store.entries[0].grid)
    source = Path(store.entries[0].source)
    kept = source.read_bytes()
    try:
        source.write_bytes(kept[:-4] + b"\0\0\0\0")
        assert prepared_image(store, 0) is None
        source.unlink()
        assert prepared_image(store, 0) is None
    finally:
        source.write_bytes(kept)


@pytest.mark.usefixtures("_blank_pictures")
def test_a_moved_store_is_named_with_data(copied: Path, finished: Path, tmp_path: Path) -> None:
    point_to(copied, tmp_path / "gone")
    with pytest.raises(UserError, match=r"gone: the run's latent store is no longer there.*--data"):
        write_report(copied)
    assert write_report(copied, finished / "store").is_file()


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda run: (run / "run.json").unlink(), r"run: no run\.json found"),
        (lambda run: shutil.rmtree(run / "checkpoints"), "checkpoints: no checkpoint found"),
        (lambda run: (run / "metrics.jsonl").unlink(), r"metrics\.jsonl: cannot be read"),
        (lambda run: (run / "metrics.jsonl").write_text(""), r"metrics\.jsonl: no records yet"),
        (lambda run: point_to(run, run), "run: not a latent store"),
        (
            lambda run: (run / "checkpoints" / "8" / "teacher.safetensors").unlink(),
            r"teacher\.safetensors: not found",
        ),
        (
            lambda run: (run / "checkpoints" / "8" / "teacher.safetensors").write_bytes(b"x"),
            r"teacher\.safetensors: text \('x'\), expected a safetensors",
        ),
    ],
)  # fmt: skip
def test_what_is_missing_is_named(copied: Path, harm: Callable[[Path], object], message: str) -> None:
    harm(copied)
    with pytest.raises(UserError, match=message):
        write_report(copied)
    assert not (copied / "report").exists()


def test_another_tokenizer_is_refused(copied: Path, finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished / "store", tmp_path / "store")
    other = tmp_path / "other.safetensors"
    write_tokenizer(other, seed=1)
    index = tmp_path / "store" / "index.jsonl"
    head, entries = index.read_text().split("\n", 1)
    index.write_text(f"{json.dumps({**json.loads(head), 'tokenizer_spec': str(other)})}\n{entries}")
    with pytest.raises(UserError, match=r"latents are of tokenizer trained-\w+, but .*other.safetensors"):
        write_report(copied, tmp_path / "store")
    gone = {**json.loads(head), "tokenizer_spec": str(tmp_path / "none.safetensors")}
    index.write_text(f"{json.dumps(gone)}\n{entries}")
    with pytest.raises(UserError, match=r"none\.safetensors"):
        write_report(copied, tmp_path / "store")


@pytest.mark.usefixtures("_blank_pictures")
def test_imported_latents_have_no_pictures_and_shared_anatomy_is_not_assumed(
    copied: Path, finished: Path, tmp_path: Path
) -> None:
    known = LatentStore.open(finished / "store")
    with StoreWriter(
        tmp_path / "store",
        tokenizer="reference-cache",
        tokenizer_spec="reference-cache",
        channels=4,
        compression=4,
    ) as writer:
        for index, entry in enumerate(known.entries):
            record = VolumeRecord(
                name=entry.name, domain=entry.domain, body_part="chest", content_key=entry.content_key,
                source=entry.source, latent=known.read_volume(index), affine=[[1.5, 0, 0, 0], [0, 1.5, 0, 0],
                [0, 0, 1.5, 0], [0, 0, 0, 1]], spacing=entry.spacing, intensity={},
            )  # fmt: skip
            writer.add(record)
    page = Page(write_report(copied, tmp_path / "store").read_text())
    assert len(page.images) == 3
    assert "imported latents, whose tokenizer is unknown" in page.text
    assert "Does the anatomy stay?" in page.text
    numbers = read_numbers(copied)
    assert not numbers["separation"]["same_anatomy"]
    assert numbers["separation"]["domains"] == ["bright", "head", "sharp"]
    assert numbers["pictures"] == numbers["style_pairs"] == []
    assert numbers["style_gain"] is None


@pytest.mark.usefixtures("_blank_pictures")
def test_a_store_that_cannot_tell_still_gives_a_report(copied: Path, finished: Path, tmp_path: Path) -> None:
    known = LatentStore.open(finished / "store")
    with StoreWriter(
        tmp_path / "store", tokenizer=known.index.tokenizer, tokenizer_spec=known.index.tokenizer_spec,
        channels=4, compression=4,
    ) as writer:  # fmt: skip
        entry = known.entries[0]
        record = VolumeRecord(
            name=entry.name, domain=entry.domain, body_part=entry.body_part, content_key=entry.content_key,
            source=entry.source, latent=known.read_volume(0), affine=[[1.0, 0, 0, 0]] * 4,
            spacing=entry.spacing, intensity={},
        )  # fmt: skip
        writer.add(record)
    page = Page(write_report(copied, tmp_path / "store").read_text())
    assert page.anchors == SECTIONS
    assert "separation needs two domains" in page.text
    assert read_numbers(copied)["separation"] is None


@pytest.mark.usefixtures("_blank_pictures")
def test_a_run_that_holds_out_whole_volumes(
    small_volumes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(
        UserError, match="bright0: axis of 12 cannot hold a training crop and a held-out crop"
    ):
        pretrain(small_volumes, tmp_path / "slabs", CONFIG)
    config = replace(CONFIG, steps=4, mftd_start_step=2, held_out="volumes")
    pretrain(small_volumes, tmp_path / "run", config)
    held = json.loads((tmp_path / "run" / "run.json").read_text())["held_out_volumes"]
    assert held in (["bright0", "sharp0"], ["bright1", "sharp1"])
    what = f"2 of 5 volumes, whole: {held[0]}, {held[1]}"
    doubt = "no volume is held out of head: a domain keeps one to train on"
    assert f"warning: {doubt}" in capsys.readouterr().err
    plan = " ".join(format_plan(config, small_volumes).split())
    assert f"held out {what}" in plan
    assert doubt in plan

    page = Page(write_report(tmp_path / "run").read_text())
    for words in (
        what,
        f"Warning: {doubt}",
        "measured all over both",
        f"The volumes {held[0]}, {held[1]} show",
    ):
        assert words in page.text
    numbers = read_numbers(tmp_path / "run")
    found = numbers["separation"]
    assert (found["volumes"], found["domains"]) == (held, ["bright", "sharp"])
    assert found["same_anatomy"]
    assert found["unseen"]
    assert found["retrieval"] is not None
    assert [(pair["first"], pair["second"]) for pair in numbers["style_pairs"]] == [("bright", "sharp")]
    assert [item["domain"] for item in numbers["filled"]] == ["bright", "sharp"]
    # The only held-out volumes are the pair's: a head that was trained on is not shown.
    assert {panel["domain"] for panel in numbers["style_panels"]} == {"bright", "sharp"}


@pytest.mark.usefixtures("_known_findings")
def test_a_full_disk_is_a_clear_message(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("meduet_fast.report.write.save_png", full)
    with pytest.raises(UserError, match=r"report: the report cannot be written: No space left on device"):
        write_report(copied)
    assert not (copied / "report" / "index.html").exists()
