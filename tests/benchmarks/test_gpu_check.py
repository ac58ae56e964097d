"""The GPU check: a rehearsal of its parts on the CPU, and what becomes of parts that fail or overrun."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu_check.lib import bench, common
from benchmarks.results import Results, Row

ROOT = Path(__file__).resolve().parents[2]
MADE_UP = """
import sys
from benchmarks.gpu_check.lib.parts import Part, main

EMIT = "from benchmarks.gpu_check.lib.common import emit; "
PARTS = {
    "good": Part(3, ("-c", EMIT + "emit('a', 'ok', x=1)"), 0.5),
    "broken": Part(3, ("-c", EMIT + "emit('b', 'ok'); raise ValueError('a mistake')"), 0.5),
    "wrong": Part(3, ("-c", EMIT + "emit('c', 'fail', 'off by 2'); raise SystemExit(1)"), 0.5),
    "endless": Part(1, ("-c", EMIT + '''
import signal, subprocess, sys, time
emit('d', 'ok')
signal.signal(signal.SIGINT, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])
print('child', child.pid, flush=True)
time.sleep(600)
'''), 0.5),
}
import benchmarks.gpu_check.lib.parts as runner
runner.RESERVE, runner.GRACE, runner.LEAST = 0.0, 0.5, 0.5
sys.exit(main(sys.argv[1:], PARTS))
"""


def start(folder: Path, command: list[str]) -> subprocess.Popen[str]:
    # The check starts a pytest of its own, which is no worker of this one.
    outer = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    environment = outer | {
        "OUT": str(folder / "out"),
        "KIT_WORK": str(folder / "work"),
        "ROOT": str(ROOT),
    }
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    (folder / "out").mkdir(exist_ok=True)
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def findings(folder: Path) -> list[dict[str, Any]]:
    text = (folder / "out" / "results.jsonl").read_text(encoding="utf-8")
    assert text.endswith("\n")
    return [json.loads(line) for line in text.splitlines()]


def alive(process: int) -> bool:
    state = Path(f"/proc/{process}/stat")
    return state.exists() and state.read_text().rsplit(") ", 1)[1][0] != "Z"


def child_of(folder: Path) -> int:
    """The process that the endless part has started."""
    log = folder / "out" / "live.log"
    for _ in range(400):
        lines = log.read_text().splitlines() if log.exists() else []
        for line in lines:
            if line.startswith("child "):
                return int(line.split()[1])
        time.sleep(0.05)
    raise AssertionError("the endless part never began")


def test_what_fails_comes_first_and_what_overruns_is_killed(tmp_path: Path) -> None:
    arguments = ["--budget", "12", "--parts", "good,endless,broken,wrong"]
    process = start(tmp_path, [sys.executable, "-c", MADE_UP, *arguments])
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    summary = (tmp_path / "out" / "summary.txt").read_text()
    assert summary in printed
    found = [(item["part"], item["name"], item["status"]) for item in findings(tmp_path)]
    assert found == [
        ("good", "a", "ok"), ("endless", "d", "ok"), ("endless", "the part", "fail"), ("broken", "b", "ok"),
        ("broken", "the part", "fail"), ("wrong", "c", "fail"),
    ]  # fmt: skip
    lines = summary.splitlines()
    begin = lines.index("-- 3 failures, the first words of each (all: results.jsonl, live.log)")
    assert lines[begin + 1].startswith("endless | the part | ENDED at its limit")
    assert lines[begin + 2].startswith("broken | the part | exit code 1: ")
    assert lines[begin + 2].endswith("ValueError: a mistake")
    assert lines[begin + 3] == "wrong | c | off by 2"
    assert begin < lines.index("-- parts") < lines.index("-- figures")
    assert not alive(child_of(tmp_path))
    assert (tmp_path / "out" / "logs.tgz").is_file()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_findings_are_whole_after_a_kill(tmp_path: Path, number: signal.Signals) -> None:
    process = start(tmp_path, [sys.executable, "-c", MADE_UP, "--budget", "600", "--parts", "good,endless"])
    child = child_of(tmp_path)
    process.send_signal(number)
    printed, _ = process.communicate(timeout=30) if number == signal.SIGTERM else ("", process.wait(30))
    assert [item["name"] for item in findings(tmp_path)] == ["a", "d"]
    if number == signal.SIGTERM:
        assert process.returncode == 130
        assert "SUMMARY" in printed
        deadline = time.monotonic() + 20
        while alive(child):  # it was killed, and dies when it is its turn
            assert time.monotonic() < deadline
            time.sleep(0.01)
    else:
        os.killpg(os.getpgid(child), signal.SIGKILL)
    assert "good" in (tmp_path / "out" / "summary.txt").read_text()


def test_what_the_time_does_not_reach_is_not_begun(tmp_path: Path) -> None:
    process = start(tmp_path, [sys.executable, "-c", MADE_UP, "--budget", "0.3", "--parts", "good"])
    printed, _ = process.communicate(timeout=30)
    assert "good       not begun" in printed


def test_unknown_parts_are_refused(tmp_path: Path) -> None:
    process = start(tmp_path, [sys.executable, "-c", MADE_UP, "--parts", "good,god"])
    printed, _ = process.communicate(timeout=30)
    assert process.returncode == 2
    assert "no part god; there are good, broken, wrong, endless" in printed


CHILD = """
import sys
from pathlib import Path

