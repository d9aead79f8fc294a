"""Loggers besides the run's own: by a word in place of a class path, and tables for those that take some."""

import os
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch.loggers import CSVLogger, Logger, MLFlowLogger, WandbLogger

from rlif_lightning.errors import UserError, said_by_python
from rlif_lightning.runs.markdown import plain
from rlif_lightning.runs.trackio_logger import TrackioLogger

Word = Literal["wandb", "mlflow", "trackio", "csv", "none"]
"""What ``--trainer.logger`` takes besides classes; ``none`` takes TensorBoard away and adds nothing."""
PACKAGES = ("wandb", "mlflow", "trackio")  # words that are also the name of what must be installed
PROJECT = "rlif"  # of all runs there, unless a variable of the environment that wandb or MLflow reads names another


def asked_loggers(setting: Any) -> list[Any]:
    """What ``trainer.logger`` says as a list: true or null is nothing, false is ``none``."""
    if isinstance(setting, bool) or setting is None:
        return ["none"] if setting is False else []
    return list(setting) if isinstance(setting, list) else [setting]


def check_packages(asked: Sequence[Any]) -> None:
    """Refuse a word whose package is missing (UserError)."""
    for word in asked:
        if word in PACKAGES and find_spec(word) is None:
            raise UserError(
                f"trainer.logger {word} needs the package {word}, which is not installed",
                do=f"pip install {word}, or leave the setting out: TensorBoard and metrics.csv are always written",
            )


def start_logger(asked: Any, folder: Path, root: Path) -> Any:
    """The logger of a word for the run in ``folder`` below ``root``, or one made from a class path; it begins here.

    A logger that can't begin, such as one that is not logged in, is refused (UserError).
    """
    try:
        logger: Any = _made(asked, folder.absolute(), root.absolute()) if isinstance(asked, str) else asked
        getattr(logger, "experiment", None)
        return logger
    except Exception as error:  # whatever somebody else's package raises
        name = asked if isinstance(asked, str) else type(asked).__name__
        raise UserError(
            f"trainer.logger {name} can't begin",
            got=said_by_python(error),
            do="follow what it says, or leave it out; docs/loggers.md says how each of them works offline",
        ) from error


def _made(word: str, folder: Path, root: Path) -> Logger:
    name = (folder.relative_to(root) if folder.is_relative_to(root) else folder).as_posix()
    if word == "wandb":
        return WandbLogger(name=name, project=os.environ.get("WANDB_PROJECT", PROJECT), save_dir=folder)
    if word == "trackio":
        return TrackioLogger(PROJECT, name)
    if word == "mlflow":
        address = os.environ.get("MLFLOW_TRACKING_URI")
        if not address:  # MLflow 3 refuses a store of files unless it is asked for
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
            address = (root / "mlruns").as_uri()
        return MLFlowLogger(os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT), run_name=name, tracking_uri=address)
    return CSVLogger(folder, name="csv")


def other_table(logger: Logger, name: str, rows: Sequence[Mapping[str, Any]], step: int) -> None:
    """Log rows, which have the same columns, as a table; loggers of any other class take none."""
    rows = [{key: plain(value) if isinstance(value, str) else value for key, value in row.items()} for row in rows]
    columns = list(rows[0])
    if isinstance(logger, WandbLogger):
        logger.log_table(name, columns, [list(row.values()) for row in rows], step=step)
    elif isinstance(logger, MLFlowLogger):
        values = {column: [row[column] for row in rows] for column in columns}
        # A file each time: to add rows MLflow writes all of them anew, and takes a text of digits for a number.
        logger.experiment.log_table(logger.run_id, values, f"{name}_{step}.json")
    elif isinstance(logger, TrackioLogger):
        logger.log_table(name, rows, step)
