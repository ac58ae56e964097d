"""Figures by name to TensorBoard, W&B and MLflow; the latter two are small stand-ins here."""

from __future__ import annotations

import json
import runpy
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from matplotlib.image import imsave
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from meduet_fast.cli import main
from meduet_fast.engine import EngineConfig, fit
from meduet_fast.engine.loggers import log_pictures, open_loggers
from meduet_fast.engine.metrics import read_metrics
from meduet_fast.errors import UserError

OWN: dict[str, Any] = runpy.run_path(str(Path(__file__).parents[2] / "examples" / "own_task.py"))
CONFIG = EngineConfig(
    steps=6, batch_size=4, device="cpu", log_every=1, checkpoint_every=3, loggers="wandb, mlflow"
)


class Places:
    """What the stand-ins were told: (step, names) of each run's figures, and how each attempt ended."""

    def __init__(self) -> None:
        self.figures: dict[str, list[tuple[int, set[str]]]] = {}
        self.begun: list[tuple[str, str]] = []
        self.ended: list[tuple[str, object]] = []

    def take(self, run: str, step: int, values: dict[str, float]) -> None:
        self.figures.setdefault(run, []).append((step, set(values)))


def stand_in(name: str, **attributes: object) -> ModuleType:
    module = ModuleType(name)
    vars(module).update(attributes)
    return module


@pytest.fixture
def places(monkeypatch: pytest.MonkeyPatch) -> Places:
    told = Places()

    def init(**given: Any) -> SimpleNamespace:
        key = f"wandb {given['id']}"
        assert given["resume"] == "allow"
        assert given["config"]["steps"] == CONFIG.steps
        told.begun.append((key, given["name"]))
        return SimpleNamespace(
            step=max((step for step, _ in told.figures.get(key, [])), default=-1) + 1,
            log=lambda values, step: told.take(key, step, values),
            finish=lambda exit_code: told.ended.append((key, exit_code)),
        )

    def start_run(run_id: str | None, run_name: str) -> SimpleNamespace:
        told.begun.append((f"mlflow {run_id}", run_name))
        return SimpleNamespace(info=SimpleNamespace(run_id="of the server"))

    wandb = stand_in("wandb", Error=OSError, init=init)
    mlflow = stand_in(
        "mlflow", MlflowException=OSError, start_run=start_run, log_params=lambda settings: None,
        log_metrics=lambda values, step, synchronous: told.take("mlflow", step, values),
        end_run=lambda status: told.ended.append(("mlflow", status)), get_tracking_uri=lambda: "sqlite",
    )  # fmt: skip
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setitem(sys.modules, "mlflow", mlflow)
    return told


def test_a_resumed_run_goes_on_in_the_same_places(places: Places, tmp_path: Path) -> None:
    class Interrupted(OWN["Sines"]):  # type: ignore[misc]
        def read(self, *place: Any) -> Any:
            for number, batch in enumerate(super().read(*place)):
                if number == 5:
                    raise KeyboardInterrupt
                yield batch

    run = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        fit(lambda: (OWN["Denoiser"](), Interrupted()), CONFIG, run)
    assert fit(OWN["make"], replace(CONFIG, loggers="mlflow,wandb"), run, resume=True).finished
    assert not (run / "tensorboard").exists()

    identity = json.loads((run / "loggers.json").read_text())["wandb"]
    wandb, mlflow = f"wandb {identity}", "mlflow of the server"
    assert places.begun == [(wandb, "run"), ("mlflow None", "run"), (mlflow, "run"), (wandb, "run")]
    assert places.ended == [("mlflow", "FAILED"), (wandb, 1), (wandb, 0), ("mlflow", "FINISHED")]
    names = {"loss/error", "loss/slope", "loss/total", "run/grad_norm", "run/learning_rate"}
    assert all(names < found for _, found in places.figures[wandb])
    assert [step for step, _ in places.figures[wandb]] == [0, 1, 2, 3, 4, 5]  # no step twice
    assert [step for step, _ in places.figures["mlflow"]] == [0, 1, 2, 3, 3, 4, 5]
    assert [record["step"] for record in read_metrics(run)] == [0, 1, 2, 3, 4, 5]


def test_a_place_that_refuses_is_one_line_and_ends_the_others(places: Places, tmp_path: Path) -> None:
    def no_account(**_: object) -> None:
        raise OSError("no API key")

    sys.modules["wandb"].init = no_account  # type: ignore[attr-defined]
    with pytest.raises(UserError, match=r"^loggers: wandb: no API key; WANDB_MODE=offline"), \
            open_loggers("mlflow,wandb", tmp_path, 0, {}):  # fmt: skip
        pass
    assert places.ended == [("mlflow", "FAILED")]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ("wandb", "loggers: wandb can't be imported (import of wandb halted; None in sys.modules): "
                  "pip install '.[wandb]' in a clone of meduet-fast, or leave it out"),
        ("tensorboard,visdom", "loggers: found 'visdom', expected some of tensorboard,wandb,mlflow"),
        ("", "loggers: found '', expected some of tensorboard,wandb,mlflow"),
    ],
)  # fmt: skip
def test_what_is_not_there_is_refused_before_the_run(
    names: str,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    run = tmp_path / "run"
    arguments = ["pretrain", "--config", "demo", "--output", str(run), "--loggers", names, "--dry-run"]
    assert main(arguments) == 2
    assert capsys.readouterr().err == f"meduet-fast pretrain: {message}\n"
    if names == "wandb":
        with pytest.raises(UserError, match=r"^loggers: wandb can't be imported"):
            fit(OWN["make"], replace(CONFIG, loggers=names), run)
    assert not run.exists()


def test_a_folder_of_that_name_is_no_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """W&B makes one in the working directory, which Python would import."""
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    monkeypatch.setitem(sys.modules, "wandb", ModuleType("wandb"))
    with pytest.raises(
        UserError, match=r"^loggers: wandb can't be imported \(module 'wandb' has no attribute"
    ):
        fit(OWN["make"], replace(CONFIG, loggers="wandb"), tmp_path / "run")


def test_pictures_lie_beside_the_figures_once_a_step(tmp_path: Path) -> None:
    with open_loggers("tensorboard", tmp_path, 0, {}) as [board]:
        board.scalars(3, {"loss/total": 2.0})
    assert not (tmp_path / "loggers.json").exists()
    picture = tmp_path / "curves.png"
    imsave(picture, [[0.0, 1.0], [0.5, 0.2], [1.0, 0.0]])
    for step in (10, 110, 110):
        log_pictures(tmp_path, step, {"curves": picture, "styles": picture})

    scalars = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in scalars.Scalars("loss/total")] == [(3, 2.0)]
    pictures = EventAccumulator(str(tmp_path / "tensorboard" / "report")).Reload()
    assert pictures.Tags()["images"] == ["curves", "styles"]
    events = pictures.Images("curves")
    assert [(event.step, event.width, event.height) for event in events] == [(10, 2, 3), (110, 2, 3)]
