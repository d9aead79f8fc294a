"""CPU seconds of a step's parts, in this process, measured around the product's own hooks."""

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import lightning.pytorch as pl
import torch

from benchmarks.clock import cpu_seconds
from benchmarks.our_side import make_data, make_module, make_rollouts, make_trainer
from benchmarks.shapes import Work
from rlif_lightning import RLIFModule
from rlif_lightning.sampling import NativeSampler

PHASES = ("rollout", "reference", "forward and loss", "backward", "optimiser")
UPDATE = PHASES[2:]

Seconds = dict[str, float]  # phase -> CPU seconds of one step; the whole under "step"


class Stopwatch:
    """Adds up CPU seconds under names."""

    def __init__(self) -> None:
        self.seconds: Seconds = defaultdict(float)

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Count what happens inside."""
        start = cpu_seconds()
        yield
        self.seconds[name] += cpu_seconds() - start

    def take(self) -> Seconds:
        """What was counted, and start again."""
        taken, self.seconds = dict(self.seconds), defaultdict(float)
        return taken


class TimedSampler(NativeSampler):
    """Counts the rollout."""

    watch: Stopwatch

    def sample(self, *args: Any, **kwargs: Any) -> Any:
        """As in the base class."""
        with self.watch("rollout"):
            return super().sample(*args, **kwargs)


class TimedModule(RLIFModule):
    """Counts the reference and the update."""

    watch: Stopwatch

    def configure_model(self) -> None:
        """As in the base class; a reference that scores is counted."""
        super().configure_model()
        policy: Any = self.policy
        own = policy.reference

        @contextmanager
        def counted(kind: Any) -> Iterator[Any]:
            with self.watch("reference"), own(kind) as model:
                yield model

        policy.reference = counted

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """As in the base class."""
        with self.watch("forward and loss"):
            return super().training_step(*args, **kwargs)

    def backward(self, *args: Any, **kwargs: Any) -> None:
        """As in the base class."""
        with self.watch("backward"):
            super().backward(*args, **kwargs)

    def on_before_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """As in the base class; it takes the gradient's norm."""
        with self.watch("optimiser"):
            super().on_before_optimizer_step(*args, **kwargs)

    def configure_gradient_clipping(self, *args: Any, **kwargs: Any) -> None:
        """As in the base class."""
        with self.watch("optimiser"):
            super().configure_gradient_clipping(*args, **kwargs)


def timed_adamw(watch: Stopwatch) -> type[torch.optim.AdamW]:
    """AdamW that counts its step, without the closure that Lightning runs inside it."""

    class TimedAdamW(torch.optim.AdamW):
        def step(self, closure: Callable[[], Any] | None = None) -> Any:
            loss = None if closure is None else closure()
            with watch("optimiser"):
                super().step()
            return loss

    return TimedAdamW


class Steps(pl.Callback):
    """Cuts a run into steps, from first slice to first slice."""

    def __init__(self, watch: Stopwatch) -> None:
        self.watch, self.start = watch, 0.0
        self.steps: list[Seconds] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """A step begins with its first slice."""
        if batch["slice"] == 0:
            if trainer.global_step:
                self._close()
            self.watch.take()
            self.start = cpu_seconds()

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """The last step is done."""
        self._close()

    def _close(self) -> None:
        self.steps.append({**self.watch.take(), "step": cpu_seconds() - self.start})


def measure(work: Work, repeats: int, warmup: int = 1) -> list[Seconds]:
    """Run steps of our side; returns the seconds of those after the warm-up."""
    torch.set_num_threads(1)
    watch = Stopwatch()
    work, steps = replace(work, steps=warmup + repeats), Steps(watch)
    sampler = TimedSampler()
    module = make_module(work, TimedModule, timed_adamw(watch))
    sampler.watch = module.watch = watch  # type: ignore[attr-defined]
    trainer = make_trainer(work, [steps, make_rollouts(work, sampler=sampler)])
    trainer.fit(module, datamodule=make_data(work))
    return steps.steps[warmup:]
