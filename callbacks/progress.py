"""Progress in optimiser steps or problems: a bar on a terminal, a line now and then in a log file."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from tqdm import tqdm

from rlif_lightning.evaluation.answering import EvaluationProgress
from rlif_lightning.sampling.protocol import Progress

SHOWN = {
    "reward": "rollout/reward",
    "entropy": "rollout/entropy",
    "accuracy": "rollout/accuracy",
    "val": "val/accuracy_sampled",
    "val greedy": "val/accuracy",
}
REDRAW = 0.1  # seconds between two pictures of the bar at least


class StepProgressBar(ProgressBar):
    """Counts the optimiser steps of a fit with reward, entropy and, where known, accuracy; elsewhere problems.

    A long rollout or evaluation shows how far it is. Where the error stream is no terminal, a bar would fill the
    log with its pictures: there it writes one line every so often, and one at the end.

    Args:
        seconds: Between two such lines at least.
    """

    def __init__(self, seconds: float = 15.0) -> None:
        super().__init__()
        self.seconds = seconds
        self._enabled = True
        self._bar: Any = None  # a tqdm, made when there is something to show: messages come before it
        self._what, self._unit, self._total, self._first, self._done = "", "", 0, 0, 0
        self._values: dict[str, str] = {}
        self._opened = self._shown = 0.0
        self._open = False

    def disable(self) -> None:
        """Show nothing: Lightning asks for it on all processes but the first."""
        self._enabled = False

    def enable(self) -> None:
        """Show again."""
        self._enabled = True

    # -- fit -------------------------------------------------------------------------------------------------

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin at the step that the run starts from."""
        self._begin("Training", "step", pl_module.total_steps(), trainer.global_step)  # type: ignore[operator]

    def on_before_backward(self, trainer: Trainer, *_: Any) -> None:
        """A rollout has been collected, if one was due: show its numbers."""
        self._show(values=_values(trainer))

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        """Move on when an optimiser step was taken."""
        self._show(done=trainer.global_step, values=_values(trainer))

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show the last evaluation and end."""
        self._show(values=_values(trainer))
        self._end()

    def sampling(self, token: int, most: int) -> None:
        """How far a rollout is."""
        self._show(note=f"Sampling token {token}/{most}")

    def evaluating(self, problem: int, problems: int, token: int, most: int) -> None:
        """How far an evaluation is."""
        self._show(note=f"Evaluating {problem}/{problems}, token {token}/{most}")

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave the line to the message."""
        self._end()

    # -- showing ---------------------------------------------------------------------------------------------

    def _begin(self, what: str, unit: str, total: int, done: int = 0) -> None:
        self._what, self._unit, self._total, self._first, self._done = what, unit, total, done, done
        self._values, self._open = {}, self._enabled
        self._opened = self._shown = time.monotonic()

    def _show(self, done: int | None = None, values: dict[str, str] | None = None, note: str | None = None) -> None:
        if not self._open:
            return
        moved = done is not None and done != self._done
        if done is not None:
            self._done = done
        if values is not None:
            self._values = values
        now = time.monotonic()
        if not sys.stderr.isatty():
            if now - self._shown >= self.seconds:
                self._shown = now
                self._write(note)
        elif moved or now - self._shown >= REDRAW:
            self._shown = now
            self._draw(note)

    def _draw(self, note: str | None) -> None:
        if self._bar is None:
            self._bar = tqdm(
                total=self._total, initial=self._first, unit=self._unit, desc=self._what, dynamic_ncols=True
            )
            self._bar.start_t -= time.monotonic() - self._opened  # the first rollout counts as well
        self._bar.n = self._done
        self._bar.set_description(note or self._what, refresh=False)
        self._bar.set_postfix(self._values, refresh=False)
        self._bar.refresh()

    def _write(self, note: str | None) -> None:
        parts = [f"{self._what}: {self._done}/{self._total} {self._unit}s", *([note.lower()] if note else [])]
        parts += [f"{name} {value}" for name, value in self._values.items()]
        if self._done > self._first:
            parts.append(f"{(time.monotonic() - self._opened) / (self._done - self._first):.2g} s/{self._unit}")
        print(", ".join(parts), file=sys.stderr, flush=True)

    def _end(self) -> None:
        if not self._open:
            return
        self._open = False
        if sys.stderr.isatty():
            self._draw(None)
        else:
            self._write(None)
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def _values(trainer: Trainer) -> dict[str, str]:
    known = trainer.callback_metrics
    return {name: f"{float(known[key]):.3f}" for name, key in SHOWN.items() if key in known}


@contextmanager
def counting(bar: Any, what: str, unit: str, total: int) -> Iterator[Callable[..., None]]:
    """Show the progress of work without a Trainer: yields ``tell(done, note)``; no bar shows nothing."""
    if not isinstance(bar, StepProgressBar):
        yield lambda done, note=None: None
        return
    bar._begin(what, unit, total)
    try:
        yield lambda done, note=None: bar._show(done=done, note=note)
    finally:
        bar._end()


def sampling_progress(trainer: Trainer) -> Progress | None:
    """What tells the bar how far a rollout is."""
    bar = trainer.progress_bar_callback
    return bar.sampling if isinstance(bar, StepProgressBar) else None


def evaluation_progress(trainer: Trainer) -> EvaluationProgress | None:
    """What tells the bar how far an evaluation is while fitting."""
    bar = trainer.progress_bar_callback
    return bar.evaluating if isinstance(bar, StepProgressBar) else None
