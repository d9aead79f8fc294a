"""A diagnosis as a picture."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rlif_lightning.runs.curves import COLOURS, DASHED, SOLID

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from rlif_lightning.diagnosis.measures import CompletionStats

COLUMNS = 4
GOOD, BAD = COLOURS[2], COLOURS[1]


def draw_diagnosis(report: dict[str, Any], measured: CompletionStats, path: Path) -> None:
    """Write the picture."""
    diagnosis_figure(report, measured).savefig(path)


def diagnosis_figure(report: dict[str, Any], measured: CompletionStats) -> Figure:
    """Policy, what each reward goes with, its values for right and wrong completions, and how alike rewards are."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = list(report["rewards"])
    shown = [name for name in names if name != "verifiable"]  # right and wrong are all that it tells apart
    middle = math.ceil(len(shown) / COLUMNS)
    figure = Figure(figsize=(16, 3.6 + 2.6 * middle + 4.6), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(2 + middle, COLUMNS, height_ratios=[3.4, *[2.4] * middle, 4.6])
    answer = report["verdict"]
    reward = f", with {answer['reward']}" if answer["reward"] else ""
    figure.suptitle(
        f"{report['model']}: {answer['level']}{reward}   ({report['prompts']} prompts x {report['group_size']})",
        fontsize=13, fontweight="bold",
    )  # fmt: skip
    _agreement(figure.add_subplot(grid[0, 0]), report, measured)
    _entropy(figure.add_subplot(grid[0, 1]), report, measured)
    _correlations(figure.add_subplot(grid[0, 2]), report, names)
    _spread(figure.add_subplot(grid[0, 3]), report, measured, names)
    for n, name in enumerate(shown):
        row, column = divmod(n, COLUMNS)
        _values(figure.add_subplot(grid[1 + row, column]), name, measured, legend=n == 0)
    equivalence = report["equivalence"]
    _heatmap(
        figure.add_subplot(grid[-1, :2]), "reward values: correlation within groups", names, equivalence["values"]
    )
    last = figure.add_subplot(grid[-1, 2:])
    if equivalence["gradients"] is None:
        last.set_axis_off()
    else:
        gradients = equivalence["gradients"]
        noise = [gradients["between_halves"][i][i] for i in range(len(names))]
        _heatmap(last, "policy gradients: cosine (below: with itself, between halves of the prompts)", names,
                 [*gradients["cosines"], noise])  # fmt: skip
    for ax in figure.axes:
        ax.tick_params(labelsize=8)
    return figure


def _finish(ax: Axes, title: str, x: str = "", y: str = "") -> None:
    ax.set_title(title, fontsize=10)
    ax.set_xlabel(x, fontsize=8)
    ax.set_ylabel(y, fontsize=8)
    ax.spines[["top", "right"]].set_visible(False)


def _agreement(ax: Axes, report: dict[str, Any], m: CompletionStats) -> None:
    from rlif_lightning.diagnosis.verdict import AGREEMENT_SATURATED

    g = report["group_size"]
    ax.hist(m.agreement, bins=(np.arange(g + 2) - 0.5) / g, color=COLOURS[0], edgecolor="white")
    ax.axvline(report["policy"]["agreement"].value, color="black", linewidth=1.3)
    ax.axvline(AGREEMENT_SATURATED, color="0.4", linestyle=":")
    _finish(ax, "agreement in a group", "share of the most frequent answer (line: mean, dots: saturated)", "groups")


def _entropy(ax: Axes, report: dict[str, Any], m: CompletionStats) -> None:
    from rlif_lightning.diagnosis.verdict import ENTROPY_NONE, ENTROPY_ROOM

    values = m.sums["entropy"].sum(1) / m.tokens.sum(1)
    ax.hist(
        values,
        np.linspace(0, max(values.max(), ENTROPY_ROOM * 1.1), 41).tolist(),
        color=COLOURS[3],
        edgecolor="white",
    )
    ax.axvline(report["policy"]["entropy"].value, color="black", linewidth=1.3)
    for mark in (ENTROPY_NONE, ENTROPY_ROOM):
        ax.axvline(mark, color="0.4", linestyle=":")
    _finish(ax, "initial entropy of a prompt", "nats per token (line: mean, dots: landmarks)", "prompts")


def _correlations(ax: Axes, report: dict[str, Any], names: list[str]) -> None:
    targets = [("agreement", COLOURS[0]), ("correct", GOOD), ("tokens", "0.6")]
    for offset, (target, colour) in enumerate(targets):
        for n, name in enumerate(names):
            if target not in report["rewards"][name]:
                continue
            e = report["rewards"][name][target]["within"]
            if math.isfinite(e.low):
                y = n + (offset - 1) * 0.22
                ax.plot([e.low, e.high], [y, y], color=colour, linewidth=1.6)
                ax.plot([e.value], [y], "o", color=colour, markersize=4)
    for target, colour in targets:
        if any(target in report["rewards"][n] for n in names):
            ax.plot([], [], color=colour, label={"correct": "correct", "tokens": "length"}.get(target, "majority"))
    ax.axvline(0, color="0.3", linewidth=1)
    ax.set_yticks(range(len(names)), names)
    ax.invert_yaxis()
    ax.set_xlim(-1.05, 1.05)
    ax.set_xticks([-1, -0.5, 0, 0.5, 1])
    ax.legend(fontsize=7, loc="best", framealpha=0.8)
    _finish(ax, "correlation within groups, 95 %")


def _spread(ax: Axes, report: dict[str, Any], m: CompletionStats, names: list[str]) -> None:
    """Groups whose reward has no spread at all are counted in the legend: a logarithm has no place for them."""
    gate = report["min_spread"]
    sds = {}
    for name in names:
        rows = [v[np.isfinite(v)] for v in m.values[name]]
        sds[name] = np.array([v.std(ddof=1) for v in rows if len(v) > 1])
    known = np.concatenate([v[v > gate / 10] for v in sds.values()] or [np.ones(1)])
    edges = np.geomspace(max(known.min(), 1e-9), known.max() * 1.01, 24) if len(known) else np.geomspace(1e-3, 1, 5)
    for n, name in enumerate(names):
        counts, _ = np.histogram(sds[name], edges)
        gated = report["rewards"][name]["gated_fraction"]
        dashes = SOLID if n < len(COLOURS) else DASHED
        label = f"{name}, {gated:.0%} gated"
        ax.stairs(counts, edges, color=COLOURS[n % len(COLOURS)], label=label, linewidth=1.5, linestyle=dashes)
    ax.axvline(gate, color="0.4", linestyle=":")
    ax.set_xscale("log")
    ax.legend(fontsize=6.5, framealpha=0.7)
    _finish(ax, "spread of a group", "standard deviation, in the reward's unit", "groups")


def _values(ax: Axes, name: str, m: CompletionStats, legend: bool) -> None:
    """Distribution of a reward, counted from its group's mean, for right and wrong completions."""
    values = m.values[name]
    finite = np.isfinite(values)
    size = np.maximum(finite.sum(1, keepdims=True), 1)
    values = values - np.where(finite, values, 0).sum(1, keepdims=True) / size
    marks, words = (
        (m.correct, ("right", "wrong")) if m.correct is not None else (m.majority, ("majority", "minority"))
    )
    known = values[finite]
    low, high = np.quantile(known, [0.005, 0.995]) if len(known) else (0.0, 1.0)
    edges = np.linspace(low, high if high > low else low + 1, 31)
    sides = [(marks > 0.5, words[0], GOOD), (marks <= 0.5, words[1], BAD)]
    if not np.isfinite(marks).any():
        sides = [(finite, "all", "0.5")]
    for side, word, colour in sides:
        chosen = np.clip(values[side & finite], edges[0], edges[-1])
        if len(chosen):
            ax.hist(chosen, edges.tolist(), density=True, histtype="stepfilled", alpha=0.45, color=colour, label=word)
    ax.set_yticks([])
    _finish(ax, name, "reward minus its group's mean")
    if legend and len(known):
        ax.legend(fontsize=8)


def _heatmap(ax: Axes, title: str, names: list[str], values: list[list[float]]) -> None:
    rows = [*names, "itself"][: len(values)]
    ax.imshow(np.array(values, dtype=float), cmap="RdBu_r", vmin=-1, vmax=1, aspect="auto")
    for i, own in enumerate(values):
        for j, v in enumerate(own):
            if math.isfinite(v):
                ax.text(
                    j, i, f"{v:.2f}", ha="center", va="center", fontsize=9, color="white" if abs(v) > 0.6 else "black"
                )
    ax.set_xticks(range(len(names)), names, rotation=20, ha="right")
    ax.set_yticks(range(len(rows)), rows)
    ax.set_title(title, fontsize=10)
