"""How the cost of a step grows with group size, completion length, vocabulary and model size.

    python -m benchmarks.growth --repeats 3

One size changes at a time, the others stay. CPU seconds of one thread, medians; the exponent is that of a power
law through the points (least squares of the logarithms). Where it rises towards the end, a cost that does not
depend on the size fades next to one that does.
"""

import argparse
import json
import math
import statistics
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks import result, shapes
from benchmarks.phases import UPDATE, Seconds, measure
from benchmarks.shapes import Work
from rlif_lightning.runs.pictures import COLOURS, MARKERS

PARTS = ("rollout", "reference", "update")
BEGIN, END = "<!-- growth -->", "<!-- /growth -->"


@dataclass(frozen=True)
class Size:
    """What is measured at one point; the defaults are where the axes cross."""

    group: int = 8
    tokens: int = 64
    vocabulary: int = 2048
    hidden: int = 256
    layers: int = 4
    prompts: int = 2
    prompt_tokens: int = 32

    def work(self, folder: Path) -> Work:
        """The model is written where it is not there yet."""
        target = folder / f"{self.vocabulary}-{self.hidden}-{self.layers}"
        if not target.exists():
            sizes = {"vocab_size": self.vocabulary, "hidden_size": self.hidden, "intermediate_size": 4 * self.hidden}
            shapes.save(target, "A", self.prompt_tokens, **sizes, num_hidden_layers=self.layers)
        return Work(
            str(target),
            self.tokens,
            prompts=self.prompts,
            group=self.group,
            micro_batch=self.prompts * self.group // 2,
            kl=0.04,
            reward="self_certainty",
        )


AXES: dict[str, tuple[str, tuple[int, ...], Callable[[int], Size]]] = {
    "group": ("completions per prompt", (4, 8, 16, 32), lambda n: Size(group=n)),
    "tokens": ("completion tokens", (32, 64, 128, 256), lambda n: Size(tokens=n)),
    "vocabulary": ("vocabulary", (2048, 8192, 32768, 131072), lambda n: Size(vocabulary=n)),
    "hidden": ("hidden size", (64, 128, 256, 512), lambda n: Size(hidden=n)),
}


def part_seconds(steps: Sequence[Seconds]) -> Seconds:
    """Medians of rollout, reference and update."""
    return {
        "rollout": statistics.median(s["rollout"] for s in steps),
        "reference": statistics.median(s["reference"] for s in steps),
        "update": statistics.median(sum(s[p] for p in UPDATE) for s in steps),
    }


def power_law(sizes: Sequence[int], seconds: Sequence[float]) -> tuple[float, float]:
    """Exponent and factor of seconds = factor * size ** exponent."""
    x, y = [math.log(n) for n in sizes], [math.log(s) for s in seconds]
    slope, intercept = statistics.linear_regression(x, y)
    return slope, math.exp(intercept)


def table(points: dict[str, dict[int, Seconds]]) -> str:
    """An axis per row: range, exponents over all of it and over its last two points, seconds at both ends."""
    lines = ["| size | from | to | " + " | ".join(PARTS) + " |", "|---" * (3 + len(PARTS)) + "|"]
    for axis, found in points.items():
        sizes = list(found)
        cells = []
        for part in PARTS:
            seconds = [found[n][part] for n in sizes]
            slope, last = (power_law(sizes[i:], seconds[i:])[0] for i in (0, -2))
            cells.append(f"n^{slope:.2f}, at the end n^{last:.2f} ({seconds[0]:.2f} to {seconds[-1]:.2f} s)")
        lines.append(f"| {AXES[axis][0]} | {sizes[0]:,} | {sizes[-1]:,} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def draw(points: dict[str, dict[int, Seconds]], path: Path) -> None:
    """A panel per axis, both scales logarithmic, with the power laws."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullFormatter

    figure = Figure(figsize=(3.1 * len(points), 3.4), layout="constrained")
    panels = figure.subplots(1, len(points), sharey=True, squeeze=False)[0]
    for panel, (axis, found) in zip(panels, points.items(), strict=True):
        sizes = list(found)
        for part, colour, marker in zip(PARTS, COLOURS, MARKERS, strict=False):
            seconds = [found[n][part] for n in sizes]
            slope, factor = power_law(sizes, seconds)
            panel.plot(sizes, [factor * n**slope for n in sizes], color=colour, linewidth=1, alpha=0.6)
            panel.plot(sizes, seconds, marker, color=colour, markersize=4, label=f"{part}  $n^{{{slope:.2f}}}$")
        panel.set_xscale("log", base=2)
        panel.set_yscale("log")
        panel.set_xticks(sizes, [f"{n:,}" for n in sizes])
        panel.xaxis.set_minor_formatter(NullFormatter())
        panel.set_xlabel(AXES[axis][0])
        panel.grid(alpha=0.25)
        panel.legend(fontsize=7.5, loc="upper left", frameon=False)
    everything = [s for found in points.values() for parts in found.values() for s in parts.values()]
    panels[0].set_ylim(min(everything) / 1.5, max(everything) * 6)  # room for the legends
    panels[0].set_ylabel("CPU seconds per step")
    figure.savefig(path, dpi=150)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, draw, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--axes", nargs="+", choices=list(AXES), default=list(AXES))
    parser.add_argument("--points", type=int, default=4, help="the first so many sizes of each axis, 2 or more")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("runs/bench"))
    parser.add_argument("--picture", type=Path, help="null: OUT/growth.png")
    parser.add_argument("--docs", type=Path, help=f"document with {BEGIN} and {END} to put the table in")
    options = parser.parse_args(arguments)
    points: dict[str, dict[int, Seconds]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for axis in options.axes:
            _, sizes, size = AXES[axis]
            points[axis] = {
                n: part_seconds(measure(size(n).work(Path(folder)), options.repeats)) for n in sizes[: options.points]
            }
    options.out.mkdir(parents=True, exist_ok=True)
    how = result.setting("python -m benchmarks.growth", options.repeats, 1)
    (options.out / "growth.json").write_text(json.dumps({"points": points, "setting": how}, indent=1) + "\n")
    draw(points, options.picture or options.out / "growth.png")
    text = table(points) + "\n" + result.describe(how) + "\n"
    print(text)
    if options.docs is not None:
        result.fill(options.docs, text, BEGIN, END)


if __name__ == "__main__":
    main()
