"""The same work by TRL or vLLM and by us, step by step in turn on one device; wall seconds."""

import statistics

from benchmarks.alternate import alternate
from benchmarks.bar import OURS, TRL, need
from benchmarks.gpu.day import Day
from benchmarks.gpu.rows import Row
from benchmarks.result import spread

REPEATS = 3


def trl(day: Day, lora: bool) -> list[Row]:
    """A whole step in bf16-mixed with KL term; full: and self-certainty, for which TRL takes another forward."""
    need("trl")
    reward = "no_forward" if lora else "self_certainty"
    work = day.work("0.5B", lora=lora, reward=reward, micro_batch=4 if day.tiny else 16)
    steps = alternate({"TRL": TRL, "ours": OURS}, work, 1, 1 if day.tiny else REPEATS, day.logs)
    title = f"0.5B, {'LoRA, a reward without a forward' if lora else 'full, self-certainty'}, KL: a step"
    speeds = {name: [s["tokens"] / s["wall"] for s in done] for name, done in steps.items()}
    rows = [Row(title, _compared(speeds, "tokens/s"))]
    if day.device == "cuda":
        peaks = {name: [s["gpu_peak_mb"] for s in done] for name, done in steps.items()}
        rows.append(Row(f"{title}, peak memory", _compared(peaks, "MiB")))
    return rows


def vllm(day: Day) -> list[Row]:
    """The rollout alone in bfloat16, log-probabilities included; vLLM as it starts by default."""
    need("vllm")
    sides = {"vLLM": "benchmarks.vllm_side", "ours": "benchmarks.rollout_side"}
    steps = alternate(sides, day.work("0.5B"), 1, REPEATS, day.logs)
    speeds = {name: [s["tokens"] / s["wall"] for s in done] for name, done in steps.items()}
    return [Row("0.5B: a rollout", _compared(speeds, "tokens/s"))]


def _compared(sides: dict[str, list[float]], unit: str) -> str:
    (other, theirs), (_, ours) = sides.items()
    ratio = statistics.median(ours) / statistics.median(theirs)
    return f"{other} {spread(theirs)}, ours {spread(ours)} {unit}; ours / {other} {ratio:.2f}"
