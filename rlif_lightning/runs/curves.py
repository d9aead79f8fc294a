"""The report of a run, and curves of one or several as a picture, from metrics.csv and guard.json alone."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from rlif_lightning.errors import UserError
from rlif_lightning.runs.atomic import write_text
from rlif_lightning.runs.folder import METRICS
from rlif_lightning.runs.held_out import load_held_out
from rlif_lightning.runs.metrics_csv import Curves
from rlif_lightning.runs.page import write_page
from rlif_lightning.runs.pictures import BAD, COLOURS, DASHED, GOOD, MARKERS, SOLID, in_words, save_figure
from rlif_lightning.runs.story import fired, held_out_accuracy, own_scale
from rlif_lightning.runs.story_figure import draw_story
from rlif_lightning.runs.summary import load_guard, load_run, run_labels

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, FigureBase
    from matplotlib.lines import Line2D

CURVES, SUMMARY, PAGE = "curves.png", "summary.txt", "report.html"
RUNS_PER_LINE = 5


class Line(NamedTuple):
    """One kind of curve in a panel: which metrics it shows (a regular expression) and how it looks."""

    metric: str
    label: str
    width: float = 1.8
    alpha: float = 1.0
    dashes: Any = SOLID
    right: bool = False  # on a second y axis
    alone: bool = False  # only in the picture of one run


PANELS = {
    "accuracy": [
        Line("val/accuracy_sampled", "held-out, sampled", width=2.6),
        Line("val/accuracy", "held-out, greedy", width=1.3, dashes=DASHED),
        Line("rollout/accuracy", "rollouts", width=1.2, alpha=0.4),
    ],
    "reward": [
        Line("rollout/reward", "reward"),
        Line("rollout/reward/(.+)", r"\1", width=1.3, dashes=DASHED, alone=True),
    ],
    "entropy (nats per token)": [Line("rollout/entropy", "entropy")],
    "agreement in a group": [Line("rollout/agreement", "agreement")],
    "completion length (tokens)": [
        Line("rollout/completion_tokens", "tokens"),
        Line("rollout/truncated_fraction", "truncated share (right)", 1.3, 0.9, DASHED, right=True),
    ],
    "KL to the reference (nats)": [Line("rollout/kl", "KL")],
}
IN_STORY = ("accuracy", "reward")  # what the picture of one run shows above its panels


def write_report(folder: Path, summary_text: str) -> tuple[Path, Path, Path]:
    """Write curves.png, summary.txt and report.html into a run folder and return their paths.

    The text is the run's, as summary_table gives it.
    """
    picture, summary, page = folder / CURVES, folder / SUMMARY, folder / PAGE
    write_text(summary, summary_text)
    draw_curves([folder], picture)
    write_page(folder, summary_text, picture, page)
    return picture, summary, page


def draw_curves(folders: Sequence[Path], output: Path) -> None:
    """Draw the curves of one run, or of several over each other, into a picture file."""
    save_figure(curves_figure(folders), Path(output))


def curves_figure(folders: Sequence[Path]) -> Figure:
    """Draw the curves as a matplotlib figure, one panel per quantity that any of the runs has logged.

    One run with held-out problems begins with its story: accuracy and reward in one panel, and some answers.
    """
    from matplotlib.figure import Figure

    runs = dict(zip(run_labels(folders), map(load_run, folders), strict=True))
    curves = list(runs.values())
    panels = [title for title, lines in PANELS.items() if any(_matches(c, line) for c in curves for line in lines)]
    if not panels:
        got = f"no curve in {', '.join(str(Path(folder) / METRICS) for folder in folders)}"
        do = "wait for the first step, or name another run"
        raise UserError("There is nothing to draw yet.", got=got, do=do)
    guard = fired(load_guard(folders[0])) if len(runs) == 1 else None
    has_story = len(runs) == 1 and held_out_accuracy(curves[0]) is not None
    if has_story:
        panels = [title for title in panels if title not in IN_STORY]
    columns = 2 if len(panels) == 4 and not has_story else min(len(panels), 4 if has_story else 3) or 1
    rows = math.ceil(len(panels) / columns)
    heights = [6.6, (2.6 if has_story else 3.4) * rows + 0.4 * math.ceil(len(runs) / RUNS_PER_LINE)]
    heights = heights[0 if has_story else 1 : 2 if panels else 1]
    figure = Figure(figsize=(14, sum(heights)), dpi=100, layout="constrained")
    parts = list(figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0])
    if has_story:
        draw_story(parts[0], curves[0], guard, load_held_out(folders[0]))
    if panels:
        _draw_panels(parts[-1], panels, curves, guard, columns)
    _name_runs(figure, list(runs))
    return figure


def _draw_panels(
    figure: FigureBase, panels: list[str], runs: list[Curves], guard: dict[str, Any] | None, columns: int
) -> None:
    """Draw panels in a grid; the first one takes the cells that would stay empty."""
    rows = math.ceil(len(panels) / columns)
    spare = rows * columns - len(panels)
    grid = figure.add_gridspec(rows, columns, wspace=0.06, hspace=0.06)
    first: Axes | None = None
    for index, title in enumerate(panels):
        row, column = divmod(index + spare if index else 0, columns)
        ax = figure.add_subplot(grid[row, column : column + (1 if index else 1 + spare)], sharex=first)
        first = first or ax
        legend = _draw_panel(ax, title, runs)
        if guard is not None:
            marks = _mark_guard(ax, guard)
            legend |= {} if index else marks  # once is enough
        if len(legend) > 1:
            box = ax.legend(list(legend.values()), list(legend), fontsize=8, framealpha=0.85, handlelength=3)
            box.get_frame().set_edgecolor("0.85")
        ax.set_xlabel("optimiser step")


def _matches(curves: Curves, line: Line) -> list[tuple[str, str]]:
    """(metric, label) of the run's curves that a line of a panel shows."""
    found = [(re.fullmatch(line.metric, name), name) for name, curve in curves.items() if curve]
    return [(name, in_words(match.expand(line.label))) for match, name in found if match]


