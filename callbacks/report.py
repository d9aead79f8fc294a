"""A picture and a table at the end of every fit."""

from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from rlif_lightning.errors import disk_failure, said_by_python
from rlif_lightning.runs.curves import write_report
from rlif_lightning.runs.finished import note_finished
from rlif_lightning.runs.summary import summary_table


class Report(Callback):
    """Draws ``curves.png`` and writes ``summary.txt`` from the run's metrics.csv; notes that the run is finished."""

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write both and name them; a training is not lost for a picture."""
        folder = trainer.log_dir
        if folder is None or not trainer.is_global_zero or not (Path(folder) / "metrics.csv").is_file():
            return
        try:
            curves, table = write_report(Path(folder))
            rank_zero_info(f"\n{summary_table(Path(folder))}\nCurves: {curves}\nTable:  {table}")
        except Exception as error:
            if disk_failure(error):
                raise  # the disk's fault and not the picture's: the run is not finished, and continues to its picture
            rank_zero_warn(f"No curves.png: {said_by_python(error)}; draw it with `rlif report {folder}`")
        note_finished(Path(folder), trainer.global_step, (trainer.max_steps, trainer.max_epochs))
