"""Progress in optimiser steps or problems: a bar on a terminal, a line now and then in a log file."""

import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from tqdm import tqdm

SHOWN = {  # the most important ones first: a narrow terminal shows no more
    "val": ("val/accuracy_sampled", "val/accuracy"),
    "reward": ("rollout/reward",),
    "entropy": ("rollout/entropy",),
    "accuracy": ("rollout/accuracy",),
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
        self._enabled, self._open = True, False
        self._bar: Any = None  # a tqdm, made when there is something to show: messages come before it
        self._what, self._unit, self._total, self._first, self._done = "", "", 0, 0, 0
        self._values: dict[str, str] = {}
        self._opened = self._shown = 0.0

    def disable(self) -> None:
        """Show nothing: Lightning asks for it on all processes but the first."""
        self._enabled = False

    def enable(self) -> None:
        """Show again."""
        self._enabled = True

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Begin at the step that the run starts from."""
        self.begin("Training", "step", pl_module.total_steps(), trainer.global_step)

    def on_before_backward(self, trainer: Trainer, *_: Any) -> None:
        """A rollout has been collected, if one was due: show its numbers."""
        self._take_values(trainer)
        self.show()

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        """Move on when an optimiser step was taken."""
        self._take_values(trainer)
        self.show(trainer.global_step)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show the last evaluation and end."""
        self._take_values(trainer)
        self.end()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave the line to the message."""
        self.end()

    def sampling(self, token: int, most: int) -> None:
        """How far a rollout is."""
        self.show(note=f"Sampling token {token}/{most}")

    def evaluating(self, problem: int, problems: int, token: int, most: int) -> None:
        """How far an evaluation is."""
        self.show(note=f"Evaluating {problem}/{problems}, token {token}/{most}")

    def _take_values(self, trainer: Trainer) -> None:
        known = trainer.callback_metrics
        found = {name: next((known[key] for key in keys if key in known), None) for name, keys in SHOWN.items()}
        self._values = {name: f"{float(value):.3f}" for name, value in found.items() if value is not None}

    def begin(self, what: str, unit: str, total: int, done: int = 0) -> None:
        """Count some units of work from now on, until :meth:`end`."""
        self._what, self._unit, self._total, self._first, self._done = what, unit, total, done, done
        self._values, self._open = {}, self._enabled
        self._opened = self._shown = time.monotonic()

    def show(self, done: int | None = None, note: str | None = None) -> None:
        """Tell how much is done, and what is under way; shown if the last time is long enough ago."""
        terminal, now = sys.stderr.isatty(), time.monotonic()
        moved = done is not None and done != self._done
        if done is not None:
            self._done = done
        waited = now - self._shown >= (REDRAW if terminal else self.seconds)
        if self._open and (waited or (moved and terminal)):
            self._shown = now
            (self._draw if terminal else self._write)(note)

    def end(self) -> None:
        """Show where it ended, and nothing more."""
        if self._open:
            (self._draw if sys.stderr.isatty() else self._write)(None)
        self._open = False
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _draw(self, note: str | None) -> None:
        if self._bar is None:
            # Sizes are given: a terminal that reports none of its own would show nothing.
            self._bar = tqdm(total=self._total, initial=self._first, miniters=0, ncols=80, nrows=20)
        parts = [f"{name} {value}" for name, value in self._values.items()]
        columns = shutil.get_terminal_size().columns or 80
        while parts and len(", ".join(parts)) > columns - 50:  # the bar keeps ten columns
            parts.pop()
        numbers = ", ".join(filter(None, [*parts, self._speed()]))
        text = [f"{note or self._what} {self._done}/{self._total}", "|{bar}|", numbers]
        self._bar.n, self._bar.ncols, self._bar.bar_format = self._done, columns - 1, " ".join(filter(None, text))
        self._bar.refresh()

    def _speed(self) -> str:
        """Time per unit, the first rollout included, and what is left."""
        done = self._done - self._first
        if not done:
            return ""
        each = (time.monotonic() - self._opened) / done
        return f"{spoken(each)}/{self._unit}, {spoken(each * (self._total - self._done))} left"

    def _write(self, note: str | None) -> None:
        parts = [f"{self._what}: {self._done}/{self._total} {self._unit}s", *([note.lower()] if note else [])]
        parts += [f"{name} {value}" for name, value in self._values.items()]
        parts += filter(None, [self._speed()])
        print(", ".join(parts), file=sys.stderr, flush=True)


@contextmanager
def counting(bar: Any, what: str, unit: str, total: int) -> Iterator[Callable[..., None]]:
    """Show the progress of work that is no fit: yields ``tell(done, note)``; another bar, or none, shows nothing."""
    if isinstance(bar, StepProgressBar):
        bar.begin(what, unit, total)
    else:
        bar = StepProgressBar()  # not begun: silent
    try:
        yield bar.show
    finally:
        bar.end()


def spoken(seconds: float) -> str:
    """A duration in the unit that people would say it in."""
    for size, unit in ((86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 1.5 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"


def print_above_bar(text: str) -> None:
    """Print a line, colours included, while a bar may stand on the terminal."""
    with tqdm.external_write_mode(file=sys.stderr):
        print(text, file=sys.stderr, flush=True)


def say_above_bar(text: str, warning: bool = False) -> None:
    """Say something on a line of its own while a bar may stand on the terminal."""
    with tqdm.external_write_mode(file=sys.stderr):
        (rank_zero_warn if warning else rank_zero_info)(text)
