"""A plan as a short text."""

from collections.abc import Sequence

from rlif_lightning.planning.advice import Advice
from rlif_lightning.planning.devices import BANDWIDTH, MATRIX, MEAN_LENGTH, Gpu
from rlif_lightning.planning.memory import GIB, Memory
from rlif_lightning.planning.settings import Settings

ROWS = (
    "weights", "adapter", "reference", "optimiser", "gradients", "buckets", "activations", "casts", "gathered",
    "KV cache", "rollout", "logits", "head", "temporary",
)  # fmt: skip
MEANING = {
    "buckets": "copies of gradients that DDP sends",
    "casts": "half-precision copies of trained weights",
    "gathered": "weights of other processes",
    "rollout": "tokens and statistics",
    "head": "one tile of logits, gradient of the head",
}


def head_lines(settings: Settings, plan: Memory) -> list[str]:
    """What is planned: model, batch, lengths."""
    w = plan.weights
    kind = "all" if settings.lora is None else f"an adapter of {w.trainable:,}"
    bits = ", 4-bit" if settings.quantization else ""
    text = settings.config.get_text_config()
    lines = [
        f"{settings.model}: {w.parameters:,} parameters{bits}, trained: {kind}",
        settings.batch.describe(),
        f"prompts of at most {settings.prompt_tokens:,} and completions of at most {settings.max_new_tokens:,} "
        f"tokens, vocabulary {text.vocab_size:,}",
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
    phases = list(plan.phases)
    names = [p.removeprefix("optimiser ") for p in phases]
    width = max(len(p) for p in names) + 2
    lines = [f"{f'{name} per device':<16}" + "".join(f"{p:>{width}}" for p in names)]
    for part in ROWS:
        values = [parts.get(part, 0) / unit for parts in plan.phases.values()]
        if max(values) >= 0.005:
            cells = "".join(f"{v:>{width}.2f}" if v >= 0.005 else f"{'':>{width}}" for v in values)
            lines.append(f"{part:<16}{cells}" + (f"   {MEANING[part]}" if part in MEANING else ""))
    lines.append(f"{'peak':<16}" + "".join(f"{sum(p.values()) / unit:>{width}.2f}" for p in plan.phases.values()))
    return "\n".join(line.rstrip() for line in lines)


def fits_line(found: dict[int, bool]) -> str:
    """Which sizes of GPU hold it."""
    held = [f"{size}" for size, good in found.items() if good]
    rest = [f"{size}" for size, good in found.items() if not good]
    if not held:
        return f"fits no GPU of {', '.join(rest)} GB"
    return f"fits GPUs of {', '.join(held)} GB" + (f", not of {', '.join(rest)} GB" if rest else "")


def advice_lines(found: Sequence[Advice], peak: int, most: int = 5) -> list[str]:
    """Each knob alone and the peak that it leads to."""
    if not found:
        return []
    shown = found[:most]
    width = max(len(a.knob.words) for a in shown)
    lines = [f"less memory by one setting (peak now {peak / GIB:.1f} GiB):"]
    return lines + [f"  {a.knob.words:<{width}}  {a.peak / GIB:6.1f} GiB   {a.knob.price}" for a in shown]


def time_lines(times: dict[str, dict[str, float]], steps: int | None) -> list[str]:
    """Seconds of a step by phase on some GPUs, and the time of a run of so many steps."""
    if not times:
        return []
    phases = list(next(iter(times.values())))
    names = [p.removeprefix("optimiser ") for p in phases]
    whole = "" if steps is None else f"{f'{steps} steps':>14}"
    lines = [f"{'s per step':<16}" + "".join(f"{p:>11}" for p in names) + whole]
    for name, found in times.items():
        cells = "".join(f"{found[p]:>11.2g}" if found[p] < 10 else f"{found[p]:>11.0f}" for p in phases)
        whole = "" if steps is None else f"{_duration(sum(found.values()) * steps):>14}"
        lines.append(f"{name:<16}{cells}{whole}")
    lines.append(
        f"Estimated from data sheets, never measured: {MATRIX:.0%} of the matrix rate, {BANDWIDTH:.0%} of the "
        f"bandwidth, mean length {MEAN_LENGTH:.0%} of the longest."
    )
    return lines


def _duration(seconds: float) -> str:
    for size, unit in ((86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"


def gpu_title(gpu: Gpu) -> str:
    """Its name with its memory."""
    return f"{gpu.title} {gpu.gigabytes}GB"
