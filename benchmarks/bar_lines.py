"""What is asked of us: the rows of the bar, without their numbers."""

from benchmarks.result import Row

ROLLOUT = "rollout, A, T=256, 32 rows, fp32"
PEAK = "peak memory, B, T=96, micro-batch 8"
REAL = "real model, LoRA, at most 64 tokens, KL 0.005"
A, B = "A, T=192, KL 0.04, self-certainty", "B, T=96, KL 0.04, self-certainty"


def trl_row(name: str, title: str, required: float | None, goal: float | None, unit: str = "CPU s per step") -> Row:
    """A row whose other side is TRL."""
    return Row(name, title, unit, "TRL / ours", required, goal)


LINES: dict[str, tuple[Row, ...]] = {
    "real": (
        trl_row("real", f"{REAL}, float32", 1.9, 2.5, "CPU ms per token"),
        trl_row("real_memory", f"{REAL}, float32, peak memory", 1.8, 2.5, "MB"),
    ),
    "real_bf16": (
        trl_row("real_bf16", f"{REAL}, bfloat16", 2.3, 3.0, "CPU ms per token"),
        trl_row("real_bf16_memory", f"{REAL}, bfloat16, peak memory", 1.8, 2.5, "MB"),
    ),
    "step_a": (trl_row("step_a", A, 1.4, 2.0),),
    "step_a_bf16": (trl_row("step_a_bf16", f"{A}, bfloat16", None, None),),
    "step_a_plain": (trl_row("step_a_plain", "A, T=192, no KL, text reward", 1.3, 1.8),),
    "step_b": (trl_row("step_b", B, 3.0, 4.0),),
    "step_b_bf16": (trl_row("step_b_bf16", f"{B}, bfloat16", None, None),),
    "ragged": (
        Row("ragged", "ragged rollout, A, mean 64 of at most 256", "CPU ms per token", "generate / ours", 2.5, 3.5),
    ),
    "memory": (
        trl_row("memory", f"{PEAK}, total", 1.6, 2.2, "MB"),
        trl_row("memory_above", f"{PEAK}, above start", 2.1, 4.0, "MB"),
    ),
    "vllm": (Row("vllm", f"{ROLLOUT}, vLLM compiled", "tokens per CPU s", "ours / vLLM", 0.8, 1.0),),
    "vllm_eager": (Row("vllm_eager", f"{ROLLOUT}, vLLM eager", "tokens per CPU s", "ours / vLLM", 0.8, 1.0),),
    "overhead": (Row("overhead", "A, T=192, under Lightning", "CPU s per step", "ours / bare loop", 1.1, 1.05),),
}
"""What is asked of us, in the order of the table."""
