"""The page, the pictures, and the folder that goes home."""

from __future__ import annotations

import builtins
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from benchmarks import plots
from benchmarks.report import load_runs, main, write_folder, write_report
from benchmarks.results import Results, Row
from benchmarks.tables import duration, headlines, si, three, without_batch

from .made_up import against, make_results, timed

H100 = "nvidia-h100-80gb-hbm3"


def report(tmp_path: Path, *runs: Results) -> str:
    for results in runs:
        device = results.provenance["device"].replace(" ", "-")
        results.save(tmp_path / "results" / device / f"{results.provenance['date'][:10]}.json")
    return write_report([tmp_path / "results"], tmp_path / "docs").read_text()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``results`` of two days, and ``docs`` with their page and pictures."""
    folder = tmp_path_factory.mktemp("report")
    report(folder, make_results(), make_results("2026-01-03"))
    return folder


@pytest.fixture
def _text_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw no pictures, which takes seconds."""
    monkeypatch.setattr(plots, "write_plots", lambda *_, **options: [])


def test_every_picture_is_shown_and_written(whole):
    shown = re.findall(r"!\[[^]]+\]\(benchmarks/([^)]+)\)", (whole / "docs" / "benchmarks.md").read_text())
    names = ["roofline", "throughput", "contrast", "ablation", "history"]
    assert shown == [f"{H100}-{name}.png" for name in names]
    folder = whole / "docs" / "benchmarks"
    assert sorted(path.name for path in folder.iterdir()) == sorted(shown)
    for name in shown:
        with Image.open(folder / name) as image:
            assert min(image.size) > 200


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.*")}


def test_the_same_files_give_the_same_page_and_pictures(whole, tmp_path):
    write_report([whole / "results"], tmp_path)
    assert len(files(tmp_path)) == 6
    assert files(tmp_path) == files(whole / "docs")


def test_pictures_without_rows_are_left_out_and_old_ones_removed(tmp_path):
    report(tmp_path, make_results())
    rows = [Row("loader", "crops", "ours", "read", **timed(47), **against(MONAI=58))]
    text = report(tmp_path, make_results(rows=rows))
    assert "![" not in text
    assert not list((tmp_path / "docs" / "benchmarks").glob("*.png"))
    assert "### loader" in text


@pytest.mark.usefixtures("_text_alone")
def test_figures_of_the_rows_are_in_the_tables(tmp_path):
    text = report(tmp_path, make_results())
    table = text.partition("### contrast\n")[2].partition("###")[0]
    assert "| case | direction | dtype | ours is x times as fast | variant | median |" in table
    assert "cold" not in table  # nobody has one
    assert "| N=256 D=256 | forward + backward | float32 |  | ours | 705 µs | 691 µs to 719 µs |" in table
    assert "|  |  |  | 3.00 (2.94 to 3.06) | eager | 2.12 ms |" in table
    assert "| liger | not measured: liger-kernel is not installed |" in table
    assert "samples/s 615" in text.partition("### step\n")[2]


@pytest.mark.usefixtures("_text_alone")
def test_a_share_of_the_peak_is_shown(tmp_path):
    row = Row("pool", "B=4", "ours", bytes=29 * 10**9, **timed(2e4))
    assert "| 50.0 % |" in report(tmp_path, make_results(rows=[row]))


def test_the_headline_is_against_the_strongest_peer():
    rows = [
        Row("pool", "B=4", "ours", **timed(1), **against(eager=9.0, compiled=2.0)),
        Row("pool", "B=8", "ours", **timed(1), **against(eager=8.0, **{"ours, eager": 0.5})),
        Row("pool", "B=8", "eager", **timed(8), **against(ours=0.1)),
        Row("decoder_streams", "B=8", "ours", **timed(8)),
    ]
    (line,) = headlines(make_results(rows=rows))
    assert (line.bench, line.worst, line.best, line.cases) == ("pool", 2.0, 8.0, 2)
    assert line.ratio == pytest.approx(4.0)


@pytest.mark.usefixtures("_text_alone")
def test_a_page_without_an_h100_says_so(tmp_path):
    text = report(tmp_path, make_results(device="Some CPU"))
    assert "\nH100: not measured.\n" in text
    assert "step time of one H100 is not measured" in text
    assert "weak-scaling efficiency" not in text


