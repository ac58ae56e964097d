"""All scans of an input in one table, and the command that writes it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from meduet_fast.cli import main
from meduet_fast.data import find_volumes
from meduet_fast.data.sources import VolumeEntry
from meduet_fast.encoding import EncodeConfig, EncodedScan, Encoder, encode_scans
from meduet_fast.encoding.encode import ShowWindows

from .conftest import RULE, write_scan, write_tokenizer


@pytest.fixture
def scans(tmp_path: Path) -> Path:
    folder = tmp_path / "scans"
    folder.mkdir()
    for seed, (name, size) in enumerate(
        {"b": (40, 32, 32), "a": (32, 36, 48), "small": (20, 20, 20)}.items()
    ):
        write_scan(folder / f"{name}.nii.gz", size, seed)
    return folder


def test_a_table_has_every_scan_that_can_be_used(
    tmp_path: Path, scans: Path, make_run: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    spec = str(tmp_path / "tokenizer.safetensors")
    run = make_run(write_tokenizer(Path(spec)), spec)
    (scans / "bad.nii.gz").write_bytes(b"nothing")
    (scans / "a_seg.nii.gz").write_bytes(b"labels")
    rule = "{kind: ct_window, low: 0, high: 1000}"
    table = tmp_path / "new" / "table.safetensors"
    options = ["--input", str(scans), "--output", str(table), "--intensity", rule, "--body_part", "chest"]
    assert main(["encode", str(run), *options]) == 1
    output = capsys.readouterr()
    assert f"{table}: 3 scans (1 failed, 1 left out)" in output.out
    assert f"failed: {scans / 'bad.nii.gz'}: " in output.out
    assert f"left out: {scans / 'a_seg.nii.gz'}: " in output.out
    assert "Encoding: 5/5, " in output.err
    assert [path.name for path in table.parent.iterdir()] == [table.name]

    encoder = Encoder.load(run)
    with safe_open(table, "pt") as file:
        metadata = file.metadata()
        volumes = json.loads(metadata.pop("volumes"))
        assert metadata == {"format": "meduet-fast encodings 1", **encoder.record()}
        names = [volume["name"] for volume in volumes]
        assert names == ["scans-a", "scans-b", "scans-small"]
        maps = {f"{kind}/{name}" for kind in ("content", "style") for name in names}
        assert set(file.keys()) == {"content", "style", *maps}
        assert file.get_tensor("content").shape == (3, 24)
        entries = [entry for entry in find_volumes(scans, intensity=RULE).volumes if entry.name in names]
        for row, entry in enumerate(entries):
            scan = encoder.encode(entry)
            assert torch.equal(file.get_tensor(f"content/{entry.name}"), scan.content)
            assert torch.equal(file.get_tensor(f"style/{entry.name}"), scan.style)
            assert torch.equal(file.get_tensor("content")[row], scan.pooled_content)
            assert torch.equal(file.get_tensor("style")[row], scan.pooled_style)
            assert volumes[row] == {
                "name": entry.name, "domain": "scans", "body_part": "chest", "source": str(entry.path),
                "intensity": {"kind": "ct_window", "low": 0.0, "high": 1000.0},
                "affine": scan.affine.tolist(), "windows": scan.windows,
            }  # fmt: skip

    (scans / "bad.nii.gz").unlink()
    summary = encode_scans(run, scans, table, EncodeConfig(intensity=RULE, stride=8))
    assert summary.complete
    assert summary.encoded == names
    with safe_open(table, "pt") as file:
        assert file.metadata()["stride"] == "8"


@pytest.mark.parametrize("stopped_at", ["scans-a", "scans-small"])
def test_a_table_is_written_whole_or_not_at_all(
    tmp_path: Path, scans: Path, make_run: Callable[..., Path], stopped_at: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    table = tmp_path / "out" / "table.safetensors"
    table.parent.mkdir()
    table.write_text("what was there")
    spec = str(tmp_path / "tokenizer.safetensors")
    run = make_run(write_tokenizer(Path(spec)), spec)
    encode = Encoder.encode

    def stop(encoder: Encoder, entry: VolumeEntry, show: ShowWindows) -> EncodedScan:
        if entry.name == stopped_at:
            raise KeyboardInterrupt
        return encode(encoder, entry, show)

    monkeypatch.setattr(Encoder, "encode", stop)
    with pytest.raises(KeyboardInterrupt):
        encode_scans(run, scans, table, EncodeConfig(intensity=RULE))
    assert [path.name for path in table.parent.iterdir()] == [table.name]
    assert table.read_text() == "what was there"


def test_an_input_of_bad_scans_alone_gives_an_empty_table(
    tmp_path: Path, make_run: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    spec = str(tmp_path / "tokenizer.safetensors")
    run = make_run(write_tokenizer(Path(spec)), spec)
    (tmp_path / "bad.nii").write_bytes(b"nothing")
    table = tmp_path / "table.safetensors"
    assert main(["encode", str(run), "--input", str(tmp_path / "bad.nii"), "--output", str(table)]) == 1
    assert "0 scans (1 failed)" in capsys.readouterr().out
    with safe_open(table, "pt") as file:
        assert file.get_tensor("content").shape == (0, 24)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--stride", "3"], "stride: found 3, expected a multiple of the network's patch size, 2, up to"),
        (["--stride", "0"], "stride: found 0, expected 1 or more"),
        (["--spacing", "-1"], "spacing: found -1, expected more than 0"),
        (["--tokenizer", "nowhere"], "tokenizer 'nowhere'"),
        (["--output", "scans"], "scans: a folder, expected the name of a file to write"),
        (["--input", "nowhere"], "nowhere: no such file or folder"),
    ],
)
def test_what_can_not_be_is_one_line(
    tmp_path: Path, scans: Path, make_run: Callable[..., Path], options: list[str], message: str,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    spec = str(tmp_path / "tokenizer.safetensors")
    make_run(write_tokenizer(Path(spec)), spec)
    assert main(["encode", "run", "--input", "scans", "--output", "table.safetensors", *options]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not Path("table.safetensors").exists()
