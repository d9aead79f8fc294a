"""The pictures of docs/study.md and docs/guard.md, from what tables.py and guard.py have read."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

sys.path.append(str(Path(__file__).parent))
import conditions

from rlif_lightning.runs.pictures import BAD, BLACK, BLUE, DASHED, GOOD, GREY, SOLID, label_ends

if TYPE_CHECKING:
    from guard import Judged
    from matplotlib.axes import Axes

Curve = Mapping[int, float]
LOOKS: tuple[dict[str, Any], ...] = (  # lines that meet, told apart in grey too
    {"color": BLUE, "linestyle": SOLID},
    {"color": BAD, "linestyle": DASHED},
    {"color": BLACK, "linestyle": (0, (1, 1))},
    {"color": GREY, "linestyle": (0, (6, 1.5, 1, 1.5))},
)


def panels(names: Sequence[str]) -> tuple[Figure, dict[str, Axes]]:
    """A row of panels for each group of conditions, under the group's name, all on the scale of an accuracy."""
    groups = conditions.grouped(names) if len(names) > 5 else {"": list(names)}
    columns = max(map(len, groups.values()))
    figure = Figure(figsize=(2.75 * columns + 0.5, 2.7 * len(groups) + 0.7), layout="constrained")
    found: dict[str, Axes] = {}
    for part, (group, members) in zip(
        figure.subfigures(len(groups), 1, squeeze=False)[:, 0], groups.items(), strict=True
    ):
        part.suptitle(group, x=0.01, ha="left", fontsize=11, fontweight="bold")
        row = part.subplots(1, columns, sharex=True, sharey=True, squeeze=False)[0]
        for ax, name in zip(row, members, strict=False):
            ax.set_title(conditions.title(name), fontsize=9)
            ax.set_ylim(-0.03, 1.03)
            ax.grid(color="0.92")
            ax.spines[["top", "right"]].set_visible(False)
            found[name] = ax
        for ax in row[len(members) :]:
            ax.set_visible(False)
    figure.supxlabel("optimiser step", fontsize=10)
    figure.supylabel("accuracy on held-out problems", fontsize=10)
    return figure, found


def accuracy_figure(curves: Mapping[str, Mapping[str, Sequence[Curve]]]) -> Figure:
    """Curves of the runs of each condition, ``sampled`` and ``greedy``: thin per run, thick their mean."""
    figure, found = panels(list(curves))
    for name, ax in found.items():
        sampled, greedy = curves[name]["sampled"], _mean(curves[name]["greedy"])
        for one in sampled:
            ax.plot(list(one), list(one.values()), color=BLUE, alpha=0.35, linewidth=1)
        mean = _mean(sampled)
        ax.plot(list(mean), list(mean.values()), color=BLUE, linewidth=2.4)
        ax.plot(list(greedy), list(greedy.values()), color=BLACK, linewidth=1.2, linestyle=DASHED)
        ax.axhline(mean[min(mean)], color=GREY, linewidth=1, linestyle=(0, (1, 1)))
    seeds = " or ".join(map(str, sorted({len(of["sampled"]) for of in curves.values()})))
    looks = {
        f"sampled, mean of {seeds} seeds": {"color": BLUE, "linewidth": 2.4},
        "sampled, one seed": {"color": BLUE, "alpha": 0.35, "linewidth": 1},
        "greedy, mean": {"color": BLACK, "linewidth": 1.2, "linestyle": DASHED},
        "start": {"color": GREY, "linewidth": 1, "linestyle": (0, (1, 1))},
    }
    _explain(figure, looks)
    return figure


def _mean(curves: Sequence[Curve]) -> Curve:
    """At the steps that all have."""
    steps = sorted(set.intersection(*(set(curve) for curve in curves)))
    return {step: statistics.mean(curve[step] for curve in curves) for step in steps}


def _explain(figure: Figure, looks: Mapping[str, Mapping[str, Any]]) -> None:
    samples = [Line2D([], [], **look) for look in looks.values()]
    figure.legend(samples, list(looks), loc="outside upper right", ncols=4, frameon=False, handlelength=3, fontsize=9)


def behaviour_figure(measured: Mapping[str, Mapping[str, Curve]]) -> Figure:
    """What the texts turn into, condition -> measure -> curve: a row per measure, a column per group."""
    groups, measures = conditions.grouped(list(measured)), list(next(iter(measured.values())))
    figure = Figure(figsize=(4.2 * len(groups), 1.9 * len(measures) + 0.6), layout="constrained")
    grid = figure.subplots(len(measures), len(groups), sharex=True, sharey="row", squeeze=False)
    for measure, row in zip(measures, grid, strict=True):
        values = [value for of in measured.values() for value in of[measure].values()]
        margin = 0.05 * (max(values) - min(values)) or 0.05
        low, high = min(values) - margin, max(values) + margin
        row[0].set(ylim=(low, high), ylabel=measure)
        for ax, names in zip(row, groups.values(), strict=True):
            ends = {}
            for name, look in zip(names, LOOKS, strict=False):
                curve = measured[name][measure]
                ax.plot(list(curve), list(curve.values()), linewidth=1.8, **look)
                ends[conditions.title(name)] = ((curve[max(curve)] - low) / (high - low), look["color"])
            label_ends(ax, ends, gap=0.13, fontsize=8)
            ax.grid(color="0.92")
            ax.spines[["top", "right"]].set_visible(False)
    for ax, group in zip(grid[0], groups, strict=True):
        ax.set_title(group, fontsize=11, fontweight="bold")
    figure.supxlabel("optimiser step", fontsize=10)
    return figure


def guard_figure(runs: Sequence[Judged]) -> Figure:
    """A panel per condition: accuracy of each run, where the guard fired, what it handed back."""
    figure, found = panels(list(dict.fromkeys(run.condition for run in runs)))
    looks: dict[str, dict[str, Any]] = {
        "a run (one seed)": {"color": "0.6", "linewidth": 1.2},
        "the guard fires": {"color": BAD, "marker": "x", "markersize": 8, "markeredgewidth": 2.2, "linestyle": ""},
        "the weights it hands back": {"color": GOOD, "marker": "D", "markersize": 6, "linestyle": ""},
        "it never fires: the weights kept": {
            "color": GOOD, "marker": "o", "markersize": 7, "markerfacecolor": "white", "linestyle": "",
        },
    }  # fmt: skip
    line, fires, handed, kept = looks.values()
    for run in runs:
        ax, steps, values = found[run.condition], list(run.curve), list(run.curve.values())
        ax.plot(steps, values, **line)
        ax.plot(run.handed_step, run.handed, zorder=4, **(kept if run.fired is None else handed))
        if run.fired is not None:
            ax.plot(run.fired, np.interp(run.fired, steps, values), zorder=5, **fires)
    _explain(figure, looks)
    return figure
