"""Where the time of one step goes.

    python -m benchmarks.where --repeats 3

CPU seconds of one thread, medians. "the rest" is what is left of the whole: reading texts, rewards, advantages,
cutting slices, data loading, hooks, Lightning's loop.
"""

import argparse
import json
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks import result, shapes
from benchmarks.phases import PHASES, Seconds, measure
from benchmarks.shapes import Work

SIZES = {"tiny": (6, 8), "A": (64, 192), "B": (32, 96)}  # prompt and completion tokens
BEGIN, END = "<!-- where -->", "<!-- /where -->"


def split(steps: Sequence[Seconds]) -> Seconds:
    """Median of each phase, of the whole, and what is left of it."""
    rest = [{**s, "the rest": s["step"] - sum(s.get(p, 0.0) for p in PHASES)} for s in steps]
    return {p: statistics.median(s.get(p, 0.0) for s in rest) for p in (*PHASES, "the rest", "step")}


def table(parts: dict[str, Seconds]) -> str:
    """Phases as rows, shapes as columns."""
    lines = ["| part | " + " | ".join(parts) + " |", "|---" * (len(parts) + 1) + "|"]
    for phase in (*PHASES, "the rest", "step"):
        cells = [f"{p[phase]:.2f} s ({p[phase] / p['step']:.0%})" for p in parts.values()]
        lines.append(f"| {'the whole step' if phase == 'step' else phase} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=list(SIZES), default=["A", "B"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("runs/bench"))
    parser.add_argument("--docs", type=Path, help=f"document with {BEGIN} and {END} to put the table in")
    options = parser.parse_args(arguments)
    parts = {}
    with tempfile.TemporaryDirectory() as folder:
        for shape in options.shapes:
            prompt, new = SIZES[shape]
            saved = shapes.save(Path(folder) / shape, shape, prompt)
            work = Work(saved, new, kl=0.04, reward="self_certainty")
            parts[f"{shape}, T={new}"] = split(measure(work, options.repeats))
    options.out.mkdir(parents=True, exist_ok=True)
    how = result.setting("python -m benchmarks.where", options.repeats, 1)
    (options.out / "where.json").write_text(json.dumps({"parts": parts, "setting": how}, indent=1) + "\n")
    text = table(parts) + "\n" + result.describe(how) + "\n"
    print(text)
    if options.docs is not None:
        result.fill(options.docs, text, BEGIN, END)


if __name__ == "__main__":
    main()
