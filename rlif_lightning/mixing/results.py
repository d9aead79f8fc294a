"""What ``rlif mix`` has measured, one row per ratio: mix.csv, the table on the terminal, mix.png."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rlif_lightning.errors import UserError
from rlif_lightning.runs.atomic import replacing
from rlif_lightning.runs.curves import COLOURS, DASHED, SOLID

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TABLE, PICTURE = "mix.csv", "mix.png"
COLUMNS = (
    "ratio",  # share of the tuned weights
    "entropy",  # of the policy before training, mean over sampled tokens, nats
    "self_certainty",  # likewise
    "agreement",  # largest share of a group with one answer, mean over groups
    "completions",  # that entropy, self-certainty and agreement were measured on
    "n",  # held-out problems
    "accuracy", "accuracy_low", "accuracy_high",  # greedy, with its 95 % interval
    "accuracy_sampled", "accuracy_sampled_low", "accuracy_sampled_high",
    "mean_tokens_sampled", "truncated_fraction_sampled",
    "steps",  # of the fit, if any; the next ones are its evaluations (sampled accuracy, or greedy without samples)
    "before", "best", "best_step", "after",
)  # fmt: skip
Row = dict[str, float]


def read_rows(path: Path) -> dict[float, Row]:
    """The rows of a mix.csv by ratio, holding what was measured; none for a missing file.

    Raises:
        UserError: The file is no such table.
    """
    if not path.is_file():
        return {}
    try:
        with path.open(encoding="utf-8", newline="") as file:
            cells = [{name: float(cell) for name, cell in row.items() if cell} for row in csv.DictReader(file)]
        return {row["ratio"]: row for row in cells}
    except (ValueError, TypeError, KeyError, AttributeError, UnicodeDecodeError) as error:
        raise UserError(
            "The table of an earlier mixing is damaged",
            got=f"{path}: {error}",
            do="mend it, or take another --output",
        ) from error


def write_rows(path: Path, rows: dict[float, Row]) -> None:
    """Replace the table by these rows, in order of the ratio."""
    text = io.StringIO()
    table = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    table.writeheader()
    for ratio in sorted(rows):
        table.writerow({name: repr(value) if value % 1 else int(value) for name, value in rows[ratio].items()})
    with replacing(path) as file:
        file.write(text.getvalue().encode())


def results_table(rows: dict[float, Row]) -> str:
    """The rows as plain text; columns that nothing was measured for are left out."""

    def column(title: str, name: str, text: Callable[[Row], str]) -> list[str]:
        return [title, *(text(rows[ratio]) if name in rows[ratio] else "" for ratio in sorted(rows))]

    def number(title: str, name: str, form: str = ".3f") -> list[str]:
        return column(title, name, lambda row: f"{row[name]:{form}}")

    def interval(title: str, name: str) -> list[str]:
        return column(title, name, lambda r: f"{r[name]:.3f} [{r[f'{name}_low']:.2f}, {r[f'{name}_high']:.2f}]")

    columns = (
        number("ratio", "ratio", "g"),
        number("entropy", "entropy"),
        number("agreement", "agreement"),
        interval("greedy [95 %]", "accuracy"),
        interval("sampled [95 %]", "accuracy_sampled"),
        number("n", "n", ".0f"),
        number("steps", "steps", ".0f"),
        number("before", "before"),
        column("best @ step", "best", lambda row: f"{row['best']:.3f} @ {row['best_step']:.0f}"),
        number("after", "after"),
        column("gain at best", "before", lambda row: f"{row['best'] - row['before']:+.3f}"),
        column("at end", "before", lambda row: f"{row['after'] - row['before']:+.3f}"),
    )
    padded = [[cell.rjust(max(map(len, cells))) for cell in cells] for cells in columns if any(cells[1:])]
    return "\n".join("  ".join(line).rstrip() for line in zip(*padded, strict=True))


def draw_results(rows: dict[float, Row], path: Path, title: str) -> None:
    """Entropy, agreement and accuracy over the ratio; with fits also the gain, over the ratio and the entropy."""
    from matplotlib.figure import Figure

    points = [rows[ratio] for ratio in sorted(rows)]
    measured = {name for row in points for name in row}
    panels: list[Callable[[Axes, Sequence[Row]], None]] = [_entropy]
    panels += [_agreement] * ("agreement" in measured)
    panels += [_accuracy] * bool({"accuracy", "accuracy_sampled"} & measured)
    panels += [_gain_by_ratio, _gain_by_entropy] * ("before" in measured)
    columns = min(len(panels), 3)
    lines = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(4.6 * columns, 3.5 * lines + 0.4), dpi=100, layout="constrained")
    figure.suptitle(title, fontsize=11, fontweight="bold")
    for index, panel in enumerate(panels):
        ax = figure.add_subplot(lines, columns, index + 1)
        ax.set_xlabel("share of the tuned weights")
        panel(ax, points)
        ax.grid(color="0.9", linewidth=0.8)
        ax.spines[["top", "right"]].set_visible(False)
        ax.margins(x=0.05, y=0.1)
        if len(ax.get_legend_handles_labels()[0]) > 1:
            ax.legend(fontsize=8, framealpha=0.85)
    figure.savefig(path)


def _plot(ax: Axes, rows: Sequence[Row], name: str, colour: str, label: str, dashes: object = SOLID) -> None:
    """One quantity over the ratio, with its interval where it has one."""
    have = [row for row in rows if name in row]
    x, y = [row["ratio"] for row in have], [row[name] for row in have]
    spread = None
    if have and f"{name}_low" in have[0]:
        spread = [[r[name] - r[f"{name}_low"] for r in have], [r[f"{name}_high"] - r[name] for r in have]]
    ax.errorbar(x, y, spread, color=colour, label=label, linestyle=dashes, marker="o", markersize=4, capsize=2)


def _entropy(ax: Axes, rows: Sequence[Row]) -> None:
    _plot(ax, rows, "entropy", COLOURS[0], "entropy")
    ax.set_title("entropy before training (nats per token)", fontsize=10)
    ax.set_ylim(bottom=0)


def _agreement(ax: Axes, rows: Sequence[Row]) -> None:
    _plot(ax, rows, "agreement", COLOURS[2], "agreement")
    ax.set_title("agreement in a group before training", fontsize=10)


def _accuracy(ax: Axes, rows: Sequence[Row]) -> None:
    _plot(ax, rows, "accuracy_sampled", COLOURS[0], "sampled")
    _plot(ax, rows, "accuracy", COLOURS[1], "greedy", DASHED)
    ax.set_title("held-out accuracy before training (95 %)", fontsize=10)


def _gain_by_ratio(ax: Axes, rows: Sequence[Row]) -> None:
    x, best, after = _gains(ax, rows, "ratio", "")
    ax.plot(
        x, best, "o", color=COLOURS[0], linestyle=DASHED, markersize=9, markerfacecolor="none", label="at its best"
    )
    ax.plot(x, after, "o-", color=COLOURS[1], markersize=4, label="at the end")


def _gain_by_entropy(ax: Axes, rows: Sequence[Row]) -> None:
    x, best, after = _gains(ax, rows, "entropy", ", by entropy")
    ax.vlines(x, after, best, color="0.8", zorder=1)
    ax.plot(x, best, "o", color=COLOURS[0], markersize=9, markerfacecolor="none")
    ax.plot(x, after, "o", color=COLOURS[1], markersize=4)
    ratios = [row["ratio"] for row in rows if "before" in row]
    for ratio, *place in zip(ratios, x, best, strict=True):
        ax.annotate(f"{ratio:g}", (place[0], place[1]), (6, 5), textcoords="offset points", fontsize=8)
    ax.set_xlabel("entropy before training (nats per token)")


def _gains(ax: Axes, rows: Sequence[Row], over: str, words: str) -> tuple[list[float], list[float], list[float]]:
    """Title and zero line of a panel; its x, the gain at the best step, and that at the end."""
    fits = [row for row in rows if "before" in row]
    steps = ", ".join(sorted({f"{row['steps']:.0f}" for row in fits}))
    ax.set_title(f"change of accuracy over {steps} steps{words}", fontsize=10)
    ax.axhline(0, color="0.5", linewidth=1)
    best, after = ([row[name] - row["before"] for row in fits] for name in ("best", "after"))
    return [row[over] for row in fits], best, after
