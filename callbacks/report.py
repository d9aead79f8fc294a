"""A picture and a table at the end of every fit."""

import shlex
from collections.abc import Sequence
from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from rlif_lightning.callbacks.logging import run_logger
from rlif_lightning.errors import disk_failure, said_by_python
from rlif_lightning.runs.curves import write_report
from rlif_lightning.runs.finished import note_finished
from rlif_lightning.runs.folder import METRICS
from rlif_lightning.runs.held_out import load_held_out
from rlif_lightning.runs.logger import EVENTS
from rlif_lightning.runs.summary import summary_table

LONGEST = 30  # characters of a question that is proposed
OTHER = "trajectory_entropy"  # the internal reward that held its gain longest in docs/study.md


class Report(Callback):
    """Writes ``curves.png``, ``summary.txt`` and ``report.html`` from the run's files; notes that it is finished.

    Args:
        recipe: What the run was started from, as ``--config`` takes it, for the commands that it proposes.
    """

    def __init__(self, recipe: Sequence[str] = ()) -> None:
        self.recipe = list(recipe)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write both and name them; a training is not lost for a picture."""
        folder = trainer.log_dir
        if folder is None or not trainer.is_global_zero or not (Path(folder) / METRICS).is_file():
            return
        try:
            summary = summary_table(Path(folder))
            picture, _, page = write_report(Path(folder), summary)
            logger = run_logger(trainer)
            if logger is not None:
                logger.log_picture("Overview/story", picture, trainer.global_step)
            rank_zero_info(f"\n{summary}\n{self._next(Path(folder), page)}")
        except Exception as error:
            if disk_failure(error):
                raise  # the disk's fault and not the picture's: the run is not finished, and continues to its picture
            rank_zero_warn(f"No curves.png: {said_by_python(error)}; draw it with `rlif report {folder}`")
        note_finished(Path(folder), trainer.global_step, (trainer.max_steps, trainer.max_epochs))

    def _next(self, folder: Path, page: Path) -> str:
        """Where to look, and the commands that people want now."""
        recipe = " ".join(f"--config {name}" for name in self.recipe)
        shows = {f"tensorboard --logdir {folder.parent.parent}": "all runs"} if any(folder.glob(EVENTS)) else {}
        commands = {
            **shows,
            f"rlif sample {folder}{_question(folder)}": "ask it questions",
            f"rlif export {folder}": "a model folder; the guard's weights if it fired",
        }
        if recipe and OTHER not in self.recipe:
            commands[f"rlif fit {recipe} --config {OTHER}"] = "another reward"
            other = folder.parent.with_name(f"{folder.parent.name}+{OTHER}") / "1"
            commands[f"rlif report {folder} {other}"] = "both in one picture"
        width = max(map(len, commands))
        look = f"Curves, answers and settings on one page: {page}"
        return "\n".join([look, "Next:", *(f"  {command:<{width}}  # {what}" for command, what in commands.items())])


def _question(folder: Path) -> str:
    """A held-out problem as a word of the command line, where it is short and plain."""
    texts = [row["problem"] for rows in load_held_out(folder).values() for row in rows]
    found = next((text for text in texts if len(text) <= LONGEST and text.isprintable()), None)
    return "" if found is None else f" {shlex.quote(found)}"
