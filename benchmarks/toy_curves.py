"""The picture of docs/toy.md: sampled held-out accuracy of all runs of toy_table.py, thin per seed, thick the mean.

python benchmarks/toy_curves.py --runs runs-toy --out docs/toy.png
"""

import argparse
from pathlib import Path
from statistics import mean

from matplotlib.figure import Figure
from toy_table import COLUMN, REWARDS

from rlif_lightning.metrics_csv import read_metrics

COLOURS = {
    "self-certainty": "tab:red",
    "token entropy": "tab:orange",
    "trajectory entropy": "tab:purple",
    "verifiable": "tab:green",
    "random": "tab:gray",
}


def main() -> None:
    """Draw what is there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs-toy"))
    parser.add_argument("--out", type=Path, default=Path("docs/toy.png"))
    options = parser.parse_args()
    figure = Figure(figsize=(13, 4.6), layout="constrained")
    for axes, (column, title) in zip(
        figure.subplots(1, 2, sharey=True), ((COLUMN, "sampled"), ("val/accuracy", "greedy")), strict=True
    ):
        for name, reward in REWARDS.items():
            files = sorted(options.runs.glob(f"{reward.lower()}-*/quickstart/1/metrics.csv"))
            curves = [read_metrics(file)[column] for file in files]
            for curve in curves:
                axes.plot(list(curve), list(curve.values()), color=COLOURS[name], alpha=0.25, linewidth=1)
            steps = sorted(set.intersection(*(set(c) for c in curves)))
            means = [mean(c[step] for c in curves) for step in steps]
            axes.plot(steps, means, color=COLOURS[name], linewidth=2.5, label=f"{name} (n = {len(curves)})")
        axes.set(title=f"held-out accuracy, {title}", xlabel="optimiser step", ylim=(-0.03, 1.03))
        axes.grid(alpha=0.3)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper center", ncols=len(REWARDS))
    figure.savefig(options.out, dpi=110)


if __name__ == "__main__":
    main()
