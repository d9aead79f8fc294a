"""A plan as a picture: a bar for each phase, stacked of its parts."""

from pathlib import Path

from rlif_lightning.errors import UserError
from rlif_lightning.planning.devices import SIZES, usable
from rlif_lightning.planning.memory import GIB, Memory
from rlif_lightning.planning.text import ROWS

COLOURS = {
    "weights": "#1f4e79", "adapter": "#2e75b6", "reference": "#9dc3e6", "optimiser": "#7f6000",
    "gradients": "#c55a11", "buckets": "#843c0c", "activations": "#f4b183", "casts": "#bdd7ee", "gathered": "#5b9bd5",
    "KV cache": "#548235", "rollout": "#a9d18e", "logits": "#c5e0b4", "head": "#ffd966", "temporary": "#bfbfbf",
}  # fmt: skip


def draw_plan(plan: Memory, title: str, path: Path, gigabytes: float) -> None:
    """Draw it with the line of a GPU of so many GB.

    Raises:
        UserError: The picture cannot be written.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.5, 4.6), layout="constrained")
    axes = figure.subplots()
    names = list(plan.phases)
    base = [0.0] * len(names)
    for part in ROWS:
        sizes = [plan.phases[name].get(part, 0) / GIB for name in names]
        if max(sizes) > 0.003 * plan.peak / GIB:
            axes.bar(names, sizes, 0.62, base, label=part, color=COLOURS[part], edgecolor="white", linewidth=0.6)
        base = [a + b for a, b in zip(base, sizes, strict=True)]
    for index, height in enumerate(base):
        axes.text(index, height, f"{height:.1f}", ha="center", va="bottom", fontsize=9)
    top = max(plan.peak * 1.12, usable(gigabytes) * 1.08) / GIB
    for size in sorted({*SIZES, gigabytes}):
        level = usable(size) / GIB
        if level < top:
            colour = "#c00000" if size == gigabytes else "#999999"
            axes.axhline(level, color=colour, linewidth=1, linestyle="--", zorder=0)
            axes.text(len(names) - 0.52, level, f"{size:g} GB", fontsize=8, va="center", color="#666666")
    axes.set_xlim(-0.55, len(names) - 0.55)
    axes.set_ylim(0, top)
    axes.set_ylabel("GiB per device")
    axes.set_title(title, fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles[::-1], labels[::-1], loc="outside right center", fontsize=8.5, frameon=False)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=130)
    except (OSError, ValueError) as error:
        raise UserError(
            "The picture cannot be written", got=f"{path}: {error}", do="choose another --picture"
        ) from error
