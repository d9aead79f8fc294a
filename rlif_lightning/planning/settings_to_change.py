"""Which settings to change so that a recipe takes less memory, and what each would leave."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from rlif_lightning.planning.memory import GIB, Memory, memory
from rlif_lightning.planning.settings import Settings

LORA = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"}
EIGHT_BIT = 2 + 2 * 4 / 256
"""Bytes of optimiser state per number: two of 8 bits, each with a scale of 32 bits per block of 256."""
LEAST = 0.02 * GIB  # savings below that are not worth a line


class Change(NamedTuple):
    """A setting to change, and what comes of it."""

    words: str  # for the command line
    price: str  # what it costs
    peak: int  # bytes


def settings_to_change(settings: Settings, plan: Memory, available: int | None) -> list[Change]:
    """Every single setting whose change lowers the peak of the plan, the most effective first."""
    found = [
        Change(f"--{words}", price, memory(settings.changed(**values), available).peak)
        for words, price, values in _possible(settings)
    ]
    return sorted((c for c in found if plan.peak - c.peak > LEAST), key=lambda c: c.peak)


def _possible(s: Settings) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Words, price and values of each change: to what costs time alone, to training, to completions."""
    if not s.gradient_checkpointing:
        price = "a third more time in updates"
        yield "model.gradient_checkpointing true", price, {"gradient_checkpointing": True}
    smaller = next((n for n in range(s.micro_rows // 2, 0, -1) if s.batch.window_rows % n == 0), None)
    if smaller:
        yield f"rollout.micro_batch_size {smaller}", "more and smaller passes", {"micro_batch_size": smaller}
    if s.native and s.rows is not None and s.rows > s.per_prompt:
        fewer = max(s.per_prompt, s.rows // 2)
        yield f"rollout.sampler.rows {fewer}", "more batches of sampling", {"rows": fewer}
    if s.lora is None:
        words = "model.lora '{r: 16, lora_alpha: 32, target_modules: all-linear}'"
        yield words, "trains an adapter", {"lora": LORA, "from_adapter": False}
        if s.state_bytes > 4:
            values = {"state_bytes": EIGHT_BIT, "steps_at_once": False}
            yield "model.optimizer bitsandbytes.optim.PagedAdamW8bit", "optimiser states of 8 bits", values
    elif s.quantization is None and s.half is not None:
        yield "model.quantization nf4", "weights of 4 bits; slower", {"quantization": "nf4"}
    if s.max_new_tokens >= 256:
        half = s.max_new_tokens // 2
        yield f"rollout.max_new_tokens {half}", "cuts long completions", {"max_new_tokens": half}


def what_to_do(changes: Sequence[Change], available: int | None) -> str | None:
    """Words for an error: single changes that are enough, or the best ones to combine; None: there are none."""
    if not changes:
        return None
    enough = [c for c in changes if available is None or c.peak <= available]
    words = "; ".join(f"{c.words} (peak {c.peak / GIB:.1f} GiB)" for c in (enough or changes)[:3])
    return f"set one of {words}" if enough else f"set several of {words}, or take a smaller model"
