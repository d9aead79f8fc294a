"""What validate, test and predict write and print."""

import json
import platform
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rlif_lightning.errors import DiskFailure, escaped
from rlif_lightning.evaluation.answering import Answered
from rlif_lightning.runs.atomic import write_text
from rlif_lightning.runs.folder import run_folder_of


def write_rows(path: Path, results: Sequence[Answered]) -> Path:
    """One JSON object per problem."""
    return _write(path, "".join(json.dumps(asdict(r), ensure_ascii=False) + "\n" for r in results))


def held_out_rows(step: int, results: Sequence[Answered]) -> list[dict[str, Any]]:
    """A row per problem with one answer: the first sample, or the greedy one where nothing is sampled."""
    rows = []
    for result in results:
        attempt = (result.samples + result.greedy)[0]
        row = {"step": step, "problem": result.problem, "completion": attempt.text, "tokens": attempt.tokens}
        if result.gold is not None:
            row |= {"gold": result.gold, "correct": attempt.correct}
        rows.append({name: escaped(value) if isinstance(value, str) else value for name, value in row.items()})
    return rows


def write_outputs(path: Path, results: Sequence[Answered], generator: str) -> Path:
    """One JSON list as AlpacaEval reads it, of results with one completion each.

    Of each problem its instruction, output, generator (who wrote the output) and the fields of ``by``, such as
    dataset.
    """
    rows = [
        {"instruction": r.problem, "output": (r.greedy + r.samples)[0].text, "generator": generator, **r.by}
        for r in results
    ]
    return _write(path, json.dumps(rows, ensure_ascii=False, indent=1) + "\n")


def write_report(path: Path, report: Mapping[str, Any]) -> Path:
    """One JSON object."""
    return _write(path, json.dumps(report, indent=2) + "\n")


def _write(path: Path, text: str) -> Path:
    """Write a file whole or not at all; one that the disk does not take goes into the system's temporary folder."""
    text = escaped(text)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        write_text(path, text)
    except DiskFailure as failure:
        spare = Path(tempfile.mkdtemp(prefix="rlif-")) / path.name
        spare.write_text(text, encoding="utf-8", errors="backslashreplace")
        raise DiskFailure(failure.path, failure.number, f"what was graded is in {spare}") from failure
    return path


def generator_name(model: str, checkpoint: Any) -> str:
    """The model's name, and the run whose checkpoint it took: ``Qwen/Qwen2.5-1.5B + gsm8k/1``."""
    if checkpoint is None:
        return model
    run = run_folder_of(Path(checkpoint))
    return f"{model} + {Path(checkpoint).name if run is None else f'{run.parent.name}/{run.name}'}"


def versions() -> dict[str, str]:
    """Versions of what the numbers depend on."""
    names = ("rlif-lightning", "torch", "lightning", "transformers", "peft", "tokenizers", "math-verify")
    return {"python": platform.python_version(), **{name: version(name) for name in names}}


def summary_lines(summary: Mapping[str, float]) -> list[str]:
    """Lines that show a summary, each accuracy with its interval."""
    shown = {n: f"{v}" if n == "n" else f"{v:.4f}" for n, v in summary.items()}
    ends = {n: f"  [{shown[f'{n}_low']}, {shown[f'{n}_high']}]  95 % interval" for n in shown if f"{n}_low" in shown}
    names = [n for n in shown if not n.endswith(("_low", "_high"))]
    return [f"  {n:<{max(map(len, names))}}  {shown[n]}{ends.get(n, '')}" for n in names]


def by_table(name: str, values: Mapping[str, Mapping[str, float]]) -> list[str]:
    """Lines that show the accuracy for each value of a field, greedy before sampled."""
    width = max(len(name), *map(len, values))
    lines = []
    for value, numbers in values.items():
        kind = "accuracy" if "accuracy" in numbers else "accuracy_sampled"
        line = f"  {value:<{width}}  {numbers['n']:>6g}"
        if kind in numbers:
            line += f"  {numbers[kind]:.4f}  [{numbers[f'{kind}_low']:.4f}, {numbers[f'{kind}_high']:.4f}]"
        lines.append(line)
    return [f"  {name:<{width}}  {'n':>6}  accuracy, 95 % interval", *lines]
