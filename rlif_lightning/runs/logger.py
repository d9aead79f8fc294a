"""The logger of a run folder: TensorBoard events and metrics.csv."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.loggers.logger import rank_zero_experiment
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
from tensorboard.compat.proto.tensor_pb2 import TensorProto
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from rlif_lightning.errors import DiskFailure, writing
from rlif_lightning.runs.atomic import truncate_jsonl
from rlif_lightning.runs.descriptions import description
from rlif_lightning.runs.folder import METRICS, ROWS
from rlif_lightning.runs.metrics_csv import MetricsCSV, read_metrics
from rlif_lightning.runs.settings_table import settings_table
from rlif_lightning.runs.story import ACCURACIES, REWARD

EVENTS = "events.out.tfevents.*"
STORY = (*ACCURACIES, REWARD, "guard/fired", "rollout/agreement", "rollout/entropy", "rollout/completion_tokens")
OVERVIEW = {name: f"Overview/{number} {name}" for number, name in enumerate(STORY, 1)}
"""What TensorBoard's first page begins with: it sorts tags, and capitals stand before small letters.

The numbers keep the order. Each has a chart of its own, in which every run has its own colour.
"""
IN_TABLE = 4  # of these metrics, the first stand next to the settings in TensorBoard's HPARAMS


class LazyWriter(SummaryWriter):
    """Makes its event file with the first event: Lightning asks for the writer before it loads a checkpoint."""

    _made = False

    def __init__(self, log_dir: str) -> None:
        super().__init__(log_dir)
        self._made = True

    def _get_file_writer(self) -> Any:
        return super()._get_file_writer() if self._made else None


class NoEvents:
    """Stands in for TensorBoard's writer, and for all that it returns, where no events are wanted."""

    def __getattr__(self, name: str) -> Callable[..., "NoEvents"]:
        return lambda *_, **__: self


class RunLogger(TensorBoardLogger):
    """Writes metrics.csv and, unless ``tensorboard`` is False, TensorBoard events into the trainer's ``log_dir``.

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
        self.tensorboard = True
        self._described: set[str] = set()  # metrics whose description this writer has written

    @property
    def log_dir(self) -> str:
        """The run folder."""
        return str(self.folder)

    @property
    @rank_zero_experiment
    def experiment(self) -> SummaryWriter:
        """TensorBoard's writer."""
        if not self.tensorboard:
            return NoEvents()  # type: ignore[return-value]
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

        def write() -> None:
            assert self._metrics is not None
            at = (self._metrics.last_step or 0) if step is None else step
            self._metrics.log(at, scalars)
            values = [self._scalar(name, value) for name, value in scalars.items()]
            self.experiment._get_file_writer().add_summary(Summary(value=values), at)
            self.save()

        self.attempt(write)

    def _scalar(self, name: str, value: float) -> Summary.Value:
        """A number as a tensor, as TensorFlow 2 writes it: TensorBoard shows a description of no other kind."""
        metadata = SummaryMetadata(plugin_data=SummaryMetadata.PluginData(plugin_name="scalars"))
        if name not in self._described:
            self._described.add(name)
            metadata.summary_description = description(name)
        tensor = TensorProto(float_val=[value], dtype="DT_FLOAT")
        return Summary.Value(tag=OVERVIEW.get(name, name), tensor=tensor, metadata=metadata)

    @rank_zero_only
    def log_hyperparams(self, params: Mapping[str, Any], *_: Any, **__: Any) -> None:  # type: ignore[override]
        """Put flat settings into TensorBoard's HPARAMS, next to the newest values of a few metrics.

        TensorBoard looks for those values among the curves, so this may come before any of them.
        """
        metrics = {name: OVERVIEW[name] for name in STORY[:IN_TABLE]}

        def write() -> None:
            for summary in settings_table(params, metrics):
                self.experiment._get_file_writer().add_summary(summary, 0)

        self.attempt(write)

    @rank_zero_only
    def log_picture(self, tag: str, path: Path, step: int) -> None:
        """Write a PNG file to TensorBoard."""
        picture = Summary.Value(tag=tag, image=Summary.Image(encoded_image_string=path.read_bytes()))
        self.attempt(lambda: self.experiment._get_file_writer().add_summary(Summary(value=[picture]), step))

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
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / METRICS
        if self.resume_step is not None:
            if path.is_file() and not read_metrics(path):
                rank_zero_warn(f"{path} is empty: the rows of earlier steps are lost.")
            for name in ROWS:
                truncate_jsonl(self.folder / name, self.resume_step)
            MetricsCSV.truncate(path, self.resume_step)
        events = self.experiment._get_file_writer()
        if self.resume_step is not None:
            for own in {*self.folder.glob(EVENTS)} - {*self._earlier_events}:
                date_event_files_back(self._earlier_events, own)
        # TensorBoard forgets older events from this mark on, as by SummaryWriter(purge_step=...). A new run is marked
        # too: TensorBoard takes its first mark for the run's beginning and forgets nothing.
        start = SessionLog(status=SessionLog.START)
        events.add_event(Event(step=self.resume_step or 0, session_log=start))
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