@pytest.mark.usefixtures("_text_alone")
def test_a_page_with_an_h100_has_the_scale_model(tmp_path):
    text = report(tmp_path, make_results(), make_results(device="Some CPU"))
    assert "H100: not measured" not in text
    assert text.index("## NVIDIA H100 80GB HBM3") < text.index("## Some CPU")
    assert text.count("weak-scaling efficiency") == 2
    assert "Computed, not measured" in text


@pytest.mark.usefixtures("_text_alone")
def test_the_latest_run_of_a_benchmark_counts(tmp_path):
    newer = [Row("pool", "B=4", "ours", **timed(1)), Row("loader", "crops", "ours", "read", **timed(12.5))]
    text = report(tmp_path, make_results("2026-01-03", rows=newer), make_results("2026-01-02"))
    headings = ["c03", "### pool", "### loader", "c02", "### contrast", "### step"]
    assert [text.index(heading) for heading in headings] == sorted(map(text.index, headings))
    assert text.count("### loader") == 1
    assert "12.5 µs" in text
    assert "47.0 µs" not in text
    assert [
        run.provenance["commit"] for run in load_runs([tmp_path / "results"])["NVIDIA H100 80GB HBM3"]
    ] == [
        "c02",
        "c03",
    ]


def test_unusable_input_is_one_line_and_exit_code_2(tmp_path, capsys):
    bad = tmp_path / "results" / "cpu" / "x.json"
    bad.parent.mkdir(parents=True)
    for content, message in (
        ("{", "x.json: not a file of results"),
        (None, "no results; `make bench` makes some"),
    ):
        bad.write_text(content) if content else bad.unlink()
        with pytest.raises(SystemExit, match="2"):
            main(["--results", str(tmp_path / "results"), "--output", str(tmp_path / "docs")])
        assert message in capsys.readouterr().err.splitlines()[-1]
    with pytest.raises(SystemExit, match="2"):
        main(["--results", str(tmp_path / "nowhere")])
    assert "nowhere: no such folder" in capsys.readouterr().err
    assert not (tmp_path / "docs").exists()


def test_the_folder_to_carry_home_is_whole(tmp_path):
    written = write_folder(make_results(), tmp_path / "home")
    names = {path.name for path in (tmp_path / "home").iterdir()}
    assert names == {path.name for path in written}
    pictures = {f"{name}.png" for name in ("roofline", "throughput", "contrast", "ablation")}
    assert names == {"2026-01-02-c02.json", "table.txt"} | pictures
    json = tmp_path / "home" / "2026-01-02-c02.json"
    assert json.read_bytes() == make_results().save(tmp_path / "saved.json").read_bytes()
    table = (tmp_path / "home" / "table.txt").read_text()
    assert "not measured: liger-kernel is not installed" in table
    assert "3.00 (2.94 to 3.06)" in table


def test_without_matplotlib_the_folder_has_all_but_pictures(tmp_path, monkeypatch):
    whole = builtins.__import__

    def refuse(name, *arguments, **keywords):
        if name.partition(".")[0] == "matplotlib":
            raise ImportError(f"No module named {name!r}")
        return whole(name, *arguments, **keywords)

    for name in ("benchmarks.plots", "meduet_fast.plotting"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setattr(builtins, "__import__", refuse)
    write_folder(make_results(), tmp_path / "home")
    assert {path.name for path in (tmp_path / "home").iterdir()} == {"2026-01-02-c02.json", "table.txt"}
    assert "No pictures: No module named 'matplotlib" in (tmp_path / "home" / "table.txt").read_text()


def test_numbers_are_readable():
    assert [three(value) for value in (0, 0.01234, 1.234, 12.34, 1234.5)] == [
        "0",
        "0.0123",
        "1.23",
        "12.3",
        "1234",
    ]
    assert [si(value, "B") for value in (5, 5e3, 5e6, 1.5e12)] == ["5.00 B", "5.00 kB", "5.00 MB", "1.50 TB"]
    assert [duration(value) for value in (0.5, 1500, 2e6)] == ["0.500 µs", "1.50 ms", "2.00 s"]


@pytest.mark.parametrize(
    ("case", "expected"),
    [
        ("ViT-B B=64 with MFTD", "ViT-B with MFTD"),
        ("ViT-B, batch 64", "ViT-B"),
        ("B64 L=640", "L=640"),
        ("64", ""),
        ("ViT-B", "ViT-B"),
    ],
)
def test_a_case_keeps_its_name_along_the_batch_axis(case, expected):
    assert without_batch(replace(Row("step", case, "ours"), shape={"batch": 64})) == expected
