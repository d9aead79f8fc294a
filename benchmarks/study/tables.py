"""The tables and pictures of docs/study.md from the runs of runs.py and the accuracies of accuracy.py.

    python benchmarks/study/tables.py --runs runs-study --out docs

Best steps are chosen on one half of the samples and reported on the other; intervals are 95 % t intervals over seeds.
"""

import argparse
import json
import math
import statistics
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parent))
import conditions
from accuracy import FILE
from figures import accuracy_figure, behaviour_figure

from rlif_lightning.runs.metrics_csv import read_metrics

T = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36, 9: 2.31, 10: 2.26}  # 97.5 % quantiles, n - 1
Rows = list[dict[str, Any]]


def runs_of(root: Path, condition: str, seeds: Sequence[int]) -> dict[int, Path]:
    """Finished and evaluated runs of a condition."""
    folders = {seed: root / condition / str(seed) for seed in seeds}
    return {seed: folder for seed, folder in folders.items() if (folder / FILE).exists()}


def curve(run: Path, key: str = "sampled") -> dict[int, float]:
    """Accuracy by step: ``sampled`` of both halves, ``a``, ``b`` or ``greedy``."""
    known = {int(step): row for step, row in json.loads((run / FILE).read_text()).items() if int(step) % 10 == 0}
    pick = (lambda row: (row["a"] + row["b"]) / 2) if key == "sampled" else (lambda row: row[key])
    return {step: pick(known[step]) for step in sorted(known)}


def with_interval(values: Sequence[float]) -> str:
    """Mean and half the width of its interval over seeds."""
    n, mean = len(values), statistics.mean(values)
    return f"{mean:.2f}" if n < 2 else f"{mean:.2f} ± {T[n] * statistics.stdev(values) / math.sqrt(n):.2f}"


