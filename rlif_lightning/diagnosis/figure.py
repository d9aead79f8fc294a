"""A diagnosis as a picture."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rlif_lightning.diagnosis.association import Array, centred
from rlif_lightning.diagnosis.measures import CompletionStats, spreads_of
from rlif_lightning.diagnosis.verdict import AGREEMENT_SATURATED, ENTROPY_NONE, ENTROPY_ROOM
from rlif_lightning.runs.pictures import COLOURS, DASHED, SOLID, save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLUMNS = 4
GOOD, BAD = COLOURS[2], COLOURS[1]


def draw_diagnosis(report: dict[str, Any], stats: CompletionStats, path: Path) -> None:
    """Policy, what each reward goes with, its values for right and wrong completions, and how alike rewards are."""
    from matplotlib.figure import Figure

    names, policy, g = list(report["rewards"]), report["policy"], report["group_size"]
    shown = [name for name in names if name != "verifiable"]  # right and wrong are all that it tells apart
    middle = math.ceil(len(shown) / COLUMNS)
    figure = Figure(figsize=(16, 3.6 + 2.6 * middle + 4.6), dpi=100, layout="constrained")
    grid = figure.add_gridspec(2 + middle, COLUMNS, height_ratios=[3.4, *[2.4] * middle, 4.6])
    answer, size = report["verdict"], f"({report['prompts']} prompts x {g})"
    reward = f", with {answer['reward']}" if answer["reward"] else ""
    figure.suptitle(f"{report['model']}: {answer['level']}{reward}   {size}", fontsize=13, fontweight="bold")
    ax = figure.add_subplot(grid[0, 0])
    _histogram(ax, stats.agreement, (np.arange(g + 2) - 0.5) / g, policy["agreement"].value, AGREEMENT_SATURATED)
    _finish(ax, "agreement in a group", "share of the most frequent answer (line: mean, dots: saturated)", "groups")
    ax = figure.add_subplot(grid[0, 1])
    entropy = stats.sums["entropy"].sum(1) / stats.tokens.sum(1)
    edges = np.linspace(0, max(entropy.max(), ENTROPY_ROOM * 1.1), 41)
    _histogram(ax, entropy, edges, policy["entropy"].value, ENTROPY_NONE, ENTROPY_ROOM)
    _finish(ax, "initial entropy of a prompt", "nats per token (line: mean, dots: landmarks)", "prompts")
    _correlations(figure.add_subplot(grid[0, 2]), report["rewards"])
    _spread(figure.add_subplot(grid[0, 3]), report, stats)
    for n, name in enumerate(shown):
        row, column = divmod(n, COLUMNS)
        _values(figure.add_subplot(grid[1 + row, column]), name, stats, legend=n == 0)
    values, gradients = report["equivalence"]["values"], report["equivalence"]["gradients"]
    _heatmap(figure.add_subplot(grid[-1, :2]), "reward values: correlation within groups", names, values)
    if gradients is not None:
        rows = [*gradients["cosines"], np.diagonal(gradients["between_halves"]).tolist()]
        title = "policy gradients: cosine (below: with itself, between halves of the prompts)"
        _heatmap(figure.add_subplot(grid[-1, 2:]), title, names, rows)
    for ax in figure.axes:
        ax.tick_params(labelsize=8)
    save_figure(figure, path)


def _finish(ax: Axes, title: str, x: str = "", y: str = "") -> None:
    ax.set_title(title, fontsize=10)
    ax.set_xlabel(x, fontsize=8)
    ax.set_ylabel(y, fontsize=8)
    ax.spines[["top", "right"]].set_visible(False)


def _histogram(ax: Axes, values: Array, edges: Array, mean: float, *landmarks: float) -> None:
    ax.hist(values, edges.tolist(), color=COLOURS[0], edgecolor="white")
    ax.axvline(mean, color="black", linewidth=1.3)
    for landmark in landmarks:
        ax.axvline(landmark, color="0.4", linestyle=":")


def _correlations(ax: Axes, rewards: dict[str, Any]) -> None:
    targets = (("agreement", "majority", COLOURS[0]), ("correct", "correct", GOOD), ("tokens", "length", "0.6"))
    for offset, (target, label, colour) in enumerate(targets):
        found = [own[target]["within"] for own in rewards.values() if target in own]
        for n, e in enumerate(found):  # without an interval there is nothing to see
            ax.plot([e.low, e.high], [n + (offset - 1) * 0.22] * 2, color=colour, label=label if n == 0 else None)
            if math.isfinite(e.low):
                ax.plot(e.value, n + (offset - 1) * 0.22, "o", color=colour, markersize=4)
    ax.axvline(0, color="0.3", linewidth=1)
    ax.set_yticks(range(len(rewards)), list(rewards))
    ax.invert_yaxis()
    ax.set_xlim(-1.05, 1.05)
    ax.legend(fontsize=7, loc="best", framealpha=0.8)
    _finish(ax, "correlation within groups, 95 %")


def _spread(ax: Axes, report: dict[str, Any], stats: CompletionStats) -> None:
    """Groups whose reward has no spread at all are counted in the legend: a logarithm has no place for them."""
    gate = report["min_spread"]
    spreads = {name: spreads_of(values) for name, values in stats.values.items()}
    known = np.concatenate([v[v > gate / 10] for v in spreads.values()])
    edges = np.geomspace(max(known.min(), 1e-9), known.max() * 1.01, 24) if len(known) else np.geomspace(1e-3, 1, 5)
    for n, (name, values) in enumerate(spreads.items()):
        counts, _ = np.histogram(values, edges)
        colour, dashes = COLOURS[n % len(COLOURS)], SOLID if n < len(COLOURS) else DASHED
        label = f"{name}, {report['rewards'][name]['gated_fraction']:.0%} gated"
        ax.stairs(counts, edges, color=colour, label=label, linewidth=1.5, linestyle=dashes)
    ax.axvline(gate, color="0.4", linestyle=":")
    ax.set_xscale("log")
    ax.legend(fontsize=6.5, framealpha=0.7)
    _finish(ax, "spread of a group", "standard deviation, in the reward's unit", "groups")


def _values(ax: Axes, name: str, stats: CompletionStats, legend: bool) -> None:
    """Distribution of a reward, counted from its group's mean, for right and wrong completions."""
    finite = np.isfinite(stats.values[name])
    values = centred(stats.values[name], finite)
    known = values[finite]
    low, high = np.quantile(known, [0.005, 0.995]) if len(known) else (0.0, 1.0)
    edges = np.linspace(low, high if high > low else low + 1, 31)
    marks, words = stats.correct, ("right", "wrong")
    if marks is None:
        marks, words = stats.majority, ("majority", "minority")
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
    cells = np.array(values, dtype=float)
    ax.imshow(cells, cmap="RdBu_r", vmin=-1, vmax=1, aspect="auto")
    for (i, j), v in np.ndenumerate(cells):
        if math.isfinite(v):
            colour = "white" if abs(v) > 0.6 else "black"
            ax.text(j, i, f"{v:.2f}", ha="center", va="center", fontsize=9, color=colour)
    ax.set_xticks(range(len(names)), names, rotation=20, ha="right")
    ax.set_yticks(range(len(rows)), rows)
    ax.set_title(title, fontsize=10)
