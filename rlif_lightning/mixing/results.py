"""What ``rlif mix`` has measured, one row per ratio: mix.csv, the table on the terminal, mix.png."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlif_lightning.errors import UserError
from rlif_lightning.runs.atomic import write_text
from rlif_lightning.runs.pictures import COLOURS, DASHED, SOLID, save_figure
from rlif_lightning.runs.summary import aligned

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
SHOWN = {  # columns of the printed table
    "ratio": "{ratio:g}",
    "entropy": "{entropy:.3f}",
    "agreement": "{agreement:.3f}",
    "greedy [95 %]": "{accuracy:.3f} [{accuracy_low:.2f}, {accuracy_high:.2f}]",
    "sampled [95 %]": "{accuracy_sampled:.3f} [{accuracy_sampled_low:.2f}, {accuracy_sampled_high:.2f}]",
    "n": "{n:.0f}",
    "steps": "{steps:.0f}",
    "before": "{before:.3f}",
    "best @ step": "{best:.3f} @ {best_step:.0f}",
    "after": "{after:.3f}",
    "gain at best": "{gain_best:+.3f}",
    "at end": "{gain_after:+.3f}",
}
PANELS: dict[str, list[tuple[str, str, str, Any]]] = {  # title -> (metric, label, colour, dashes)
    "entropy before training (nats per token)": [("entropy", "entropy", COLOURS[0], SOLID)],
    "agreement in a group before training": [("agreement", "agreement", COLOURS[0], SOLID)],
    "held-out accuracy before training (95 %)": [
        ("accuracy_sampled", "sampled", COLOURS[0], SOLID),
        ("accuracy", "greedy", COLOURS[1], DASHED),
    ],
}
Row = dict[str, float]


def read_rows(path: Path) -> dict[float, Row]:
    """The rows of a mix.csv by ratio, holding what was measured; none for a missing file."""
    if not path.is_file():
        return {}
    try:
        with path.open(encoding="utf-8", newline="") as file:
            cells = [{name: float(cell) for name, cell in row.items() if cell} for row in csv.DictReader(file)]
        return {row["ratio"]: row for row in cells}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        do = "mend it, or take another --output"
        raise UserError("The table of an earlier mixing is damaged", got=f"{path}: {error}", do=do) from error


def write_rows(path: Path, rows: dict[float, Row]) -> None:
    """Replace the table by these rows, in order of the ratio."""
    text = io.StringIO()
    table = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    table.writeheader()
    for ratio in sorted(rows):
        table.writerow({name: repr(value) if value % 1 else int(value) for name, value in rows[ratio].items()})
    write_text(path, text.getvalue())


def results_table(rows: dict[float, Row]) -> str:
    """The rows as plain text; columns that nothing was measured for are left out."""
    points = [rows[ratio] | _gains(rows[ratio]) for ratio in sorted(rows)]
    columns = [[title, *(_cell(form, row) for row in points)] for title, form in SHOWN.items()]
    rows_shown = zip(*(cells for cells in columns if any(cells[1:])), strict=True)
    return "\n".join(aligned([*rows_shown], first=str.rjust))


def _cell(form: str, row: Row) -> str:
    try:
        return form.format_map(row)
    except KeyError:  # not measured
        return ""


def _gains(row: Row) -> Row:
    return {f"gain_{name}": row[name] - row["before"] for name in ("best", "after") if "before" in row}


def draw_results(rows: dict[float, Row], path: Path, title: str) -> None:
    """Entropy, agreement and accuracy over the ratio; with fits also the gain, over the ratio and the entropy."""
    from matplotlib.figure import Figure

    points = [rows[ratio] | _gains(rows[ratio]) for ratio in sorted(rows)]
    fits = [row for row in points if "before" in row]
    measured = {name for row in points for name in row}
    panels = [
        partial(_draw_panel, rows=points, title=title)
        for title, lines in PANELS.items()
        if measured & {name for name, *_ in lines}
    ]
    panels += [partial(_draw_gains, rows=fits, over=over) for over in ("ratio", "entropy") if fits]
    columns = min(len(panels), 3)
    lines = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(4.6 * columns, 3.5 * lines + 0.4), dpi=100, layout="constrained")
    figure.suptitle(title, fontsize=11, fontweight="bold")
    for index, panel in enumerate(panels):
        ax = figure.add_subplot(lines, columns, index + 1)
        ax.set_xlabel("share of the tuned weights")
        panel(ax)
        ax.grid(color="0.9", linewidth=0.8)
        ax.spines[["top", "right"]].set_visible(False)
        ax.margins(x=0.05, y=0.1)
        if len(ax.get_legend_handles_labels()[0]) > 1:
            ax.legend(fontsize=8, framealpha=0.85)
    save_figure(figure, path)


def _draw_panel(ax: Axes, rows: Sequence[Row], title: str) -> None:
    """Quantities over the ratio, with their intervals where they have one."""
    ax.set_title(title, fontsize=10)
    for name, label, colour, dashes in PANELS[title]:
        have = [row for row in rows if name in row]
        x, y = [row["ratio"] for row in have], [row[name] for row in have]
        spread = None
        if have and f"{name}_low" in have[0]:
            spread = [[r[name] - r[f"{name}_low"] for r in have], [r[f"{name}_high"] - r[name] for r in have]]
        ax.errorbar(x, y, spread, color=colour, label=label, linestyle=dashes, marker="o", markersize=4, capsize=2)
    if "entropy" in title:
        ax.set_ylim(bottom=0)


def _draw_gains(ax: Axes, rows: Sequence[Row], over: str) -> None:
    """Change of accuracy at the best step and at the end; over the entropy each point names its ratio."""
    x, best, after = ([row[name] for row in rows] for name in (over, "gain_best", "gain_after"))
    steps = ", ".join(sorted({f"{row['steps']:.0f}" for row in rows}))
    ax.set_title(f"change of accuracy over {steps} steps" + ", by entropy" * (over == "entropy"), fontsize=10)
    ax.axhline(0, color="0.5", linewidth=1)
    ax.vlines(x, after, best, color="0.8", zorder=1)
    ax.plot(x, best, "o", color=COLOURS[0], markersize=9, markerfacecolor="none", label="at its best")
    ax.plot(x, after, "o", color=COLOURS[1], markersize=4, label="at the end")
    if over == "entropy":
        for row in rows:
            at = (row["entropy"], row["gain_best"])
            ax.annotate(f"{row['ratio']:g}", at, (6, 5), textcoords="offset points", fontsize=8)
        ax.set_xlabel("entropy before training (nats per token)")
