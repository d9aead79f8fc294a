"""The first picture of a diagnosis: the verdict and what it rests on."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlif_lightning.diagnosis.association import Estimate
from rlif_lightning.diagnosis.verdict import (
    AGREEMENT_ROOM,
    AGREEMENT_SATURATED,
    ANSWERED_LEAST,
    ENTROPY_NONE,
    ENTROPY_ROOM,
    SIDES,
    WORDS,
    Target,
    is_sure,
)
from rlif_lightning.runs.pictures import BLUE, DASHED, GOOD, GREY, in_words, save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LABEL, LENGTH = "verifiable", "answer length"  # the first is correctness itself


def draw_diagnosis(report: Mapping[str, Any], path: Path) -> None:
    """Draw the report that diagnosis.json holds."""
    save_figure(diagnosis_figure(report), path)


def diagnosis_figure(report: Mapping[str, Any]) -> Figure:
    """The verdict as title; how each statistic goes with what is right; agreement and entropy at their landmarks."""
    from matplotlib.figure import Figure

    policy, answer = report["policy"], report["verdict"]
    figure = Figure(figsize=(12, 2.6 + 0.28 * len(report["rewards"])), dpi=100, layout="constrained")
    grid = figure.add_gridspec(2, 2, width_ratios=[1.2, 1], wspace=0.06, hspace=0.1)
    figure.suptitle(textwrap.fill(answer["sentence"], 95), x=0.01, ha="left", fontsize=13, fontweight="bold")
    size = f"{report['prompts']} prompts of data.{report['split']} x {report['group_size']} completions"
    note = f"{report['model']}, before training: {size}. Bars: 95 % intervals; filled: what the verdict chooses from."
    figure.supxlabel(note, x=0.01, ha="left", fontsize=9)
    target: Target = answer["against"] or ("correct" if "accuracy" in policy else "agreement")
    _draw_fits(figure.add_subplot(grid[:, 0]), report, target)
    ax, unused = figure.add_subplot(grid[0, 1]), policy["answered_fraction"].value < ANSWERED_LEAST
    zones = ((0.0, "room to improve"), (AGREEMENT_ROOM, "little room"), (AGREEMENT_SATURATED, "saturated"))
    _draw_scale(ax, policy["agreement"], zones, 1.0)
    title = "agreement: share of a prompt's most frequent answer"
    ax.set_title(title + "\n(left out: too few answers can be read)" * unused, loc="left", fontsize=11)
    ax = figure.add_subplot(grid[1, 1])
    zones = ((0.0, "next to none"), (ENTROPY_NONE, "low"), (ENTROPY_ROOM, "room to improve"))
    entropy = policy["entropy"]
    _draw_scale(ax, entropy, zones[::-1], 1.15 * max(2 * ENTROPY_ROOM, entropy.value, entropy.high))
    ax.set_title("initial entropy, nats per token", loc="left", fontsize=11)
    return figure


def _draw_fits(ax: Axes, report: Mapping[str, Any], target: Target) -> None:
    """A dot for each statistic, what is sure and highest at the top."""
    found = {name: own[target]["within"] for name, own in report["rewards"].items() if name != LABEL}
    found[LENGTH] = report["length"][target]
    order = {name: -fit.value if math.isfinite(fit.value) else 2.0 for name, fit in found.items()}
    names = sorted(found, key=lambda name: (not is_sure(found[name]), order[name]))
    answer = report["verdict"]
    for n, name in enumerate(names):
        _draw_fit(ax, n, found[name], name in answer["compared"], name == answer["reward"])
    ax.axvline(0, color="0.3", linewidth=1, zorder=1.6)
    better, worse = SIDES[target]
    for x, side in ((-0.52, worse), (0.52, better)):
        ax.text(x, -0.9, f"higher for {side}", ha="center", va="center", fontsize=9, color="0.3")
    ax.set_yticks(range(len(names)), [in_words(name) + " (control)" * (name in ("random", LENGTH)) for name in names])
    for label, name in zip(ax.get_yticklabels(), names, strict=True):
        label.set(fontweight="bold" if name == answer["reward"] else "normal", parse_math=False)
    ax.set(xlim=(-1.05, 1.05), xticks=[-1, -0.5, 0, 0.5, 1], ylim=(len(names) - 0.5, -1.4))
    ax.grid(axis="x", color="0.92")
    ax.spines[["top", "right", "left"]].set_visible(False)
    ax.tick_params(axis="y", length=0)
    ax.set_xlabel("correlation within a prompt's completions")
    ax.set_title(f"how each statistic goes with {WORDS[target]}", loc="left", fontsize=11)


def _draw_fit(ax: Axes, row: int, fit: Estimate, compared: bool, chosen: bool) -> None:
    """Filled: what the verdict chooses from; a cross where too few groups say anything."""
    beside: dict[str, Any] = {"textcoords": "offset points", "va": "center", "fontsize": 9}
    if not is_sure(fit):
        value = fit.value if math.isfinite(fit.value) else 0.0
        ax.plot(value, row, "x", color="0.6")
        shift, side = (-8, "right") if value > 0 else (8, "left")
        ax.annotate(f"{fit.groups} groups: too few", (value, row), (shift, 0), ha=side, color="0.45", **beside)
        return
    colour = GOOD if chosen else BLUE if compared else GREY
    ax.plot([fit.low, fit.high], [row, row], color=colour, linewidth=3 if chosen else 2)
    look: dict[str, Any] = {"marker": "D", "markersize": 9} if chosen else {"marker": "o", "markersize": 7}
    ax.plot(fit.value, row, color=colour, markerfacecolor=colour if compared else "white", **look)
    if chosen:
        box = {"facecolor": "white", "edgecolor": "none", "pad": 1}
        ax.annotate("the verdict's choice", (fit.low, row), (-8, 0), ha="right", color=GOOD, bbox=box, **beside)


def _draw_scale(ax: Axes, found: Estimate, zones: Sequence[tuple[float, str]], end: float) -> None:
    """An estimate on a scale from 0 to its end, with zones from their landmarks on, each darker than the last."""
    starts = sorted(start for start, _ in zones)
    for shade, (start, words) in enumerate(zones):
        stop = next((s for s in starts if s > start), end)
        ax.axvspan(start, stop, color="0.2", alpha=0.04 + 0.13 * shade, linewidth=0)
        where: dict[str, Any] = {"ha": "center", "va": "top", "transform": ax.get_xaxis_transform()}
        turned = 90 if stop - start < 0.22 * end else 0
        ax.text((start + stop) / 2, 0.95, words, rotation=turned, fontsize=9, color="0.2", **where)
        if start:
            ax.axvline(start, color="0.35", linewidth=1, linestyle=DASHED)
    ax.plot([found.low, found.high], [-0.4, -0.4], color=BLUE, linewidth=4)
    ax.plot(found.value, -0.4, "o", color=BLUE, markersize=10)
    side = "left" if found.value < 0.15 * end else "right" if found.value > 0.85 * end else "center"
    text: dict[str, Any] = {"textcoords": "offset points", "ha": side, "va": "top", "color": BLUE}
    ax.annotate(str(found), (found.value, -0.4), (0, -10), **text)
    ax.set(xlim=(0, end), ylim=(-1, 1), yticks=[])
    ax.spines[["top", "right", "left"]].set_visible(False)
