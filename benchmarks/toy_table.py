"""Rise and fall on the toy: every reward on several base models and seeds, as the table of docs/toy.md.

    python benchmarks/toy_table.py --seeds 5 --out runs-toy

Each run is the shipped quickstart with another reward, base model and seed, in a process of its own. Runs
that are already there are kept, so the table can be interrupted and extended.
"""

import argparse
import os
import statistics
import subprocess
import sys
from pathlib import Path

from rlif_lightning.metrics_csv import read_metrics

REWARDS = {
    "self-certainty": "SelfCertainty",
    "token entropy": "TokenEntropy",
    "trajectory entropy": "TrajectoryEntropy",
    "verifiable": "Verifiable",
    "random": "Random",
}
COLUMN = "val/accuracy_sampled"


def run(reward: str, seed: int, root: Path, threads: int) -> Path:
    """One quickstart on base model ``toy:<seed>`` with run seed ``seed``; returns its metrics.csv."""
    folder = root / f"{reward.lower()}-{seed}"
    metrics = folder / "quickstart" / "1" / "metrics.csv"
    if not (metrics.parent / "summary.txt").exists():
        command = [sys.executable, "-m", "rlif_lightning", "fit", "--config", "quickstart"]
        command += ["--model.name", f"toy:{seed}", "--seed_everything", str(seed), "--runs", str(folder)]
        command += [f"--rollout.rewards=[{{class_path: rlif_lightning.rewards.{reward}}}]"]
        command += ["--trainer.enable_progress_bar", "false"]
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return metrics


def summary(metrics: Path) -> tuple[float, float, int, float]:
    """Start, best, the step of the best, and end of the sampled held-out accuracy."""
    curve = read_metrics(metrics)[COLUMN]
    best = max(curve, key=lambda step: (curve[step], -step))
    return curve[min(curve)], curve[best], best, curve[max(curve)]


def table(results: dict[str, list[tuple[float, float, int, float]]]) -> str:
    """Markdown: every seed, then mean and standard deviation over seeds."""
    lines = ["| reward | start | best (step) per seed | end per seed | mean rise (sd) | mean end (sd) |"]
    lines += ["|---|---|---|---|---|---|"]
    for name, rows in results.items():
        starts = " ".join(f"{r[0]:.2f}" for r in rows)
        bests = " ".join(f"{r[1]:.2f}@{r[2]}" for r in rows)
        ends = " ".join(f"{r[3]:.2f}" for r in rows)
        rise, end = [r[1] - r[0] for r in rows], [r[3] for r in rows]
        means = [f"{statistics.mean(x):.2f} ({statistics.stdev(x) if len(x) > 1 else 0:.2f})" for x in (rise, end)]
        lines.append(f"| {name} | {starts} | {bests} | {ends} | {means[0]} | {means[1]} |")
    return "\n".join(lines)


def main() -> None:
    """Train what is missing and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("runs-toy"))
    parser.add_argument("--rewards", nargs="*", default=list(REWARDS), choices=list(REWARDS))
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    results: dict[str, list[tuple[float, float, int, float]]] = {name: [] for name in options.rewards}
    for seed in range(options.seeds):
        for name in options.rewards:
            results[name].append(summary(run(REWARDS[name], seed, options.out, options.threads)))
            print(f"{name}, seed {seed}: start, best, step, end = {results[name][-1]}", file=sys.stderr, flush=True)
    print(table(results))


if __name__ == "__main__":
    main()
