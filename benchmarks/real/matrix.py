"""Real models x what trains x precision: what ran, cell by cell, and the table of docs/real-models.md.

    python -m benchmarks.real.matrix --models FOLDER ... --out runs-real [--docs docs/real-models.md]
    python -m benchmarks.real.matrix --models FOLDER --cells lora/bf16-mixed --out runs-real

A cell is a process of its own and a file in the output folder; those that are there are not run again. Ends with
code 1 where a cell did not do all that was asked of it.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

from benchmarks import result
from benchmarks.real import PRECISIONS, TOKENS, TRAININGS

BEGIN, END = "<!-- matrix -->", "<!-- /matrix -->"
CELLS = [f"{training}/{precision}" for training, precision in product(TRAININGS, PRECISIONS)]
GIB = 2**30
PLAN = 0.2  # share by which a measured peak may differ from the plan
GAP = {"32-true": 1e-3, "bf16-mixed": 1.0}  # nats: the largest of a token between sampler and plain forward
TIE = 0.25  # nats by which a greedy token may lead before another one that bfloat16 rounds to the same or above
KL = {"32-true": 1e-6, "bf16-mixed": 0.01}  # nats per token: the same as a divergence


def checks(cell: dict[str, Any]) -> dict[str, bool]:
    """What is asked of a cell, and whether it was so."""
    tie = TIE if _dtype(cell) == "bfloat16" else 0.0
    same = [a == b or lead < tie for (a, b), lead in zip(cell["texts"], cell["leads"], strict=True)]
    return {
        "2 steps": cell["steps"] == 2 and cell["grad_norm"] > 0,
        "KL 0, ratio 1": cell["kl"] == 0 and cell["ratio"] == 1,
        "sampler": cell["largest_gap"] <= GAP[cell["precision"]] and cell["sampler_kl"] <= KL[cell["precision"]],
        "plan": abs(error(cell)) <= PLAN,
        "resume": cell["same_weights"] and cell["same_metrics"],
        "export": bool(cell["export"]) and all(same),
    }


def _dtype(cell: dict[str, Any]) -> str:
    return "float32" if any("in float32:" in line for line in cell["export"]) else "bfloat16"


def error(cell: dict[str, Any]) -> float:
    """How far the planned peak lies from the measured one, as a share of that."""
    return max(cell["planned"].values()) / max(cell["measured"].values()) - 1


def row(name: str, cell: dict[str, Any] | None) -> str:
    """A line of the table; a cell that is missing was not run, one with an ``error`` did not come to an end."""
    if cell is None or "error" in cell:
        said = "not run" if cell is None else f"**MISSED**: {cell['error']}"
        return f"| {name} | {said} |" + " |" * 7
    missed = [what for what, passed in checks(cell).items() if not passed]
    same = sum(exported == expected for exported, expected in cell["texts"])
    planned, measured = (max(cell[side].values()) / GIB for side in ("planned", "measured"))
    tie = f" ({max(cell['leads']):.2f} nats)" if same < len(cell["texts"]) else ""
    cells = [
        name,
        "passed" if not missed else f"**MISSED**: {', '.join(missed)}",
        f"{cell['kl']:g}, {cell['ratio']:g}",
        f"{cell['sampler_kl']:.0e} ({cell['largest_gap']:.0e})",
        f"{planned:.2f} / {measured:.2f} ({error(cell):+.0%})",
        f"{max(now for _, now, _ in cell['resident']) / 1024:.2f}, {cell['resident_mb'] / 1024:.2f}",
        "same bits" if cell["same_weights"] and cell["same_metrics"] else "differs",
        f"{_dtype(cell)}, {same} of {len(cell['texts'])}{tie}",
        f"{sum(cell['cpu_seconds'].values()):.0f}",
    ]
    return f"| {' | '.join(cells)} |"


def table(models: Sequence[str], cells: Sequence[str], found: dict[tuple[str, str], dict[str, Any]]) -> str:
    """All cells of some models, and on what they were run."""
    lines = [
        "| cell | verdict | KL, ratio | sampler | plan / measured | resident | resumed | export | CPU s |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [row(f"{m}, {c.replace('/', ', ')}", found.get((m, c))) for m in models for c in cells]
    settings = {result.conditions(cell["setting"]) for cell in found.values() if "setting" in cell}
    return "\n".join([*lines, "", *sorted(settings)]) + "\n"


def measure(model: Path, cell: str, out: Path, tokens: int) -> None:
    """Run a cell in a process of its own; what it says besides goes to a log next to its file."""
    words = [sys.executable, "-m", "benchmarks.real.cell", str(model), *cell.split("/"), "--out", str(out)]
    words += ["--tokens", str(tokens)]
    with out.with_suffix(".log").open("w") as log:
        code = subprocess.run(words, stdout=log, stderr=subprocess.STDOUT).returncode
    if code:
        last = (out.with_suffix(".log").read_text().strip().splitlines() or [""])[-1]
        out.write_text(json.dumps({"error": f"code {code}: {last[:200]}"}) + "\n")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what is missing, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", type=Path, required=True, help="folders of models")
    parser.add_argument("--cells", nargs="+", choices=CELLS, default=CELLS, metavar="CELL", help=" ".join(CELLS))
    parser.add_argument("--out", type=Path, required=True, help="folder for a JSON file and a log of each cell")
    parser.add_argument("--tokens", type=int, default=TOKENS, help=f"of a completion; {TOKENS}")
    parser.add_argument("--docs", type=Path, help=f"document with {BEGIN} and {END} to put the table in")
    parser.add_argument("--table", action="store_true", help="only the table of what has run")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for model, cell in product(options.models, options.cells):
        file = options.out / f"{model.name}-{cell.replace('/', '-')}.json"
        if not file.exists() and not options.table:
            measure(model, cell, file, options.tokens)
        if file.exists():
            found[model.name, cell] = json.loads(file.read_text())
            print(row(f"{model.name}, {cell}", found[model.name, cell]), flush=True)
    if options.docs is not None:
        names = [model.name for model in options.models]
        result.fill(options.docs, table(names, options.cells, found), BEGIN, END)
    if not all("error" not in cell and all(checks(cell).values()) for cell in found.values()):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
