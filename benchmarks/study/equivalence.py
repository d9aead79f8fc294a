"""How alike the three internal rewards are, at the start and at the end of the self-certainty runs.

    python benchmarks/study/equivalence.py --runs runs-study

``rlif diagnose`` on 64 problems x 8 completions of each base, and of the last checkpoint of each run; mean, smallest
and largest over the bases.
"""

import argparse
import contextlib
import io
import json
from pathlib import Path
from typing import Any

from rlif_lightning.main import main as rlif

INTERNAL = ("self_certainty", "token_entropy", "trajectory_entropy")
PAIRS = [(a, b) for i, a in enumerate(INTERNAL) for b in INTERNAL[i + 1 :]]
PAIRS += [(a, b) for b in ("verifiable", "random") for a in INTERNAL]


def diagnosis(root: Path, seed: int, run: Path | None) -> dict[str, Any]:
    """Of a base, or of the end of a run; made once."""
    output = root / "diagnoses" / ("start" if run is None else "end") / str(seed)
    if not (output / "diagnosis.json").exists():
        arguments = ["diagnose", "--config", "quickstart", "--model.name", f"toy:{seed}", "--output", str(output)]
        with contextlib.redirect_stdout(io.StringIO()):
            rlif([*arguments, *(["--ckpt_path", str(run / "checkpoints/last.ckpt")] if run is not None else [])])
    found: dict[str, Any] = json.loads((output / "diagnosis.json").read_text())
    return found


def cell(diagnoses: list[dict[str, Any]], a: str, b: str, gradients: bool) -> str:
    """``mean (smallest to largest)`` of an entry of the matrix."""
    values = []
    for found in diagnoses:
        alike = found["equivalence"]
        matrix = alike["gradients"]["cosines"] if gradients else alike["values"]
        value = matrix[alike["rewards"].index(a)][alike["rewards"].index(b)]
        if value is not None:
            values.append(value)
    if not values:
        return "none"
    return f"{sum(values) / len(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs-study"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[5, 6, 7, 8, 9])
    options = parser.parse_args()
    start = [diagnosis(options.runs, s, None) for s in options.seeds]
    end = [diagnosis(options.runs, s, options.runs / "self_certainty" / str(s)) for s in options.seeds]
    print("| pair | values, start | gradients, start | values, end | gradients, end |")
    print("|---|---|---|---|---|")
    for a, b in PAIRS:
        cells = [cell(found, a, b, gradients) for found in (start, end) for gradients in (False, True)]
        print(f"| {a.replace('_', ' ')}, {b.replace('_', ' ')} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
