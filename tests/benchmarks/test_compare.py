"""Which changes between two runs count."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.compare import compare, main
from benchmarks.results import Results, Row

from .made_up import against, make_results, timed

ROOT = Path(__file__).resolve().parents[2]


def one(median: float, variant: str = "ours", **ratios: float) -> Results:
    """A run of one row."""
    row = Row("pool", "B=4", variant, **timed(median), **against(**ratios))
    return make_results(device="Some CPU", rows=[row])


def verdicts(before: Results, after: Results) -> dict[tuple[str, str], str]:
    return {(change.key[0], change.key[2]): change.verdict for change in compare(before, after)}


def run(tmp_path: Path, before: Results, after: Results, *options: str) -> int:
    """Exit code of the command on two files."""
    files = [str(results.save(tmp_path / f"{name}.json")) for name, results in (("a", before), ("b", after))]
    return main([*files, *options])


def test_a_run_equals_itself(tmp_path, capsys):
    assert run(tmp_path, make_results(), make_results()) == 0
    printed = capsys.readouterr().out
    assert "26 same" in printed
    assert "slower" not in printed


def test_a_slower_time_fails(tmp_path, capsys):
    assert run(tmp_path, one(100), one(120)) == 1
    printed = capsys.readouterr().out
    assert "slower   1.20" in printed
    assert "1 of our rows became slower" in printed


def test_a_faster_time_passes(tmp_path, capsys):
    assert run(tmp_path, one(120), one(100)) == 0
    assert "1 faster" in capsys.readouterr().out


@pytest.mark.parametrize("after", [96.5, 103.5])
def test_noise_is_not_flagged(after):
    assert set(verdicts(one(100), one(after)).values()) == {"same"}


def test_a_small_change_is_not_flagged_even_if_the_spread_is_tiny():
    tight = {"low_us": 99.9, "high_us": 100.1}
    before, after = one(100), one(102)
    before = replace(before, rows=[replace(before.rows[0], **tight)])
    after = replace(after, rows=[replace(after.rows[0], low_us=101.9, high_us=102.1)])
    assert set(verdicts(before, after).values()) == {"same"}


def test_a_slow_machine_is_not_a_regression_where_a_peer_was_timed_beside():
    assert set(verdicts(one(100, eager=2.0), one(150, eager=2.0)).values()) == {"same"}


def test_the_ratio_shows_a_regression_that_a_faster_machine_hides():
    assert set(verdicts(one(100, eager=2.0), one(100, eager=1.5)).values()) == {"slower"}


def test_the_best_measured_peer_decides():
    before, after = one(100, eager=2.0, noisy=4.0), one(100, eager=1.5, noisy=4.0)
    spread = {"eager": (1.96, 2.04), "noisy": (1.0, 8.0)}
    before = replace(before, rows=[replace(before.rows[0], ratio_spread=spread)])
    (change,) = compare(before, after)
    assert change.basis == "ratio to eager"
    assert change.factor == pytest.approx(2 / 1.5)
    assert change.verdict == "slower"


def test_a_slower_peer_is_listed_and_decides_nothing(tmp_path, capsys):
    assert run(tmp_path, one(100, variant="eager"), one(200, variant="eager")) == 0
    assert "1 slower" in capsys.readouterr().out


def test_ours_no_longer_measured_fails(tmp_path, capsys):
    lost = Row("pool", "B=4", "ours", unavailable="capture failed")
    more = Row("pool", "B=8", "ours", **timed(1))
    before, after = one(100), one(100)
    before, after = replace(before, rows=[*before.rows, more]), replace(after, rows=[lost, more])
    assert run(tmp_path, before, after) == 1
    assert "no longer measured" in capsys.readouterr().out


def test_rows_of_one_run_only_are_listed(tmp_path, capsys):
    extra = [Row("pool", f"B={batch}", "ours", **timed(1)) for batch in (8, 16)]
    before, after = one(100), one(100)
    before, after = (
        replace(run, rows=[*run.rows, row]) for run, row in zip((before, after), extra, strict=True)
    )
    assert run(tmp_path, before, after) == 0
    printed = capsys.readouterr().out
    assert "only in A" in printed
    assert "only in B" in printed


def test_different_devices_are_refused(tmp_path, capsys):
    other = make_results(device="Some CPU")
    with pytest.raises(SystemExit, match="2"):
        run(tmp_path, make_results(), other)
    assert "different devices, NVIDIA H100 80GB HBM3 and Some CPU" in capsys.readouterr().err
    assert run(tmp_path, make_results(), other, "--any-device") == 0
    assert "device: NVIDIA H100 80GB HBM3 -> Some CPU" in capsys.readouterr().out


@pytest.mark.parametrize("content", [None, "", "[]", "{", '{"schema": 0}', '{"schema": 1, "rows": 3}'])
def test_unusable_files_are_named(tmp_path, capsys, content):
    good = make_results().save(tmp_path / "good.json")
    bad = tmp_path / "bad.json"
    if content is not None:
        bad.write_text(content)
    with pytest.raises(SystemExit, match="2"):
        main([str(good), str(bad)])
    message = capsys.readouterr().err.splitlines()[-1]
    assert "bad.json: not a file of results" in message


def test_nothing_in_common_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        run(tmp_path, one(100), one(100, variant="other"))
    assert "no measured row in common" in capsys.readouterr().err


def test_of_a_folder_the_latest_counts(tmp_path):
    one(100).save(tmp_path / "old" / "2026-01-01-c.json")
    one(500).save(tmp_path / "new" / "2026-01-02-c.json")
    one(100).save(tmp_path / "new" / "2026-01-03-c.json")
    assert main([str(tmp_path / "old"), str(tmp_path / "new")]) == 0
    with pytest.raises(SystemExit, match="2"):
        main([str(tmp_path / "old"), str(tmp_path)])


def test_the_command_runs_as_documented(tmp_path):
    files = [str(results.save(tmp_path / f"{n}.json")) for n, results in enumerate((one(100), one(120)))]
    command = [sys.executable, "-m", "benchmarks.compare", *files]
    done = subprocess.run(command, cwd=ROOT, env=dict(os.environ), capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (1, "")
