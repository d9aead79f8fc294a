"""When has training begun to collapse? A rule over signals that need no labels.

Agreement within a group peaks shortly after the true accuracy and falls; the frozen reference's log-likelihood of
the rollouts falls later, but also where agreement does not. Neither turns before the accuracy does: so a guard keeps
weights and hands back those of the signal's best step.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any, Literal

AGREEMENT = "rollout/agreement"
SIMILARITY = "rollout/similarity"
REFERENCE = "rollout/start_logprob"


@dataclass(frozen=True)
class Decision:
    """What one rollout means."""

    verdict: Literal["nothing", "best", "fired"]  # best: of the signal that decides what is handed back
    step: int  # optimiser steps taken by the weights that the rollout came from
    signal: str = ""  # the metric that decided; empty where nothing did
    value: float = math.nan  # smoothed
    best: float = math.nan  # smoothed, so far
    best_step: int = -1
    threshold: float = math.nan  # a value below this counts as a drop
    patience: int = 0  # consecutive rollouts below that fire

    @property
    def reason(self) -> str:
        """Why it has fired, in words."""
        row = f"{self.patience} rollouts in a row" if self.patience > 1 else "one rollout"
        return (
            f"at step {self.step} {self.signal} was {self.value:.4g}, for {row} below "
            f"{self.threshold:.4g}; its best was {self.best:.4g} at step {self.best_step}"
        )


@dataclass(frozen=True)
class RuleSettings:
    """The settings of :class:`~rlif_lightning.callbacks.CollapseGuard` that make its rule."""

    drop: float = 0.05  # of agreement or similarity, as a share of the best
    reference_drop: float = 0.15  # of the reference's log-likelihood, as a share of its first mean
    patience: int = 3  # consecutive rollouts below that fire
    smoothing: float = 0.3  # weight of a new value, above 0 and up to 1
    warmup: int = 3  # first rollouts, which enter the average but are not judged


@dataclass
class Watch:
    """Looks at one signal, of which larger is better, for a lasting drop from its running best.

    The signal is smoothed, ``x = (1 - smoothing) x + smoothing new``; a drop is ``x < best - drop |unit|``. The unit
    is the running best, or the mean of the first rollouts (``start``): for a log-likelihood, which comes so close to
    0 that any wiggle is a large part of its best.
    """

    signal: str  # name of the metric
    drop: float  # that counts, in the unit
    unit: Literal["best", "start"] = "best"
    patience: int = RuleSettings.patience
    smoothing: float = RuleSettings.smoothing
    warmup: int = RuleSettings.warmup
    absent: float | None = None  # what a missing value means once the signal has been there; None: it is skipped
    unless: str | None = None  # the watch only counts as long as this other signal has never been there
    steps: list[int] = field(default_factory=list, init=False)
    raw: list[float] = field(default_factory=list, init=False)
    smoothed: list[float] = field(default_factory=list, init=False)
    best: float | None = field(default=None, init=False)
    best_step: int = field(default=-1, init=False)
    below: int = field(default=0, init=False)

    @property
    def threshold(self) -> float:
        """A value below this counts as a drop."""
        if self.best is None:
            return -math.inf
        unit = self.best if self.unit == "best" else fmean(self.raw[: max(1, self.warmup)])
        return self.best - self.drop * abs(unit)

    def update(self, step: int, values: Mapping[str, float]) -> Decision:
        """Take in the metrics of a rollout; what is missing or not finite leaves no trace."""
        new = values.get(self.signal, self.absent if self.steps else None)
        if new is None or not math.isfinite(new):
            return Decision("nothing", step)
        value = new if not self.steps else (1 - self.smoothing) * self.smoothed[-1] + self.smoothing * new
        self.steps.append(step)
        self.raw.append(new)
        self.smoothed.append(value)
        if len(self.steps) <= self.warmup:
            return Decision("nothing", step)
        self.below = self.below + 1 if value < self.threshold else 0
        verdict: Literal["nothing", "best", "fired"] = "fired" if self.below == self.patience else "nothing"
        if self.best is None or value > self.best:
            self.best, self.best_step, verdict = value, step, "best"
        return Decision(verdict, step, self.signal, value, self.best, self.best_step, self.threshold, self.patience)


class CollapseRule:
    """Several watches: the first that fires decides, once, and its own best step is handed back.

    They stand in order of preference: as long as none has fired, the best step of the first that is there counts.
    """

    def __init__(self, watches: Sequence[Watch]) -> None:
        self.watches = list(watches)
        self.steps: list[int] = []  # of all rollouts
        self.fired: Decision | None = None

    def update(self, step: int, values: Mapping[str, float]) -> Decision:
        """Take in the metrics of a rollout; after it has fired only the history grows."""
        self.steps.append(step)
        decisions = [watch.update(step, values) for watch in self.watches]
        if self.fired is not None:
            return Decision("nothing", step)
        active = self.active
        for watch, decision in zip(self.watches, decisions, strict=True):
            if decision.verdict == "fired" and watch in active:
                self.fired = decision
                return decision
        if active and active[0].best_step == step:
            return decisions[self.watches.index(active[0])]
        return Decision("nothing", step)

    @property
    def active(self) -> list[Watch]:
        """The watches that count and have a best; the first is the primary."""
        there = {watch.signal for watch in self.watches if watch.steps}
        return [watch for watch in self.watches if watch.best is not None and watch.unless not in there]

    @property
    def best_step(self) -> int | None:
        """The step whose weights are handed back: that of the firing, until then the primary's; None before it."""
        if self.fired is not None:
            return self.fired.best_step
        return self.active[0].best_step if self.active else None

    @property
    def needed_steps(self) -> set[int]:
        """Steps whose weights may still be handed back."""
        if self.fired is not None:
            return {self.fired.best_step}
        return {watch.best_step for watch in self.active}

    def state_dict(self) -> dict[str, Any]:
        """What has been seen, as plain numbers; all else follows from it."""
        return {
            "steps": list(self.steps),
            "signals": {w.signal: {"steps": list(w.steps), "raw": list(w.raw)} for w in self.watches},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go through it all again, with the settings of now."""
        signals = {
            name: dict(zip(seen["steps"], seen["raw"], strict=True)) for name, seen in state["signals"].items()
        }
        for step in state["steps"]:
            self.update(step, {name: seen[step] for name, seen in signals.items() if step in seen})


def default_rule(
    signals: Sequence[str] = (AGREEMENT, SIMILARITY, REFERENCE), settings: RuleSettings = RuleSettings()
) -> CollapseRule:
    """Agreement or the reference's log-likelihood; similarity where there are no answers to agree on.

    The first signal is the primary.
    """
    return CollapseRule(
        [
            Watch(
                signal,
                settings.reference_drop if signal == REFERENCE else settings.drop,
                "start" if signal == REFERENCE else "best",
                settings.patience,
                settings.smoothing,
                settings.warmup,
                # A rollout without any answer has no agreement; where there was some before, it has fallen to 0.
                absent=0.0 if signal == AGREEMENT else None,
                unless=AGREEMENT if signal == SIMILARITY and AGREEMENT in signals else None,
            )
            for signal in signals
        ]
    )