def rise_and_fall(root: Path, names: Sequence[str], seeds: Sequence[int]) -> str:
    """A row per condition."""
    head = (
        "condition",
        "n",
        "start",
        "best",
        "at step",
        "rise",
        "end",
        "greedy: start, best, end",
        "entropy: start, end",
    )
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for name in names:
        runs = runs_of(root, name, seeds).values()
        if not runs:
            continue
        starts, bests, steps, ends, greedy, entropy = [], [], [], [], [], []
        for run in runs:
            half, both, sure = curve(run, "a"), curve(run), list(curve(run, "greedy").values())
            step = max(half, key=lambda s: half[s])
            starts.append(both[0])
            bests.append(curve(run, "b")[step])
            steps.append(step)
            ends.append(statistics.mean(list(both.values())[-2:]))
            greedy.append((sure[0], max(sure), sure[-1]))
            values = list(read_metrics(run / "metrics.csv")["rollout/entropy"].values())
            entropy.append((values[0], statistics.mean(values[-5:])))
        rise = [b - s for b, s in zip(bests, starts, strict=True)]
        cells = [
            conditions.title(name),
            str(len(runs)),
            f"{statistics.mean(starts):.2f}",
            f"{statistics.mean(bests):.2f}",
            f"{min(steps)} to {max(steps)}",
            with_interval(rise),
            with_interval(ends),
            ", ".join(f"{statistics.mean(x):.2f}" for x in zip(*greedy, strict=True)),
            ", ".join(f"{statistics.mean(x):.2f}" for x in zip(*entropy, strict=True)),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def completions(run: Path, steps: Sequence[int]) -> dict[int, Rows]:
    """Rows of completions.jsonl of some steps."""
    found: dict[int, Rows] = defaultdict(list)
    with (run / "completions.jsonl").open(encoding="utf-8") as file:
        for line in file:
            row = json.loads(line)
            if row["step"] in steps:
                found[row["step"]].append(row)
    return found


def repetition(text: str) -> float:
    """Share of a text's character trigrams that have occurred in it before."""
    grams = [text[i : i + 3] for i in range(len(text) - 2)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def commonest(rows: Rows) -> float:
    """Share of the rollout's completions that give its most frequent answer, whatever the problem."""
    answers = Counter(row["answer"] for row in rows if row.get("answer") is not None)
    return max(answers.values(), default=0) / len(rows)


BEHAVIOUR: dict[str, Callable[[Rows], float]] = {
    "repeated trigrams": lambda rows: statistics.mean(repetition(r["completion"]) for r in rows),
    "tokens": lambda rows: statistics.mean(r["tokens"] for r in rows),
    "cut off": lambda rows: statistics.mean(not r["ended"] for r in rows),
    "commonest answer": commonest,
    "worked steps (with =)": lambda rows: statistics.mean("=" in r["completion"] for r in rows),
    'hedges ("?")': lambda rows: statistics.mean("?" in r["completion"] for r in rows),
}


def behaviour(root: Path, names: Sequence[str], seeds: Sequence[int], steps: Sequence[int]) -> str:
    """A row per condition and measure: means over seeds at some steps."""
    lines = [f"| condition | measure | {' | '.join(f'step {s}' for s in steps)} |", "|---" * (2 + len(steps)) + "|"]
    for name, measures in behaviour_curves(root, names, seeds, steps).items():
        for measure, curve in measures.items():
            cells = " | ".join(f"{mean:.3f}" for mean in curve.values())
            lines.append(f"| {conditions.title(name)} | {measure} | {cells} |")
    return "\n".join(lines)


def behaviour_curves(
    root: Path, names: Sequence[str], seeds: Sequence[int], steps: Sequence[int]
) -> dict[str, dict[str, dict[int, float]]]:
    """Condition -> measure -> step -> mean over seeds."""
    found = {}
    for name in names:
        rolled = [completions(run, steps) for run in runs_of(root, name, seeds).values()]
        if rolled:
            found[name] = {
                title: {s: statistics.mean(measure(rows[s]) for rows in rolled) for s in steps}
                for title, measure in BEHAVIOUR.items()
            }
    return found


def accuracy_curves(
    root: Path, names: Sequence[str], seeds: Sequence[int]
) -> dict[str, dict[str, list[dict[int, float]]]]:
    """Condition -> ``sampled`` and ``greedy`` -> a curve per run."""
    found = {name: runs_of(root, name, seeds).values() for name in names}
    return {
        name: {key: [curve(run, key) for run in runs] for key in ("sampled", "greedy")}
        for name, runs in found.items()
        if runs
    }


def examples(root: Path, name: str, seed: int, steps: Sequence[int]) -> str:
    """The best and the worst completion by the reward of one group, at some steps."""
    runs = runs_of(root, name, [seed])
    lines = [f"**{conditions.title(name)}**, base {seed}", ""]
    lines += ["| step | problem | highest reward | | lowest reward | |", "|---|---|---|---|---|---|"]
    for step, rows in completions(runs[seed], steps).items() if runs else []:
        prompt = rows[0]["prompt"]
        (key,) = rows[0]["rewards"]
        group = [r for r in rows if r["prompt"] == prompt and r["rewards"][key] is not None]
        cells = [str(step), f"`{prompt}`"]
        for r in (max(group, key=lambda r: r["rewards"][key]), min(group, key=lambda r: r["rewards"][key])):
            cells += [f"`{r['completion']}`", f"{r['rewards'][key]:.2f}{' right' if r['correct'] else ''}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Print every table, draw every picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs-study"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[5, 6, 7, 8, 9])
    parser.add_argument("--second-seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--out", type=Path, default=Path("docs"))
    options = parser.parse_args()
    root, seeds = options.runs, options.seeds
    main_set, others = list(conditions.GUARD), list(conditions.REWARDS)
    for title, names, chosen in (
        ("Rewards", main_set, seeds),
        ("Other rewards and controls", others, seeds),
        ("One setting changed", list(conditions.ABLATIONS), seeds),
        ("Second task", list(conditions.SECOND_TASK), options.second_seeds),
    ):
        print(f"\n## {title}\n\n{rise_and_fall(root, names, chosen)}")
    print("\n## Completions\n")
    for name in ("self_certainty", "token_entropy", "trajectory_entropy_fast", "frozen_self_certainty", "long"):
        print(examples(root, name, seeds[0], (0, 20, 60, 110)), end="\n\n")
    for file, names in (("study-rewards.png", [*main_set, *others]), ("study-settings.png", conditions.ABLATIONS)):
        if curves := accuracy_curves(root, list(names), seeds):
            accuracy_figure(curves).savefig(options.out / file, dpi=110)
    internal = ["self_certainty", "token_entropy", "trajectory_entropy", "trajectory_entropy_fast"]
    shown = [*internal, "frozen_self_certainty", "frozen_token_entropy", "verifiable", "majority_vote", "random"]
    print(f"\n## Behaviour\n\n{behaviour(root, shown, seeds, (0, 10, 20, 60, 119))}")
    if measured := behaviour_curves(root, shown, seeds, [*range(0, 120, 5), 119]):
        behaviour_figure(measured).savefig(options.out / "study-behaviour.png", dpi=110)


if __name__ == "__main__":
    main()
