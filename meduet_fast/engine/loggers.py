"""Hand a run's figures to TensorBoard, Weights & Biases and MLflow; what is not named is not imported."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar, Protocol
from uuid import uuid4

from meduet_fast.errors import UserError, install_hint
from meduet_fast.files import atomic_path

BOARD = "tensorboard"  # folder in that of the run
IDENTITIES_FILE = "loggers.json"


class Logger(AbstractContextManager, Protocol):
    """One place that figures go to, open while the run lasts.

    Attributes:
        module, attribute: what has to be there.
        extra: that brings it.
        identity: of the run in that place, by which a resumed one goes on in it; None where none is needed.
    """

    module: ClassVar[str]
    attribute: ClassVar[str]
    extra: ClassVar[str]
    identity: str | None

    def __init__(self, run: Path, start: int, settings: Mapping[str, Any], identity: str | None) -> None:
        """Open it.

        Args:
            run: the run's folder.
            start: the first step that will be reported.
            settings: of the run, under dotted names.
            identity: of the attempt that is resumed; None begins anew.

        Raises:
            UserError: if the place refuses.
        """

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Take in the values of a step."""


class TensorBoard(Logger):
    """TensorBoard's event files in the run's folder."""

    module, attribute, extra = "torch.utils.tensorboard", "SummaryWriter", "train"

    def __init__(self, run: Path, start: int, settings: Mapping[str, Any], identity: str | None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.identity = None
        self._board = SummaryWriter(str(run / BOARD), purge_step=start)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._board.add_scalar(name, value, step)

    def __exit__(self, *_: object) -> None:
        self._board.close()


class WandB(Logger):
    """Weights & Biases; project, account and mode are what its environment variables say."""

    module, attribute, extra = "wandb", "init", "wandb"

    def __init__(self, run: Path, start: int, settings: Mapping[str, Any], identity: str | None) -> None:
        import wandb

        self.identity = identity or uuid4().hex
        name = os.environ.get("WANDB_NAME", run.resolve().name)
        try:
            self._run = wandb.init(
                id=self.identity, resume="allow", name=name, dir=str(run), config=dict(settings)
            )
        except wandb.Error as error:
            raise UserError(f"loggers: wandb: {error}; WANDB_MODE=offline needs no account") from error
        self._next = self._run.step  # earlier ones it has, and takes no step twice

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        if step >= self._next:
            self._run.log(dict(values), step=step)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._run.finish(exit_code=int(kind is not None))


class MLflow(Logger):
    """MLflow; server and experiment are what its environment variables say."""

    module, attribute, extra = "mlflow", "start_run", "mlflow"

    def __init__(self, run: Path, start: int, settings: Mapping[str, Any], identity: str | None) -> None:
        import mlflow

        try:
            active = mlflow.start_run(run_id=identity, run_name=run.resolve().name)
            if identity is None:
                mlflow.log_params(settings)
        except mlflow.MlflowException as error:
            raise UserError(f"loggers: mlflow at {mlflow.get_tracking_uri()}: {error}") from error
        self._mlflow, self.identity = mlflow, active.info.run_id

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._mlflow.log_metrics(values, step=step, synchronous=False)  # training waits for no server

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._mlflow.end_run("FINISHED" if kind is None else "FAILED")


LOGGERS: dict[str, type[Logger]] = {"tensorboard": TensorBoard, "wandb": WandB, "mlflow": MLflow}


def logger_names(text: str) -> list[str]:
    """Split names at commas: "tensorboard,wandb".

    Raises:
        ValueError: for a name that is not known.
    """
    names = [name.strip() for name in text.split(",")]
    unknown = [repr(name) for name in names if name not in LOGGERS]
    if unknown:
        raise ValueError(f"found {', '.join(unknown)}, expected some of {','.join(LOGGERS)}")
    return list(dict.fromkeys(names))


def require_loggers(names: str) -> None:
    """Import what loggers need.

    Raises:
        UserError: naming the package that can't be imported, and its extra.
    """
    for name in logger_names(names):
        logger = LOGGERS[name]
        try:
            getattr(import_module(logger.module), logger.attribute)  # a folder "wandb" imports as well
        except (ImportError, AttributeError) as error:
            raise UserError(
                f"loggers: {name} can't be imported ({error}): {install_hint(logger.extra)}, or leave it out"
            ) from error


@contextmanager
def open_loggers(names: str, run: Path, start: int, settings: Mapping[str, Any]) -> Iterator[list[Logger]]:
    """Open loggers for a run; a resumed one goes on where the attempt before it was.

    Args:
        names: as :func:`logger_names` takes them.
        run: the run's folder; ``loggers.json`` in it keeps the identities.
        start: the first step that will be reported.
        settings: of the run, under dotted names.

    Raises:
        UserError: if one refuses.
        OSError: if the folder can't be written.
    """
    path = run / IDENTITIES_FILE
    identities = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    with ExitStack() as stack:
        loggers: list[Logger] = []
        for name in logger_names(names):
            logger = LOGGERS[name](run, start, settings, identities.get(name))
            loggers.append(stack.enter_context(logger))
            if logger.identity != identities.get(name):
                identities[name] = logger.identity
                with atomic_path(path) as temporary:
                    temporary.write_text(json.dumps(identities), encoding="utf-8")
        yield loggers


def log_pictures(run: Path, step: int, pngs: Mapping[str, Path]) -> None:
    """Add pictures to a run's TensorBoard folder, in the place of those that were there of the same step.

    They have a folder of their own, ``tensorboard/report``: of two files in one TensorBoard follows the newer
    alone, and a run that goes on would stand still.

    Args:
        run: the run's folder.
        step: that they show.
        pngs: their names, and the files.

    Raises:
        OSError: if a file can't be read or written.
    """
    from matplotlib.image import imread
    from torch.utils.tensorboard import SummaryWriter

    folder, ending = run / BOARD / "report", f".step{step}"
    for before in folder.glob(f"*{ending}"):
        before.unlink()
    with SummaryWriter(str(folder), filename_suffix=ending) as board:
        for name, path in pngs.items():
            image = imread(path)  # (H, W) or (H, W, channels)
            board.add_image(name, image, step, dataformats="HWC"[: image.ndim])
