"""The logger of a run folder: TensorBoard events and metrics.csv."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.loggers.logger import rank_zero_experiment
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from rlif_lightning.errors import DiskFailure, writing
from rlif_lightning.runs.atomic import truncate_jsonl
from rlif_lightning.runs.folder import METRICS, ROWS
from rlif_lightning.runs.metrics_csv import MetricsCSV, read_metrics

EVENTS = "events.out.tfevents.*"
CHARTS = {
    "reward": r"rollout/reward(/.*)?$",
    "self-certainty (nats)": r"rollout/self_certainty$",
    "entropy and log-probability (nats)": r"rollout/(entropy|logprob|start_logprob)$",
    "accuracy": r"(val/accuracy(_sampled)?|rollout/accuracy)$",
    "agreement": r"rollout/agreement$",
    "completion length (tokens)": r"rollout/completion_tokens$",
    "truncated share": r"rollout/truncated_fraction$",
    "KL to the reference (nats)": r"rollout/kl$",
    "time (seconds)": r"time/.*",
}
"""TensorBoard's custom-scalars page; tags are regular expressions, matched from a tag's beginning."""


class LazyWriter(SummaryWriter):
    """Makes its event file with the first event: Lightning asks for the writer before it loads a checkpoint."""

    _made = False

    def __init__(self, log_dir: str) -> None:
        super().__init__(log_dir)
        self._made = True

    def _get_file_writer(self) -> Any:
        return super()._get_file_writer() if self._made else None


class RunLogger(TensorBoardLogger):
    """Writes TensorBoard events and metrics.csv into one run folder, which is the trainer's ``log_dir``.

    A run that continues from the checkpoint of ``resume_step`` goes back there with :meth:`begin`, or before the
    first write: its logs are cut, and TensorBoard forgets events from that step on. A checkpoint that is refused
    leaves the folder as it was.
    """

    def __init__(self, folder: str | Path, resume_step: int | None = None) -> None:
        folder = Path(folder).expanduser()
        self.folder = folder.resolve() if folder.name in ("", "..") else folder
        super().__init__(str(self.folder.parent), name="", version=self.folder.name, default_hp_metric=False)
        self.resume_step = resume_step
        self._metrics: MetricsCSV | None = None
        self._earlier_events: list[Path] = []
        self.failure: DiskFailure | None = None  # why nothing is logged any more

    @property
    def log_dir(self) -> str:
        """The run folder."""
        return str(self.folder)

    @property
    @rank_zero_experiment
    def experiment(self) -> SummaryWriter:
        """TensorBoard's writer."""
        if self._experiment is None:
            self._earlier_events = sorted(self.folder.glob(EVENTS))
            self._experiment = LazyWriter(self.log_dir)
        return self._experiment

    def attempt(self, write: Callable[[], object]) -> None:
        """Write into the run folder; once a disk has refused that, nothing more: the run is to be saved and end."""
        if self.failure is None:
            try:
                with writing(self.folder):
                    self.begin()
                    write()
            except DiskFailure as failure:
                self.failure = failure
                rank_zero_warn(f"Nothing more is logged: {str(failure).splitlines()[0]}")

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Write scalars to TensorBoard and metrics.csv.

        ``epoch``, which Lightning adds to every call, is left out: the step is the only x axis.
        """
        scalars = {name: float(value) for name, value in metrics.items() if name != "epoch"}
        log_events = super().log_metrics

        def write() -> None:
            assert self._metrics is not None
            at = (self._metrics.last_step or 0) if step is None else step
            self._metrics.log(at, scalars)
            log_events(scalars, at)
            self.save()

        self.attempt(write)

    @rank_zero_only
    def log_text(self, tag: str, text: str, step: int) -> None:
        """Write a text (Markdown) to TensorBoard."""
        self.attempt(lambda: self.experiment.add_text(tag, text, step))

    @rank_zero_only
    def log_histogram(self, tag: str, values: Tensor, step: int) -> None:
        """Write the distribution of the finite values to TensorBoard; nothing if none is finite."""
        finite = values[torch.isfinite(values)].detach().float().cpu()  # one-dimensional
        if len(finite):
            self.attempt(lambda: self.experiment.add_histogram(tag, finite, step))

    @rank_zero_only
    def save(self) -> None:
        """Flush the events to the disk, and write no hparams.yaml: config.yaml says more."""
        self.experiment.flush()

    @rank_zero_only
    def begin(self) -> None:
        """Prepare the folder, once; to be called when a checkpoint was accepted."""
        if self._metrics is not None:
            return
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog

        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / METRICS
        if self.resume_step is not None:
            if path.is_file() and not read_metrics(path):
                rank_zero_warn(f"{path} is empty: the rows of earlier steps are lost.")
            for name in ROWS:
                truncate_jsonl(self.folder / name, self.resume_step)
            MetricsCSV.truncate(path, self.resume_step)
        writer = self.experiment
        events = writer._get_file_writer()
        if self.resume_step is not None:
            for own in {*self.folder.glob(EVENTS)} - {*self._earlier_events}:
                date_event_files_back(self._earlier_events, own)
        # TensorBoard forgets older events from this mark on, as by SummaryWriter(purge_step=...). A new run is marked
        # too: TensorBoard takes its first mark for the run's beginning and forgets nothing.
        start = SessionLog(status=SessionLog.START)
        events.add_event(Event(step=self.resume_step or 0, session_log=start))
        writer.add_custom_scalars({"RLIF": {name: ["Multiline", [tags]] for name, tags in CHARTS.items()}})
        self._metrics = MetricsCSV(path)


def date_event_files_back(files: Sequence[Path], new: Path) -> None:
    """Rename a run's earlier event files, in the order of their names, that would not stand before a new one.

    TensorBoard reads a run's event files in the order of their names, which hold the second of their creation: a
    run that goes on within that second, or after the clock was set back, would be read before its own beginning.
    """
    if files and files[-1].name > new.name:
        first = int(new.name.split(".")[3]) - len(files)
        for second, file in enumerate(files, first):
            name = file.name.split(".")
            file.rename(file.with_name(".".join([*name[:3], f"{second:010d}", *name[4:]])))
