"""The judgement of the collapse guard: docs/guard.md's tables and picture from the runs of runs.py.

    python benchmarks/study/guard.py --runs runs-study --seeds 5 6 7 8 9 --set GUARD --picture docs/guard.png

The rule is run over each run's metrics.csv; the weights that it hands back are evaluated as accuracy.py does.
"""

import argparse
import math
import statistics
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).parent))
import conditions
from accuracy import Evaluator, kept_steps
from figures import guard_figure

from rlif_lightning.guard.rule import AGREEMENT, REFERENCE, SIMILARITY, CollapseRule, default_rule
from rlif_lightning.runs.metrics_csv import read_metrics

FALL, NEAR, BELOW = 0.15, 0.05, 0.02


@dataclass
class Judged:
    """One run: steps, and accuracies between 0 and 1."""

    condition: str
    seed: int
    curve: dict[int, float]  # both halves
    best_step: int  # the best on one half ...
    best: float  # ... and its accuracy on the other
    fired: int | None
    signal: str
    handed_step: int
    handed: float

    @property
    def start(self) -> float:
        """Accuracy before the first step."""
        return self.curve[0]

    @property
    def end(self) -> float:
        """Mean of the last three points."""
        return statistics.mean(list(self.curve.values())[-3:])

    @property
    def collapses(self) -> bool:
        """Whether the end lies below the best by more than FALL."""
        return self.end < self.best - FALL

    @property
    def gap(self) -> float:
        """What is lost against the best."""
        return self.best - self.handed


def replay(run: Path, signals: Sequence[str]) -> CollapseRule:
    """The rule over a run's metrics."""
    curves = read_metrics(run / "metrics.csv")
    rule = default_rule(signals=[s for s in signals if s in curves])
    for step in sorted(curves["rollout/reward"]):
        rule.update(step, {s: curves[s][step] for s in signals if step in curves.get(s, {})})
    return rule


def judge(run: Path, condition: str, seed: int, every: int, signals: Sequence[str]) -> Judged:
    """Evaluate a run's curve and what the rule hands back."""
    rule = replay(run, signals)
    assert rule.best_step is not None
    steps = [s for s in kept_steps(run) if s % every == 0]
    known = Evaluator(run).measure([*steps, rule.best_step])

    def both(step: int) -> float:
        return (known[str(step)]["a"] + known[str(step)]["b"]) / 2

    best = max(steps, key=lambda s: known[str(s)]["a"])
    fired = rule.fired
    return Judged(
        condition, seed, {s: both(s) for s in steps}, best, known[str(best)]["b"],
        None if fired is None else fired.step, "" if fired is None else fired.signal.split("/")[1],
        rule.best_step, both(rule.best_step),
    )  # fmt: skip


def clopper_pearson(k: int, n: int, level: float = 0.95) -> tuple[float, float]:
    """Exact interval of a share, by bisection on the binomial distribution."""

    def tail(p: float, least: int) -> float:
        return sum(math.comb(n, i) * p**i * (1 - p) ** (n - i) for i in range(least, n + 1))

    def solve(least: int, wanted: float) -> float:
        low, high = 0.0, 1.0
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if tail(middle, least) < wanted else (low, middle)
        return low

    alpha = (1 - level) / 2
    return (0.0 if k == 0 else solve(k, alpha)), (1.0 if k == n else solve(k + 1, 1 - alpha))


def share(hits: Iterable[bool]) -> str:
    """``k of n (95 % interval)``."""
    found = list(hits)
    if not found:
        return "none"
    low, high = clopper_pearson(sum(found), len(found))
    return f"{sum(found)} of {len(found)} ({low:.2f} to {high:.2f})"


def table(runs: Sequence[Judged]) -> str:
    """Markdown: a row per condition."""
    lines = [
        "| condition | start | best | handed back | end | fell | fired | steps from best to firing | worst gap |"
    ]
    lines += ["|---|---|---|---|---|---|---|---|---|"]
    for name in dict.fromkeys(r.condition for r in runs):
        rows = [r for r in runs if r.condition == name]
        means = [
            f"{statistics.mean(getattr(r, key) for r in rows):.2f}" for key in ("start", "best", "handed", "end")
        ]
        late = [r.fired - r.best_step for r in rows if r.fired is not None and r.collapses]
        delay = f"{statistics.median(late):.0f} ({min(late)} to {max(late)})" if late else ""
        fell, fired = sum(r.collapses for r in rows), sum(r.fired is not None for r in rows)
        of = len(rows)
        cells = [conditions.title(name), *means, f"{fell} of {of}", f"{fired} of {of}", delay]
        lines.append(f"| {' | '.join([*cells, f'{max(r.gap for r in rows):+.2f}'])} |")
    return "\n".join(lines)


def too_early(run: Judged) -> bool:
    """Whether it fired on a run that was still improving, and what came was worth more."""
    return run.fired is not None and run.fired < run.best_step and run.gap > NEAR


def verdict(runs: Sequence[Judged]) -> str:
    """The goals, each as k of n."""
    judged = [r for r in runs if "random" not in r.condition]
    falling, healthy = [r for r in judged if r.collapses], [r for r in judged if not r.collapses]
    lines = [
        f"- collapsing runs in which it fired: {share(r.fired is not None for r in falling)}",
        f"- collapsing runs, handed back within {NEAR} of the best: {share(r.gap <= NEAR for r in falling)}",
        f"- runs, handed back more than {BELOW} below the start: {share(r.handed < r.start - BELOW for r in judged)}",
        f"- healthy runs in which it fired: {share(r.fired is not None for r in healthy)}",
        f"- fired before the best step, with more than {NEAR} still to come: {share(map(too_early, judged))}",
    ]
    if falling:
        gaps = sorted(r.gap for r in falling)
        lines.append(f"- gap in collapsing runs: mean {statistics.mean(gaps):.3f}, largest {gaps[-1]:.3f}")
    for r in judged:
        if (r.collapses and r.gap > NEAR) or (not r.collapses and r.fired is not None) or r.handed < r.start - BELOW:
            lines.append(
                f"  - {r.condition} {r.seed}: start {r.start:.2f}, best {r.best:.2f}@{r.best_step}, fired {r.fired} "
                f"({r.signal}), handed back {r.handed:.2f}@{r.handed_step}, end {r.end:.2f}"
            )
    return "\n".join(lines)


def main() -> None:
    """Judge what is there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs-study"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[5, 6, 7, 8, 9])
    parser.add_argument("--set", choices=["GUARD", "SECOND_TASK", "REWARDS", "ABLATIONS"], default="GUARD")
    parser.add_argument("--every", type=int, default=5)
    parser.add_argument(
        "--signals", nargs="+", default=[AGREEMENT, REFERENCE], choices=[AGREEMENT, SIMILARITY, REFERENCE]
    )
    parser.add_argument("--picture", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    runs = [
        judge(folder, name, seed, options.every, options.signals)
        for name in getattr(conditions, options.set)
        for seed in options.seeds
        if (folder := options.runs / name / str(seed)).is_dir()
    ]
    print(table(runs), verdict(runs), sep="\n\n")
    if options.picture:
        guard_figure(runs).savefig(options.picture, dpi=110)


if __name__ == "__main__":
    main()
