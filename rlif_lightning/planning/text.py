"""A plan as a short text."""

from collections.abc import Sequence

from rlif_lightning.planning.memory import GIB, Memory
from rlif_lightning.planning.settings import Settings
from rlif_lightning.planning.settings_to_change import Change

PARTS = {
    "weights": "", "adapter": "", "reference": "", "optimiser": "", "gradients": "",
    "buckets": "copies of gradients that DDP sends",
    "activations": "",
    "casts": "half-precision copies of trained weights",
    "gathered": "weights of other processes",
    "KV cache": "",
    "rollout": "tokens and statistics",
    "logits": "",
    "head": "one chunk of logits, gradient of the head",
    "temporary": "",
}  # fmt: skip
"""In the order of the table, with what the name does not say."""


def head_lines(settings: Settings, plan: Memory) -> list[str]:
    """What is planned: model, batch, lengths."""
    w = plan.weights
    kind = "all" if settings.lora is None else f"an adapter of {w.trainable:,}"
    bits = ", 4-bit" if settings.quantization else ""
    lines = [
        f"{settings.model}: {w.parameters:,} parameters{bits}, trained: {kind}",
        settings.batch.describe(),
        f"prompts of at most {settings.prompt_tokens:,} and completions of at most {settings.max_new_tokens:,} "
        f"tokens, vocabulary {settings.vocabulary:,}",
    ]
    if settings.native:
        chosen = "" if settings.rows is not None else " (as many as half of the free memory holds)"
        lines.append(f"{plan.rows:,} completions decoded at a time{chosen}")
    else:
        lines.append("another engine samples: its memory is not counted")
    if settings.shards > 1:
        lines.append(f"weights, gradients and optimiser states are shared by {settings.shards} processes")
    return lines


def memory_table(plan: Memory) -> str:
    """Each part in each phase, in GiB, or MiB for a toy."""
    unit, name = (GIB, "GiB") if plan.peak >= GIB else (2**20, "MiB")
    names = [p.removeprefix("optimiser ") for p in plan.phases]
    width = max(map(len, names)) + 2

    def line(title: str, values: Sequence[float]) -> str:
        return f"{title:<16}" + "".join(f"{v:>{width}.2f}" if v >= 0.005 else " " * width for v in values)

    lines = [f"{f'{name} per device':<16}" + "".join(f"{p:>{width}}" for p in names)]
    for part, meaning in PARTS.items():
        values = [parts.get(part, 0) / unit for parts in plan.phases.values()]
        if max(values) >= 0.005:
            lines.append(f"{line(part, values)}   {meaning}".rstrip())
    return "\n".join([*lines, line("peak", [sum(parts.values()) / unit for parts in plan.phases.values()])])


def fits_line(found: dict[int, bool]) -> str:
    """Which sizes of GPU hold it."""
    held, rest = (", ".join(str(size) for size, good in found.items() if good is wanted) for wanted in (True, False))
    if not held:
        return f"fits no GPU of {rest} GB"
    return f"fits GPUs of {held} GB" + (f", not of {rest} GB" if rest else "")


def change_lines(changes: Sequence[Change], peak: int, most: int = 5) -> list[str]:
    """Each setting to change alone, and the peak that it leads to."""
    shown = changes[:most]
    width = max((len(c.words) for c in shown), default=0)
    lines = [f"  {c.words:<{width}}  {c.peak / GIB:6.1f} GiB   {c.price}" for c in shown]
    return [f"less memory by one setting (peak now {peak / GIB:.1f} GiB):", *lines] if lines else []