made, *options = sys.argv[1:]
names = options[options.index("--only") + 1 : options.index("--seconds")]
path = Path(options[-1], "unfinished.json")
path.parent.mkdir(parents=True)
path.write_bytes(Path(made, "-".join(names[:2])).read_bytes())
print(f"{names[0]}: 3 s")
if len(names) > 1:  # the second breaks the device, or the process
    if names[1] == "lost":
        print("lost: 1 s")
    sys.exit(3 if names[1] == "lost" else 11)
"""


@pytest.mark.parametrize("second", ["lost", "crashed"])
def test_benchmarks_go_on_behind_one_that_breaks_the_device(
    second: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    popen = subprocess.Popen
    for names in (["first", second], ["third"]):  # what each of the two processes will have measured
        rows = [Row(name, "a", "ours", unavailable="not correct: off") for name in names]
        Results({"device": "x", "date": "2026", "commit": "c"}, {}, rows).save(tmp_path / "-".join(names))

    def start_child(command: list[str], **options: Any) -> subprocess.Popen[str]:
        return popen([sys.executable, "-c", CHILD, str(tmp_path), *command[3:]], **options)

    monkeypatch.setattr(subprocess, "Popen", start_child)
    monkeypatch.setattr(bench, "RESULTS", tmp_path / "benchmarks.json")
    monkeypatch.setattr(bench, "WORK", tmp_path)
    monkeypatch.setattr(bench, "LOGS", tmp_path)
    monkeypatch.setattr(common, "OUT", tmp_path)
    assert bench.measure("official", ["first", second, "third"]) != 0
    rows = Results.load(tmp_path / "benchmarks.json").rows
    assert [row.bench for row in rows] == ["first", second, "third"]
    told = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [item["status"] for item in told] == ["fail"] * (3 + (second == "crashed"))
    assert any("the process ended with" in item["text"] for item in told) == (second == "crashed")


def rehearse(
    folder: Path, parts: str, measure: Path = ROOT / "benchmarks" / "gpu_check" / "measure.sh"
) -> str:
    command = ["bash", str(measure), "--rehearse", "--budget", "300", "--parts", parts]
    process = start(folder, command)
    printed, _ = process.communicate(timeout=320)
    assert process.returncode == 0, printed
    assert "-- 0 failures" in printed, printed
    return printed


def ok(folder: Path, part: str) -> list[str]:
    return [item["name"] for item in findings(folder) if (item["part"], item["status"]) == (part, "ok")]


def test_rehearsal(tmp_path: Path) -> None:
    """As a GPU machine runs it: from a copy of the scripts, with a file that names the commit."""
    copy = tmp_path / ".gpu"
    (copy / "lib").mkdir(parents=True)
    scripts = ROOT / "benchmarks" / "gpu_check"
    for script in ("measure.sh", "lib/machine.sh"):
        (copy / script).write_bytes((scripts / script).read_bytes())
    (copy / "commit").write_text("0123456789ab\n")
    rehearse(tmp_path, "smoke,attention", copy / "measure.sh")
    assert "pretraining step, kernels against eager" in ok(tmp_path, "smoke")
    assert any(name.startswith("quadruplet_contrast-") for name in ok(tmp_path, "smoke"))
    assert any(name.endswith(", ours") for name in ok(tmp_path, "attention"))
    results = json.loads((tmp_path / "out" / "benchmarks.json").read_text())
    assert results["provenance"]["commit"] == "0123456789ab"
    assert {row["bench"] for row in results["rows"]} == {"attention"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("part", "expected"),
    [
        ("env", "import meduet_fast.cli"),
        ("tests", "test_training.py::test_a_step_never_waits_for_the_device[1-False]"),
        ("step", "step: small B=64 with MFTD, graph step bfloat16, ours, CUDA graph"),
        ("probe", "block B=2 static"),
        ("pretrain", "compiled, CUDA graph, with MFTD"),
        ("synthesis", "samples of unet_b, compiled"),
    ],
)
def test_rehearsal_of(part: str, expected: str, tmp_path: Path) -> None:
    rehearse(tmp_path, part)
    assert expected in ok(tmp_path, part)
