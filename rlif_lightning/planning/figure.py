"""A plan as a picture: a bar for each phase, stacked of its parts."""

from pathlib import Path

from rlif_lightning.planning.devices import SIZES, usable
from rlif_lightning.planning.memory import GIB, Memory
from rlif_lightning.planning.text import PARTS
from rlif_lightning.runs.pictures import save_figure


def draw_plan(plan: Memory, title: str, path: Path, gigabytes: float) -> None:
    """Draw it with the line of a GPU of so many GB."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.5, 4.6), dpi=130, layout="constrained")
    axes = figure.subplots()
    names, tops = list(plan.phases), [0.0] * len(plan.phases)
    for index, part in enumerate(PARTS):
        sizes = [parts.get(part, 0) / GIB for parts in plan.phases.values()]
        if max(sizes) > 0.003 * plan.peak / GIB:
            lightness = index / (len(PARTS) - 1)  # rises along viridis, for eyes of all kinds and for grey prints
            shade = colormaps["viridis"](lightness)
            bars = axes.bar(names, sizes, 0.62, tops, label=part, color=shade, edgecolor="white")
            named = [part if size > 0.035 * plan.peak / GIB else "" for size in sizes]
            text = "white" if lightness < 0.6 else "black"
            axes.bar_label(bars, named, label_type="center", fontsize=8, color=text)
        tops = [a + b for a, b in zip(tops, sizes, strict=True)]
    for index, height in enumerate(tops):
        axes.text(index, height, f"{height:.1f}", ha="center", va="bottom", fontsize=9)
    for size in sorted({*SIZES, gigabytes}):
        level, colour = usable(size) / GIB, "#c00000" if size == gigabytes else "#999999"
        if level < 1.12 * plan.peak / GIB or size <= gigabytes:
            axes.axhline(level, color=colour, linewidth=1, linestyle="--", zorder=0)
            axes.text(len(names) - 0.52, level, f"{size:g} GB", fontsize=8, va="center", color="#666666")
    axes.set(xlim=(-0.55, len(names) - 0.55), ylim=(0, None), ylabel="GiB per device")
    axes.set_title(title, fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(reverse=True, loc="outside right center", fontsize=8.5, frameon=False)
    save_figure(figure, path)
