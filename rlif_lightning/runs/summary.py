"""A run's metrics and its key numbers as a table, from metrics.csv and guard.json alone."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlif_lightning.errors import UserError
from rlif_lightning.runs.folder import GUARD, METRICS, check_run_folder
from rlif_lightning.runs.metrics_csv import Curves, read_metrics
from rlif_lightning.runs.story import ACCURACIES, best_step, number, sentences

SUMMARY_METRICS = dict.fromkeys((*ACCURACIES, "rollout/agreement"), True) | dict.fromkeys(
    ("rollout/reward", "rollout/entropy", "rollout/completion_tokens"), False
)
"""Metrics of the table, and whether a highest value is the best one."""


def summary_table(folder: Path) -> str:
    """What happened in a few sentences, and a table of the key metrics that were logged, as plain text.

    Its columns are start, best (where a higher value is better), what the guard hands back, and end. Rollouts that
    taught nothing, steps that changed nothing and those that were skipped are counted in a line each.
    """
    curves, guard = load_run(folder), load_guard(folder)
    last = max((step for curve in curves.values() for step in curve), default=0)
    handed = {} if guard is None else guard["accuracy"].get("handed_back", {})
    head, rows = ["", "start", "best", "at step", "end"], []
    for metric, curve in key_curves(curves):
        rows.append([*start_and_best(metric, curve), number(curve[max(curve)])])
        if handed:
            rows[-1].insert(4, number(handed[metric]) if metric in handed else "")
    if handed:
        head.insert(4, "handed back")
    lines = [f"{run_labels([folder])[0]}, last step {last}", *sentences(curves, guard, Path(folder)), ""]
    return "\n".join([*lines, *aligned([head, *rows]), *_idle_lines(curves), ""])


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


def load_guard(folder: Path) -> dict[str, Any] | None:
    """Read what the guard of a run has written; None without one."""
    path = Path(folder) / GUARD
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if found["fired"] is not None:  # what is shown of it
            int(found["fired"]["step"]) >= int(found["handed_back_step"]), Path(found["weights"] or "")
        [math.isfinite(value) for values in found["accuracy"].values() for value in values.values()]
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        got = f"{type(error).__name__}: {error}"
        raise UserError(f"{path} is damaged", got=got, do="remove it to draw the run without its guard") from error
    return found


def load_run(folder: Path) -> Curves:
    """Read the metrics of a run folder."""
    check_run_folder(Path(folder), METRICS)
    return read_metrics(Path(folder) / METRICS)


def run_labels(folders: Sequence[Path]) -> list[str]:
    """Name runs ``recipe/n``, or by their whole paths where that is ambiguous."""
    paths = [Path(folder).absolute() for folder in folders]
    short = [f"{path.parent.name}/{path.name}" for path in paths]
    return short if len(set(short)) == len(short) else [str(path) for path in paths]


def key_curves(curves: Curves) -> list[tuple[str, dict[int, float]]]:
    """The metrics of the table that were logged."""
    return [(metric, curves[metric]) for metric in SUMMARY_METRICS if curves.get(metric)]


def start_and_best(metric: str, curve: dict[int, float]) -> list[str]:
    """Cells of the table: metric, start, best value and its step; the last two are empty where none is the best."""
    step = best_step(curve) if SUMMARY_METRICS[metric] else None
    best = ["", ""] if step is None else [number(curve[step]), str(step)]
    return [metric, number(curve[min(curve)]), *best]
