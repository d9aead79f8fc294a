"""Trackio as a logger of Lightning: a local database in place of a service."""

from argparse import Namespace
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from io import StringIO
from typing import Any

from lightning.pytorch.loggers.logger import Logger, rank_zero_experiment
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only


class TrackioLogger(Logger):
    """Logs to Trackio, which ``pip install trackio`` brings and ``trackio show`` shows.

    Args:
        project: What the run belongs to.
        name: Of the run.
    """

    def __init__(self, project: str = "rlif", name: str | None = None) -> None:
        super().__init__()
        self._project, self._name = project, name
        self._run: Any = None

    @property
    def name(self) -> str:
        """The project."""
        return self._project

    @property
    def version(self) -> str | None:
        """The run."""
        return self._name

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """Trackio's run, begun with the first call."""
        if self._run is None:
            import trackio

            with redirect_stdout(StringIO()):  # it prints in colours
                self._run = trackio.init(self._project, name=self._name, embed=False)
            rank_zero_info(f"Trackio shows this run with: trackio show --project {self._project}")
        return self._run

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *_: Any, **__: Any) -> None:
        """Keep the settings as the run's configuration."""
        self.experiment.config.update(vars(params) if isinstance(params, Namespace) else params)

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Log numbers at a step."""
        self.experiment.log(dict(metrics), step=step)

    @rank_zero_only
    def log_table(self, name: str, rows: Sequence[Mapping[str, Any]], step: int) -> None:
        """Log rows with the same columns."""
        import pandas
        import trackio

        self.experiment.log({name: trackio.Table(dataframe=pandas.DataFrame(rows))}, step=step)

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Bring everything to the database; a run that was never begun has nothing."""
        if self._run is not None:
            import trackio

            trackio.finish()
            self._run = None
