"""What ``rlif mix`` has measured, one row per ratio: mix.csv, the table on the terminal, mix.png."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rlif_lightning.errors import UserError
from rlif_lightning.runs.curves import COLOURS, DASHED
from rlif_lightning.runs.folder import replacing

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

    def number(name: str) -> Callable[[Row], str]:
        return lambda row: f"{row[name]:.3f}" if name in row else ""

    def interval(name: str) -> Callable[[Row], str]:
        return lambda r: f"{r[name]:.3f} [{r[f'{name}_low']:.2f}, {r[f'{name}_high']:.2f}]" if name in r else ""

    shown: tuple[tuple[str, Callable[[Row], str]], ...] = (
        ("ratio", lambda row: f"{row['ratio']:g}"),
        ("entropy", number("entropy")),
        ("agreement", number("agreement")),
        ("greedy [95 %]", interval("accuracy")),
        ("sampled [95 %]", interval("accuracy_sampled")),
        ("n", lambda row: f"{row['n']:.0f}" if "n" in row else ""),
        ("steps", lambda row: f"{row['steps']:.0f}" if "steps" in row else ""),
        ("before", number("before")),
        ("best @ step", lambda row: f"{row['best']:.3f} @ {row['best_step']:.0f}" if "best" in row else ""),
        ("after", number("after")),
        ("gain at best", lambda row: f"{row['best'] - row['before']:+.3f}" if "before" in row else ""),
        ("at end", lambda row: f"{row['after'] - row['before']:+.3f}" if "before" in row else ""),
    )
    columns = [(title, [cell(rows[ratio]) for ratio in sorted(rows)]) for title, cell in shown]
    columns = [(title, cells) for title, cells in columns if any(cells)]
    widths = [max(map(len, (title, *cells))) for title, cells in columns]
    lines = [[title for title, _ in columns], *map(list, zip(*(cells for _, cells in columns), strict=True))]
    return "\n".join("  ".join(c.rjust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in lines)


def draw_results(rows: dict[float, Row], path: Path, title: str) -> None:
    """Entropy, agreement and accuracy over the ratio; with fits also the gain, over the ratio and the entropy."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
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
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=11, fontweight="bold")
    for index, panel in enumerate(panels):
        ax = figure.add_subplot(lines, columns, index + 1)
        panel(ax, points)
        ax.grid(color="0.9", linewidth=0.8)
        ax.spines[["top", "right"]].set_visible(False)
        ax.margins(x=0.05, y=0.1)
        if panel is not _gain_by_entropy:
            ax.set_xlabel("share of the tuned weights")
        if len(ax.get_legend_handles_labels()[0]) > 1:
            ax.legend(fontsize=8, framealpha=0.85)
    figure.savefig(path)


def _line(ax: Axes, rows: Sequence[Row], name: str, colour: str, label: str, dashes: object = "-") -> None:
    """One quantity over the ratio, with its interval where it has one."""
    have = [row for row in rows if name in row]
    x, y = [row["ratio"] for row in have], [row[name] for row in have]
    spread = None
    if have and f"{name}_low" in have[0]:
        spread = [[r[name] - r[f"{name}_low"] for r in have], [r[f"{name}_high"] - r[name] for r in have]]
    ax.errorbar(x, y, spread, color=colour, label=label, linestyle=dashes, marker="o", markersize=4, capsize=2)


def _entropy(ax: Axes, rows: Sequence[Row]) -> None:
    ax.set_title("entropy before training (nats per token)", fontsize=10)
    _line(ax, rows, "entropy", COLOURS[0], "entropy")
    ax.set_ylim(bottom=0)


def _agreement(ax: Axes, rows: Sequence[Row]) -> None:
    ax.set_title("agreement in a group before training", fontsize=10)
    _line(ax, rows, "agreement", COLOURS[2], "agreement")


def _accuracy(ax: Axes, rows: Sequence[Row]) -> None:
    ax.set_title("held-out accuracy before training (95 %)", fontsize=10)
    _line(ax, rows, "accuracy_sampled", COLOURS[0], "sampled")
    _line(ax, rows, "accuracy", COLOURS[1], "greedy", DASHED)


def _gains(rows: Sequence[Row]) -> list[tuple[Row, float, float]]:
    return [(row, row["after"] - row["before"], row["best"] - row["before"]) for row in rows if "before" in row]


def _title_of_gains(ax: Axes, rows: Sequence[Row], over: str) -> None:
    steps = ", ".join(sorted({f"{row['steps']:.0f}" for row in rows if "steps" in row}))
    ax.set_title(f"change of accuracy over {steps} steps{over}", fontsize=10)
    ax.axhline(0, color="0.5", linewidth=1)


def _gain_by_ratio(ax: Axes, rows: Sequence[Row]) -> None:
    _title_of_gains(ax, rows, "")
    gains = _gains(rows)
    x = [row["ratio"] for row, *_ in gains]
    best = [best for *_, best in gains]
    ax.plot(
        x, best, "o", color=COLOURS[0], linestyle=DASHED, markersize=9, markerfacecolor="none", label="at its best"
    )
    ax.plot(x, [after for _, after, _ in gains], "o-", color=COLOURS[1], markersize=4, label="at the end")


def _gain_by_entropy(ax: Axes, rows: Sequence[Row]) -> None:
    _title_of_gains(ax, rows, ", by entropy")
    for row, after, best in _gains(rows):
        ax.plot([row["entropy"]] * 2, [after, best], color="0.8", zorder=1)
        ax.plot(row["entropy"], best, "o", color=COLOURS[0], markersize=9, markerfacecolor="none")
        ax.plot(row["entropy"], after, "o", color=COLOURS[1], markersize=4)
        ax.annotate(f"{row['ratio']:g}", (row["entropy"], best), (6, 5), textcoords="offset points", fontsize=8)
    ax.set_xlabel("entropy before training (nats per token)")