def _draw_panel(ax: Axes, title: str, runs: list[Curves]) -> dict[str, Line2D]:
    """Draw one panel and return its legend.

    For one run colours tell lines apart, for several they and markers tell runs apart (dashes and widths the lines).
    """
    single = len(runs) == 1
    right: Axes | None = None
    legend: dict[str, Line2D] = {}
    for position, curves in enumerate(runs):
        for line in PANELS[title]:
            for name, label in _matches(curves, line) if single or not line.alone else []:
                if line.right and right is None:
                    right = ax.twinx()
                look = _look(len(legend) if single else position)
                if single and not legend and len(curves[name]) > 25:  # few points are shown: a single one has no line
                    look["marker"] = ""
                curve = curves[name] if single or title != "reward" else own_scale(curves[name])
                drawn = _plot_curve(right if line.right and right else ax, curve, line, look)
                legend.setdefault(label, drawn if single else _grey(drawn))
    _arrange_axes(ax, right)
    ax.set_title(title if single or title != "reward" else "reward, each run on its own scale", fontsize=11)
    return legend


def _arrange_axes(ax: Axes, right: Axes | None) -> None:
    from matplotlib.ticker import MaxNLocator

    ax.grid(color="0.9", linewidth=0.8)
    ax.spines[["top", "right"]].set_visible(False)
    ax.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True, min_n_ticks=1))
    ax.margins(x=0.03, y=0.08)
    if right is not None:
        right.spines[["top", "left"]].set_visible(False)
        right.set_ylim(-0.02, 1.02)
        right.tick_params(labelsize=8, colors="0.4")
        ax.set_zorder(right.get_zorder() + 1)  # the legend lies above the curves of both axes
        ax.patch.set_visible(False)


def _look(position: int) -> dict[str, Any]:
    """What tells runs apart."""
    return {"color": COLOURS[position % len(COLOURS)], "marker": MARKERS[position % len(MARKERS)]}


def _plot_curve(ax: Axes, curve: dict[int, float], line: Line, look: dict[str, Any]) -> Line2D:
    look = look | {"linewidth": line.width, "alpha": line.alpha, "linestyle": line.dashes}
    look |= {"markersize": 2 + line.width, "markevery": max(1, len(curve) // 12)}
    return ax.plot(list(curve), list(curve.values()), **look)[0]


def _grey(drawn: Line2D) -> Line2D:
    """A sample for the legend, where colours tell runs apart."""
    from matplotlib.lines import Line2D

    sample = Line2D([], [])
    sample.update_from(drawn)
    sample.set(color="0.3", marker="")
    return sample


def _mark_guard(ax: Axes, guard: dict[str, Any]) -> dict[str, Line2D]:
    """Mark where the guard fired, and the step whose weights it hands back."""
    fired, handed = guard["fired"]["step"], guard["handed_back_step"]
    line = ax.axvline(fired, color=BAD, linewidth=1.2, linestyle=DASHED, zorder=1.9)
    back = ax.axvline(handed, color=GOOD, linewidth=1.2, zorder=1.9)
    return {f"guard fired at step {fired}": line, f"guard: back to step {handed}": back}


def _name_runs(figure: Figure, labels: list[str]) -> None:
    """Write the run's name above the picture, or which colour is which run."""
    from matplotlib.lines import Line2D

    if len(labels) == 1:
        figure.suptitle(labels[0], fontsize=12, fontweight="bold")
        return
    samples = [Line2D([], [], linewidth=3, markersize=8, **_look(n)) for n in range(len(labels))]
    columns = min(len(labels), RUNS_PER_LINE)
    figure.legend(samples, labels, loc="outside upper center", ncols=columns, frameon=False, fontsize=11)
