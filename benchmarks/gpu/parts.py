"""What the day consists of: parts of a few minutes, and the checks of each."""

from collections.abc import Callable
from functools import partial

from benchmarks.gpu import out_of_memory, sampler, sides, sizes, training
from benchmarks.gpu.day import HALF, KINDS, Day
from benchmarks.gpu.rows import Row

Check = Callable[[Day], list[Row]]
PRECISIONS = ("32-true", *HALF)
SIZES = ("0.5B", "1.5B", "3B", "7B")


def parts(tiny: bool) -> dict[str, dict[str, Check]]:
    """Part -> name -> check; a tiny day has one size of model."""
    chosen = SIZES[:1] if tiny else SIZES
    first: dict[str, Check] = {
        f"first step, {kind}, {precision}": partial(training.first_step, kind=kind, precision=precision)
        for kind in KINDS
        for precision in PRECISIONS
    }
    others: dict[str, Check] = {
        "gradient checkpointing": training.checkpointing,
        "paged optimiser": training.resume,
        "deterministic": training.deterministic,
        "memory check": training.check_of_memory,
        **{f"out of memory, {c}": partial(out_of_memory.message, check=c) for c in out_of_memory.TOLD},
    }
    return {
        "sampler": {p: partial(sampler.against_plain, precision=p) for p in PRECISIONS},
        "first-step": first,
        "training": others,
        "decode": {size: partial(sizes.decoding, size=size) for size in chosen},
        **{
            f"train-{size}": {kind: partial(sizes.training, size=size, kind=kind) for kind in KINDS}
            for size in chosen
        },
        "trl": {kind: partial(sides.trl, lora=kind == "LoRA") for kind in ("full", "LoRA")},
        "vllm": {"rollout": sides.vllm},
    }
