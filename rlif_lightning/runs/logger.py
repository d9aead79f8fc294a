"""The logger of a run folder: TensorBoard events and metrics.csv."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor

from rlif_lightning.runs.atomic import truncate_jsonl
from rlif_lightning.runs.folder import COMPLETIONS, METRICS
from rlif_lightning.runs.metrics_csv import MetricsCSV

# TensorBoard's custom-scalars page; tags are regular expressions, matched from a tag's beginning.
LAYOUT = {
    "RLIF": {
        "reward": ["Multiline", [r"rollout/reward(/.*)?$"]],
        "self-certainty (nats)": ["Multiline", [r"rollout/self_certainty$"]],
        "entropy and log-probability (nats)": ["Multiline", [r"rollout/(entropy|logprob|start_logprob)$"]],
        "accuracy": ["Multiline", [r"val/accuracy(_sampled)?$", r"rollout/accuracy$"]],
        "agreement": ["Multiline", [r"rollout/agreement$"]],
        "completion length (tokens)": ["Multiline", [r"rollout/completion_tokens$"]],
        "truncated share": ["Multiline", [r"rollout/truncated_fraction$"]],
        "KL to the reference (nats)": ["Multiline", [r"rollout/kl$"]],
        "time (seconds)": ["Multiline", [r"time/.*"]],
    }
}


class RunLogger(TensorBoardLogger):
    """Writes TensorBoard events and metrics.csv into one run folder, which is the trainer's ``log_dir``.

    A resumed run goes back to its checkpoint's step before the first write: metrics.csv and completions.jsonl are
    cut, and TensorBoard forgets events from that step on. This waits until Lightning has loaded the checkpoint's
    weights: a checkpoint that does not fit the model leaves the folder as it was.

    Args:
        folder: The run folder.
        resume_step: Optimiser steps of the checkpoint that the run continues from, None for a new run.
    """

    def __init__(self, folder: str | Path, resume_step: int | None = None) -> None:
        self.folder = Path(folder).expanduser()
        if self.folder.name in ("", ".."):
            self.folder = self.folder.resolve()
        super().__init__(str(self.folder.parent), name="", version=self.folder.name, default_hp_metric=False)
        self.resume_step = resume_step
        self._metrics: MetricsCSV | None = None

    @property
    def log_dir(self) -> str:
        """The run folder."""
        return str(self.folder)

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Write scalars to TensorBoard and metrics.csv.

        ``epoch``, which Lightning adds to every call, is left out: the step is the only x axis.
        """
        table = self._begin()
        scalars = {name: float(value) for name, value in metrics.items() if name != "epoch"}
        if step is None:
            step = table.last_step or 0
        table.log(step, scalars)
        super().log_metrics(scalars, step)
        self.save()

    @rank_zero_only
    def log_text(self, tag: str, text: str, step: int) -> None:
        """Write a text (Markdown) to TensorBoard."""
        self._begin()
        self.experiment.add_text(tag, text, step)

    @rank_zero_only
    def log_histogram(self, tag: str, values: Tensor, step: int) -> None:
        """Write the distribution of the finite values to TensorBoard; nothing if none is finite."""
        self._begin()
        values = values.detach().float().cpu()
        values = values[torch.isfinite(values)]  # one-dimensional
        if len(values):
            self.experiment.add_histogram(tag, values, step)

    @rank_zero_only
    def log_graph(self, model: Any, input_array: Tensor | None = None) -> None:
        """Begin writing, without a graph; Lightning calls this once weights are loaded, before the first batch."""
        self._begin()

    @rank_zero_only
    def save(self) -> None:
        """Flush the events to the disk, and write no hparams.yaml: config.yaml says more."""
        self.experiment.flush()

    def _begin(self) -> MetricsCSV:
        """Prepare the folder before the first write and return its table."""
        if self._metrics is not None:
            return self._metrics
        self.folder.mkdir(parents=True, exist_ok=True)
        writer = self.experiment
        path = self.folder / METRICS
        if self.resume_step is not None:
            MetricsCSV.truncate(path, self.resume_step)
            truncate_jsonl(self.folder / COMPLETIONS, self.resume_step)
        _mark_start(writer, self.resume_step or 0)
        writer.add_custom_scalars(LAYOUT)
        self._metrics = MetricsCSV(path)
        return self._metrics


def _mark_start(writer: Any, step: int) -> None:
    """Tell TensorBoard that a process starts at this step, so that it forgets older events from this step on.

    SummaryWriter(purge_step=...) writes the same mark, but Lightning opens the writer before it loads the checkpoint.
    A new run is marked too: TensorBoard takes a run's first mark for its beginning and forgets nothing.
    """
    from tensorboard.compat.proto.event_pb2 import Event, SessionLog

    writer.file_writer.add_event(Event(step=step, session_log=SessionLog(status=SessionLog.START)))
