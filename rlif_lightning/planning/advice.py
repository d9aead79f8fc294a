"""What a plan fits on, and which setting to change where it does not."""

from functools import partial
from typing import Any, NamedTuple

import torch

from rlif_lightning.planning.devices import SIZES
from rlif_lightning.planning.memory import GIB, Memory, memory, usable
from rlif_lightning.planning.settings import Settings
from rlif_lightning.planning.weights import state_bytes

LORA = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"}
LEAST = 0.02 * GIB  # savings below that are not worth a line


class Knob(NamedTuple):
    """A setting that could be changed."""

    words: str  # for the command line
    price: str  # what it costs
    change: dict[str, Any]  # for Settings.but

    @property
    def name(self) -> str:
        """The setting without its value."""
        return self.words.split()[0]


class Advice(NamedTuple):
    """A knob and the peak that it leads to, bytes."""

    knob: Knob
    peak: int


def knobs(settings: Settings) -> list[list[Knob]]:
    """What could be changed: what costs time alone, what changes how weights are trained, what cuts completions."""
    time, training, shorter = [], [], []
    if not settings.gradient_checkpointing:
        change: dict[str, Any] = {"gradient_checkpointing": True}
        time.append(Knob("--model.gradient_checkpointing true", "a third more time in updates", change))
    smaller = _half(settings.micro_rows, settings.batch.window_rows)
    if smaller:
        words = f"--rollout.micro_batch_size {smaller}"
        time.append(Knob(words, "more and smaller passes", {"micro_batch_size": smaller}))
    if settings.native and settings.rows is not None and settings.rows > settings.per_prompt:
        fewer = max(settings.per_prompt, settings.rows // 2)
        time.append(Knob(f"--rollout.sampler.rows {fewer}", "more waves of sampling", {"rows": fewer}))
    if settings.lora is None:
        words = "--model.lora '{r: 16, lora_alpha: 32, target_modules: all-linear}'"
        training.append(Knob(words, "trains an adapter", {"lora": LORA}))
        if state_bytes(settings.optimizer) > 4:
            words = "--model.optimizer bitsandbytes.optim.PagedAdamW8bit"
            training.append(Knob(words, "optimiser states of 8 bits", {"optimizer": eight_bit}))
    elif settings.quantization is None and settings.half is not None:
        training.append(Knob("--model.quantization nf4", "weights of 4 bits; slower", {"quantization": "nf4"}))
    if settings.max_new_tokens >= 256:
        half = settings.max_new_tokens // 2
        shorter.append(Knob(f"--rollout.max_new_tokens {half}", "cuts long completions", {"max_new_tokens": half}))
    return [time, training, shorter]


def advise(settings: Settings, plan: Memory, available: int | None) -> list[Advice]:
    """Every single knob that lowers the peak, the most effective first."""
    every = [knob for group in knobs(settings) for knob in group]
    found = [Advice(knob, memory(settings.but(**knob.change), available).peak) for knob in every]
    return sorted((a for a in found if plan.peak - a.peak > LEAST), key=lambda a: a.peak)


def make_fit(settings: Settings, available: int) -> tuple[list[Knob], Memory]:
    """Turn knobs until the plan fits, first those that cost time alone.

    Returns:
        The knobs that are needed, or all there are; and the plan with them.
    """
    turned: dict[str, Knob] = {}
    plan = memory(settings, available)
    while plan.peak > available:
        best: tuple[Memory, Knob] | None = None
        for group in knobs(_turned(settings, turned)):
            tried = [(memory(_turned(settings, turned | {k.name: k}), available), k) for k in group]
            best = min(tried, key=lambda pair: pair[0].peak, default=None)
            if best is not None and best[0].peak < plan.peak - LEAST:
                break
            best = None
        if best is None:
            break
        plan = best[0]
        turned[best[1].name] = best[1]
    for name in list(turned):  # a later one may have made it needless
        without = {n: k for n, k in turned.items() if n != name}
        tried_plan = memory(_turned(settings, without), available)
        if tried_plan.peak <= available:
            turned, plan = without, tried_plan
    return list(turned.values()), plan


def fits(settings: Settings) -> dict[int, bool]:
    """Of each size of GPU in GB, whether the plan fits."""
    fixed = memory(settings).peak if settings.rows is not None or not settings.native else None
    return {size: (memory(settings, usable(size)).peak if fixed is None else fixed) <= usable(size) for size in SIZES}


def _turned(settings: Settings, turned: dict[str, Knob]) -> Settings:
    return settings.but(**{key: value for knob in turned.values() for key, value in knob.change.items()})


def _half(rows: int, window: int) -> int | None:
    """The largest divisor of the window that is at most half of the rows."""
    return next((n for n in range(rows // 2, 0, -1) if window % n == 0), None)


class EightBit(torch.optim.SGD):
    """States of the size of bitsandbytes' 8-bit AdamW, which need not be there for a plan."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Make them: two numbers of 8 bits per weight, and a scale of 32 bits for each block of 256."""
        for group in self.param_groups:
            for weight in group["params"]:
                n = weight.numel()
                states = {f"state{i}": torch.zeros(n, dtype=torch.uint8, device="cpu") for i in (1, 2)}
                self.state[weight] = states | {f"absmax{i}": torch.zeros(n // 256, device="cpu") for i in (1, 2)}


eight_bit = partial(EightBit, lr=0.0, foreach=False)
