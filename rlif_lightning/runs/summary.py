"""A run's metrics and its key numbers as a table, from metrics.csv and guard.json alone."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlif_lightning.errors import UserError
from rlif_lightning.runs.folder import GUARD, METRICS, check_run_folder
from rlif_lightning.runs.metrics_csv import Curves, read_metrics

ACCURACIES = ("val/accuracy_sampled", "val/accuracy")
SUMMARY_METRICS = dict.fromkeys((*ACCURACIES, "rollout/agreement"), True) | dict.fromkeys(
    ("rollout/reward", "rollout/self_certainty", "rollout/entropy", "rollout/completion_tokens"), False
)
"""Metrics of the table, and whether a highest value is the best one."""


def summary_table(folder: Path) -> str:
    """Return start, best (where a higher value is better) and end of the key metrics as plain text.

    Metrics that were not logged have no row. Rollouts that taught nothing, and steps that changed nothing or were
    skipped, are counted in a line each. Where a guard has fired, a second table says why and compares the accuracy of
    the weights that it hands back.
    """
    curves = load_run(folder)
    last = max((step for curve in curves.values() for step in curve), default=0)
    rows = [[*start_and_best(metric, curve), short_number(curve[max(curve)])] for metric, curve in key_curves(curves)]
    cells = [["", "start", "best", "at step", "end"], *rows]
    lines = [f"{run_labels([folder])[0]}, last step {last}", *aligned(cells)]
    return "\n".join([*lines, *_idle_lines(curves), *_guard_lines(folder), ""])


def aligned(cells: Sequence[Sequence[str]], first: Any = str.ljust, others: Any = str.rjust) -> list[str]:
    """Rows as lines, by default with names on the left and numbers on the right of their columns."""
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return ["  ".join([first(row[0], widths[0]), *map(others, row[1:], widths[1:])]).rstrip() for row in cells]


def _idle_lines(curves: Curves) -> list[str]:
    """Rollouts without an advantage, and steps without a gradient or with one that is not finite: where there are."""
    advantages, norms = (list(curves.get(n, {}).values()) for n in ("rollout/advantage_size", "train/grad_norm"))
    skipped = sum(not math.isfinite(norm) for norm in norms)
    found = [
        (advantages.count(0), len(advantages), "rollouts taught nothing (rollout/advantage_size 0)"),
        (norms.count(0), len(norms), "steps changed nothing (train/grad_norm 0)"),
        (skipped, len(norms), "steps were skipped (train/grad_norm not finite)"),
    ]
    lines = [f"{count} of {of} {what}" for count, of, what in found if count]
    return ["", *lines] if lines else []


def _guard_lines(folder: Path) -> list[str]:
    """What the guard decided, and three accuracies: at the start, handed back, at the end."""
    guard = load_guard(folder)
    if guard is None or guard["fired"] is None:
        return []
    step = guard["handed_back_step"]
    lines = ["", f"guard: {guard['fired']['reason']}"]
    if guard["weights"] is not None:
        lines.append(f"weights of step {step}: {Path(folder) / guard['weights']}")
    columns = [guard["accuracy"].get(name, {}) for name in ("start", "handed_back", "end")]
    cells = [["", "start", f"handed back (step {step})", "end"]]
    for metric in ACCURACIES:
        known = [short_number(column[metric]) if metric in column else "" for column in columns]
        cells += [[metric, *known]] if any(known) else []
    return lines + (aligned(cells) if len(cells) > 1 else [])


def load_guard(folder: Path) -> dict[str, Any] | None:
    """Read what the guard of a run has written; None without one."""
    path = Path(folder) / GUARD
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is damaged", got=error, do="remove it to draw the run without its guard") from error


def load_run(folder: Path) -> Curves:
    """Read the metrics of a run folder."""
    check_run_folder(Path(folder), METRICS)
    return read_metrics(Path(folder) / METRICS)


def run_labels(folders: Sequence[Path]) -> list[str]:
    """Name runs ``recipe/n``, or by their whole paths where that is ambiguous."""
    paths = [Path(folder).absolute() for folder in folders]
    short = [f"{path.parent.name}/{path.name}" for path in paths]
    return short if len(set(short)) == len(short) else [str(path) for path in paths]


def best_step(curve: dict[int, float]) -> int | None:
    """Return the first step with the highest finite value."""
    finite = {step: value for step, value in curve.items() if math.isfinite(value)}
    return max(finite, key=lambda step: finite[step]) if finite else None


def key_curves(curves: Curves) -> list[tuple[str, dict[int, float]]]:
    """The metrics of the table that were logged."""
    return [(metric, curves[metric]) for metric in SUMMARY_METRICS if curves.get(metric)]


def start_and_best(metric: str, curve: dict[int, float]) -> list[str]:
    """Cells of the table: metric, start, best value and its step; the last two are empty where none is the best."""
    step = best_step(curve) if SUMMARY_METRICS[metric] else None
    best = ["", ""] if step is None else [short_number(curve[step]), str(step)]
    return [metric, short_number(curve[min(curve)]), *best]


def short_number(value: float) -> str:
    """A metric in a few digits."""
    return f"{value:.3f}" if abs(value) < 100 or not math.isfinite(value) else f"{value:.1f}"
