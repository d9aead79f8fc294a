"""The second picture of a diagnosis: distributions over prompts and completions, and how alike the rewards are."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rlif_lightning.diagnosis.association import Array, centred
from rlif_lightning.diagnosis.figure import LABEL
from rlif_lightning.diagnosis.measures import CompletionStats, spreads_of
from rlif_lightning.diagnosis.verdict import AGREEMENT_ROOM, AGREEMENT_SATURATED, ENTROPY_NONE, ENTROPY_ROOM
from rlif_lightning.runs.pictures import AMBER, BAD, BLUE, DASHED, in_words, save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLUMNS = 4


def draw_details(report: Mapping[str, Any], stats: CompletionStats, path: Path) -> None:
    """Draw what the report and the numbers of the completions hold beyond the verdict."""
    save_figure(details_figure(report, stats), path)


def details_figure(report: Mapping[str, Any], stats: CompletionStats) -> Figure:
    """Policy; what rewards go with besides correctness; their values for right and wrong completions; likeness."""
    from matplotlib.figure import Figure

    names, policy, g = list(report["rewards"]), report["policy"], report["group_size"]
    shown = [name for name in names if name != LABEL]  # right and wrong are all that it tells apart
    middle = math.ceil(len(shown) / COLUMNS)
    figure = Figure(figsize=(16, 3.8 + 2.6 * middle + 4.6), dpi=100, layout="constrained")
    grid = figure.add_gridspec(2 + middle, COLUMNS, height_ratios=[3.6, *[2.4] * middle, 4.6])
    size = f"{report['prompts']} prompts x {g} completions"
    figure.suptitle(f"{report['model']}: what lies behind the diagnosis ({size})", fontsize=13, fontweight="bold")
    ax = figure.add_subplot(grid[0, 0])
    landmarks = {AGREEMENT_ROOM: "little room", AGREEMENT_SATURATED: "saturated"}
    _histogram(ax, stats.agreement, (np.arange(g + 2) - 0.5) / g, policy["agreement"].value, landmarks)
    _finish(ax, "agreement in a group", "share of the most frequent answer", "groups")
    ax = figure.add_subplot(grid[0, 1])
    entropy = stats.sums["entropy"].sum(1) / stats.tokens.sum(1)
    edges = np.linspace(0, max(entropy.max(), ENTROPY_ROOM * 1.1), 41)
    _histogram(ax, entropy, edges, policy["entropy"].value, {ENTROPY_NONE: "low", ENTROPY_ROOM: "room"})
    _finish(ax, "initial entropy of a prompt", "nats per token", "prompts")
    _correlations(figure.add_subplot(grid[0, 2]), report["rewards"])
    _spread(figure.add_subplot(grid[0, 3]), report, stats)
    for n, name in enumerate(shown):
        row, column = divmod(n, COLUMNS)
        _values(figure.add_subplot(grid[1 + row, column]), name, stats, legend=n == 0)
    words = [in_words(name) for name in names]
    values, gradients = report["equivalence"]["values"], report["equivalence"]["gradients"]
    _heatmap(figure.add_subplot(grid[-1, :2]), "reward values: correlation within groups", words, values)
    if gradients is not None:
        rows = [*gradients["cosines"], np.diagonal(gradients["between_halves"]).tolist()]
        title = "policy gradients: cosine (below: with itself, between halves of the prompts)"
        _heatmap(figure.add_subplot(grid[-1, 2:]), title, words, rows)
    for ax in figure.axes:
        ax.tick_params(labelsize=8)
    return figure


def _finish(ax: Axes, title: str, x: str = "", y: str = "") -> None:
    ax.set_title(title, fontsize=10)
    ax.set_xlabel(x, fontsize=8)
    ax.set_ylabel(y, fontsize=8)
    ax.spines[["top", "right"]].set_visible(False)


def _histogram(ax: Axes, values: Array, edges: Array, mean: float, landmarks: Mapping[float, str]) -> None:
    """With its mean, and landmarks that say what begins at them."""
    ax.hist(values, edges.tolist(), color=BLUE, alpha=0.55, edgecolor="white")
    style: dict[str, Any] = {"transform": ax.get_xaxis_transform(), "fontsize": 8, "rotation": 90, "va": "top"}
    ax.axvline(mean, color="black", linewidth=1.6)
    ax.text(mean, 1, " mean", ha="right", **style)
    for landmark, what in landmarks.items():
        ax.axvline(landmark, color=BAD, linewidth=1.4, linestyle=DASHED)
        ax.text(landmark, 1, what, ha="left", color=BAD, **style)


def _name_rows(ax: Axes, labels: list[str]) -> None:
    ax.set_yticks(range(len(labels)), labels)
    ax.invert_yaxis()
    ax.grid(axis="x", color="0.92")


def _correlations(ax: Axes, rewards: Mapping[str, Any]) -> None:
    """What each reward goes with besides correctness."""
    for shift, target, label, colour, marker in (
        (-0.15, "agreement", "being in the majority", BLUE, "o"),
        (0.15, "tokens", "answer length", AMBER, "s"),
    ):
        for n, own in enumerate(rewards.values()):
            found = own[target]["within"]
            if math.isfinite(found.low):  # without an interval there is nothing to see
                ax.plot([found.low, found.high], [n + shift] * 2, color=colour)
                ax.plot(found.value, n + shift, marker, color=colour, markersize=5)
        ax.plot([], [], marker, color=colour, linestyle="-", label=label)
    ax.axvline(0, color="0.3", linewidth=1)
    _name_rows(ax, [in_words(name) for name in rewards])
    ax.set(xlim=(-1.05, 1.05), ylim=(len(rewards) + 1.2, -0.6))  # room for the legend
    ax.legend(fontsize=8, loc="lower left", framealpha=0.8)
    _finish(ax, "what rewards go with, within groups", "correlation, 95 % interval")


def _spread(ax: Axes, report: Mapping[str, Any], stats: CompletionStats) -> None:
    """Groups whose reward has no spread at all are only counted: a logarithm has no place for them."""
    gate, labels = report["min_spread"], []
    for n, (name, values) in enumerate(stats.values.items()):
        spreads = spreads_of(values)
        known = spreads[spreads > gate / 10]
        if len(known):
            low, middle, high = np.quantile(known, [0.05, 0.5, 0.95])
            ax.plot([low, high], [n, n], color=BLUE)
            ax.plot(middle, n, "o", color=BLUE, markersize=5)
        labels.append(f"{in_words(name)}\n{report['rewards'][name]['gated_fraction']:.0%} gated")
    ax.axvline(gate, color=BAD, linestyle=DASHED)
    ax.text(gate, 1, "gate", color=BAD, fontsize=8, transform=ax.get_xaxis_transform(), rotation=90, va="top")
    ax.set_xscale("log")
    _name_rows(ax, labels)
    _finish(ax, "spread of a reward in a group", "standard deviation: median, middle 90 %")


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
    filled: dict[str, Any] = {"histtype": "stepfilled", "color": BLUE, "alpha": 0.5}
    outlined: dict[str, Any] = {"histtype": "step", "color": BAD, "linewidth": 1.6}
    sides = [(marks > 0.5, words[0], filled), (marks <= 0.5, words[1], outlined)]
    if not np.isfinite(marks).any():
        sides = [(finite, "all", filled)]
    for side, word, look in sides:
        chosen = np.clip(values[side & finite], edges[0], edges[-1])
        if len(chosen):
            ax.hist(chosen, edges.tolist(), density=True, label=word, **look)
    ax.set_yticks([])
    _finish(ax, in_words(name), "reward minus its group's mean")
    if legend and len(known):
        ax.legend(fontsize=8)


def _heatmap(ax: Axes, title: str, names: list[str], values: list[list[float]]) -> None:
    """Lighter is higher, for eyes of all kinds and for grey prints."""
    rows = [*names, "itself"][: len(values)]
    cells = np.array(values, dtype=float)
    ax.imshow(cells, cmap="cividis", vmin=-1, vmax=1, aspect="auto")
    for (i, j), v in np.ndenumerate(cells):
        if math.isfinite(v):
            colour = "white" if v < 0.3 else "black"
            ax.text(j, i, f"{v:.2f}", ha="center", va="center", fontsize=9, color=colour)
    ax.set_xticks(range(len(names)), names, rotation=20, ha="right")
    ax.set_yticks(range(len(rows)), rows)
    ax.set_title(title, fontsize=10)
