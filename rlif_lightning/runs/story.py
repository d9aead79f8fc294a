"""What a run's curves say, in sentences."""

import math
from collections.abc import Collection
from pathlib import Path
from typing import Any

from rlif_lightning.runs.metrics_csv import Curves

ACCURACIES = ("val/accuracy_sampled", "val/accuracy")
REWARD = "rollout/reward"
NOISE = 0.02  # a smaller difference of accuracy is none


def held_out_accuracy(curves: Curves) -> tuple[str, dict[int, float]] | None:
    """The metric and the curve of the held-out accuracy, sampled before greedy; None where none was logged."""
    return next(((name, finite(curves[name])) for name in ACCURACIES if finite(curves.get(name, {}))), None)


def finite(curve: dict[int, float]) -> dict[int, float]:
    """A curve without what is not a number."""
    return {step: value for step, value in curve.items() if math.isfinite(value)}


def own_scale(curve: dict[int, float]) -> dict[int, float]:
    """A curve from 0, its lowest value, to 1, its highest."""
    values = finite(curve)
    low, high = min(values.values(), default=0), max(values.values(), default=0)
    return {step: (value - low) / ((high - low) or 1) for step, value in values.items()}


def best_step(curve: dict[int, float]) -> int | None:
    """Return the first step with the highest finite value."""
    values = finite(curve)
    return max(values, key=lambda step: values[step]) if values else None


def moments(evaluated: Collection[int], curves: Curves, guard: dict[str, Any] | None) -> dict[int, str]:
    """The steps whose answers are shown, of those evaluated, in their order, and what each is.

    They are the first, the last, and the nearest to what the guard hands back if it has fired, or else to the best.
    """
    found = {min(evaluated): "before training", max(evaluated): "at the end"}
    accuracy = held_out_accuracy(curves)
    when, between = "at the best step", None if accuracy is None else best_step(accuracy[1])
    if guard is not None:
        when, between = "handed back", guard["handed_back_step"]
    if between is not None:
        found.setdefault(min(evaluated, key=lambda step: abs(step - between)), when)
    return dict(sorted(found.items()))


def headline(curves: Curves) -> str:
    """What happened to the reward and to the accuracy, in one line."""
    said, reward, accuracy = [], finite(curves.get(REWARD, {})), held_out_accuracy(curves)
    if len(reward) > 1:
        rises = reward[max(reward)] > reward[min(reward)]
        said.append(f"the reward {'rises' if rises else 'falls'}")
    if accuracy is not None and len(accuracy[1]) > 1:
        said.append(f"the accuracy {_course(accuracy[1])}")
    return "; ".join(said).capitalize()


def sentences(curves: Curves, guard: dict[str, Any] | None, folder: Path) -> list[str]:
    """What rose, what fell, and what the guard has saved."""
    said, reward, accuracy = [], finite(curves.get(REWARD, {})), held_out_accuracy(curves)
    if accuracy is not None and len(accuracy[1]) > 1:
        said.append(_about_accuracy(*accuracy))
    if len(reward) > 1:
        first, last = reward[min(reward)], reward[max(reward)]
        said.append(f"The reward {'rose' if last > first else 'fell'} from {number(first)} to {number(last)}.")
    if guard is not None:
        said.append(_about_guard(guard, folder))
    return said


def fired(guard: dict[str, Any] | None) -> dict[str, Any] | None:
    """What the guard of a run has written, if it has fired."""
    return None if guard is None or guard["fired"] is None else guard


def handed_back(guard: dict[str, Any], otherwise: float | None = None) -> float | None:
    """The held-out accuracy of the weights that the guard hands back, as far as it is known."""
    values = guard["accuracy"].get("handed_back", {})
    return next((values[metric] for metric in ACCURACIES if metric in values), otherwise)


def number(value: float) -> str:
    """A metric in a few digits."""
    return f"{value:.3f}" if abs(value) < 100 or not math.isfinite(value) else f"{value:.1f}"


def _course(curve: dict[int, float]) -> str:
    start, best, end = _landmarks(curve)
    if best <= start + NOISE:
        return "falls" if end < start - NOISE else "does not rise"
    if end >= best - NOISE:
        return "rises"
    return "rises, then falls" + (" below its start" if end < start - NOISE else "")


def _landmarks(curve: dict[int, float]) -> tuple[float, float, float]:
    """Start, best and end."""
    return curve[min(curve)], max(curve.values()), curve[max(curve)]


def _about_accuracy(metric: str, curve: dict[int, float]) -> str:
    start, best, end = map(number, _landmarks(curve))
    course, at = _course(curve), best_step(curve)
    kind = "sampled" if metric == ACCURACIES[0] else "greedy"
    what = f"Accuracy on held-out problems ({kind})"
    if course.startswith("rises, then"):
        below = ", below its start" if course.endswith("start") else ""
        return f"{what} rose from {start} to {best} at step {at}, then fell to {end}{below}."
    verb = {"rises": "rose", "falls": "fell", "does not rise": "did not rise"}[course]
    return f"{what} {verb}: {start} at the start, {end} at the end."


def _about_guard(guard: dict[str, Any], folder: Path) -> str:
    if guard["fired"] is None:
        return "The collapse guard, which sees no labels, did not fire."
    known = handed_back(guard)
    accuracy = "" if known is None else f", accuracy {number(known)}"
    kept = "lost its weights" if guard["weights"] is None else f"kept {folder / guard['weights']}"
    return (
        f"The collapse guard, which sees no labels, fired at step {guard['fired']['step']} "
        f"and {kept} (of step {guard['handed_back_step']}{accuracy})."
    )
