"""The first half of a run's picture: accuracy and reward with what helped and what hurt, and answers on the way."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rlif_lightning.runs import story
from rlif_lightning.runs.held_out import beginning, ending, mark
from rlif_lightning.runs.metrics_csv import Curves
from rlif_lightning.runs.pictures import BAD, BLUE, DASHED, GOOD, GREY, label_ends

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import FigureBase

HeldOut = Mapping[int, Sequence[Mapping[str, Any]]]  # as load_held_out returns it


def draw_story(figure: FigureBase, curves: Curves, guard: dict[str, Any] | None, held_out: HeldOut) -> None:
    """Draw a run with held-out accuracy, and a guard that has fired; below the curves answers on the way."""
    found = story.held_out_accuracy(curves)
    assert found is not None
    accuracy, reward = found[1], story.finite(curves.get(story.REWARD, {}))
    grid = figure.add_gridspec(2, 3, height_ratios=[4, 1.3 if held_out else 0.01], hspace=0.05)
    ax = figure.add_subplot(grid[0, :])
    ax.set_title(story.headline(curves), loc="left", fontsize=13, fontweight="bold", parse_math=False)
    ax.set(xlabel="optimiser step", ylabel="accuracy on held-out problems", ylim=(0, 1.05))
    ax.spines[["top", "right"]].set_visible(False)
    first, last = min([*accuracy, *reward]), max([*accuracy, *reward])
    ax.set_xlim(first, max(last, first + 1))
    _shade(ax, accuracy)
    start = accuracy[min(accuracy)]
    ax.axhline(start, color=BLUE, linewidth=1, linestyle=":")
    left_of: dict[str, Any] = {"ha": "right", "transform": ax.get_yaxis_transform()}
    ax.text(0.995, start + 0.01, f"start {story.number(start)}", color=BLUE, **left_of)
    ax.plot(list(accuracy), list(accuracy.values()), color=BLUE, linewidth=3, marker="o", markersize=4)
    ends = {f"accuracy\n{story.number(accuracy[max(accuracy)])}": (accuracy[max(accuracy)] / 1.05, BLUE)}
    if len(reward) > 1:
        ends |= _draw_reward(ax, reward)
    label_ends(ax, ends)
    if guard is not None:
        _mark_guard(ax, guard, accuracy)
    if held_out:
        shown = story.moments(held_out, curves, guard)
        for n, (step, when) in enumerate(shown.items()):
            _write_answers(figure.add_subplot(grid[1, n]), f"{when} (step {step})", held_out[step])


def _shade(ax: Axes, accuracy: dict[int, float]) -> None:
    """Say where training helped and, if it did, where it hurt."""
    best, start, last = story.best_step(accuracy), min(accuracy), max(accuracy)
    assert best is not None
    text: dict[str, Any] = {"ha": "center", "va": "top", "fontsize": 11}
    if accuracy[best] > accuracy[start] + story.NOISE:
        ax.axvspan(start, best, color=GOOD, alpha=0.05, linewidth=0)
        ax.text((start + best) / 2, 1.03, "training helps", color=GOOD, **text)
    else:
        best = start
    if accuracy[last] < accuracy[best] - story.NOISE:
        ax.axvspan(best, last, color=BAD, alpha=0.1, linewidth=0)
        ax.text((best + last) / 2, 1.03, "training hurts", color=BAD, **text)


def _draw_reward(ax: Axes, reward: dict[int, float]) -> dict[str, tuple[float, str]]:
    """Draw the reward on a scale of its own; returns the label of its end."""
    scaled = [0.12 + 0.72 * value for value in story.own_scale(reward).values()]
    ax.plot(list(reward), scaled, color=GREY, linewidth=1.6, linestyle=DASHED, transform=ax.get_xaxis_transform())
    return {f"reward\n(own scale)\n{story.number(reward[max(reward)])}": (scaled[-1], GREY)}


def _mark_guard(ax: Axes, guard: dict[str, Any], accuracy: dict[int, float]) -> None:
    """Mark what the guard hands back, with its accuracy where known, and where it fired."""
    fired, handed = guard["fired"]["step"], guard["handed_back_step"]
    ax.axvline(fired, color=BAD, linewidth=1.2, linestyle=DASHED)
    known = story.handed_back(guard, accuracy.get(handed))
    if known is None:
        return
    ax.plot([handed], [known], "D", color=GOOD, markeredgecolor="white", markersize=11, zorder=5)
    low, high = ax.get_xlim()
    left = handed > (low + high) / 2
    ax.annotate(
        f"the guard hands back step {handed}: {story.number(known)}\n(it saw no labels; it fired at step {fired})",
        (handed, known),
        xytext=(-70 if left else 70, -10),
        textcoords="offset points",
        ha="right" if left else "left",
        va="top",
        color=GOOD,
        fontsize=11,
        arrowprops={"arrowstyle": "-", "color": GOOD},
        bbox={"facecolor": "white", "alpha": 0.8, "edgecolor": "none", "pad": 2},
    )


def _write_answers(ax: Axes, title: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write the answers to a few problems, right and wrong ones in their colours."""
    ax.axis("off")
    ax.text(0, 1, title, fontsize=10.5, fontweight="bold", va="top")
    for line, row in enumerate(rows):
        shown = f"{mark(row)} {beginning(row['problem'], 16)} → {ending(row['completion'], 26)}"
        colour = GOOD if row.get("correct") else BAD if "correct" in row else GREY
        style: dict[str, Any] = {"family": "monospace", "color": colour, "parse_math": False}
        ax.text(0, 0.76 - 0.2 * line, shown, fontsize=9, va="top", **style)
