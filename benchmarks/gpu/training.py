"""Whether training does on a GPU what it does elsewhere, through the real Trainer."""

from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from benchmarks.bar import SkipError
from benchmarks.gpu.day import KINDS, Day, fit
from benchmarks.gpu.rows import Row, judged
from benchmarks.result import short
from rlif_lightning.callbacks import MemoryCheck, memory_check

SIZE = "0.5B"


def first_step(day: Day, kind: str, precision: str) -> list[Row]:
    """The reference is the policy, and tokens are scored by the very pass that they learn from."""
    run = fit(day.work(SIZE, precision=precision, steps=1), KINDS[kind])
    (kl,), (ratio,) = run.columns["train/kl"], run.columns["train/ratio_mean"]
    value = f"KL {kl:g}, ratio {ratio:.9g}, sampler's KL {short(run.columns['rollout/kl'][0])} nats"
    return [judged(f"first step, {kind}, {precision}", value, "KL 0 and ratio 1, exactly", kl == 0 and ratio == 1)]


class Gradient(pl.Callback):
    """Keeps a step's gradient before it is clipped."""

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        """It is whole."""
        self.value = torch.cat([p.grad.flatten().float().cpu() for p in pl_module.parameters() if p.grad is not None])


def checkpointing(day: Day) -> list[Row]:
    """Recomputed activations give the same gradient."""
    kept = [Gradient(), Gradient()]
    for gradient, recompute in zip(kept, (False, True), strict=True):
        work = day.work(SIZE, precision="32-true", steps=1)
        fit(work, {"gradient_checkpointing": recompute}, [gradient])
    plain, recomputed = (gradient.value for gradient in kept)
    error = float((plain - recomputed).norm() / plain.norm())
    return [
        judged(
            "gradient checkpointing, float32",
            f"gradients differ by {short(error)} of their norm",
            "at most 0.0001; prompts are shared without it only, so sums have another order",
            error <= 1e-4 and float(plain.norm()) > 0,
        )
    ]


def paged_run(day: Day, name: str, steps: int, resume: Path | None = None, **trainer: Any) -> torch.Tensor:
    """The weights after so many steps of NF4 with PagedAdamW8bit."""
    import bitsandbytes

    keep = ModelCheckpoint(day.folder / name, save_last=True, every_n_train_steps=1, save_top_k=0)
    optimizer = partial(bitsandbytes.optim.PagedAdamW8bit, lr=1e-3, min_8bit_size=256)
    work = day.work(SIZE, steps=steps)
    return fit(work, KINDS["NF4"], [keep], optimizer, resume, enable_checkpointing=True, **trainer).weights()


def resume(day: Day) -> list[Row]:
    """A run of four steps, the same again, and one of two steps that is continued by two."""
    whole, again, half = (paged_run(day, name, steps) for name, steps in (("whole", 4), ("again", 4), ("half", 2)))
    continued = paged_run(day, "half", 4, day.folder / "half" / "last.ckpt")
    equal, resumed, moved = (float((whole - other).abs().max()) for other in (again, continued, half))
    return [
        Row("two equal runs of 4 steps, NF4", f"largest difference of a weight {equal:g}"),
        judged(
            "PagedAdamW8bit, NF4, resumed after 2 of 4 steps",
            f"largest difference of a weight {resumed:g}; the two steps moved one by {short(moved)}",
            "no more than 3 times what two equal runs differ by",
            resumed <= 3 * equal and moved > 0,
        ),
    ]


def deterministic(day: Day) -> list[Row]:
    """The overlay of that name narrows what differs, and does not promise that nothing does."""
    one, other = (paged_run(day, f"deterministic-{i}", 2, deterministic="warn") for i in range(2))
    value = f"largest difference of a weight {float((one - other).abs().max()):g}"
    return [Row("two equal runs of 2 steps, NF4, trainer.deterministic warn", value)]


def check_of_memory(day: Day) -> list[Row]:
    """The peak that the memory check tells, and that of a run whose every batch is the longest."""
    said: list[str] = []
    with mock.patch.object(memory_check, "rank_zero_info", said.append):
        work = day.work(SIZE, steps=2)
        run = fit(work, KINDS["LoRA"], [MemoryCheck("auto" if day.device == "cuda" else "try")])
    if day.device == "cpu":
        raise SkipError("the check reads a GPU's counters; it ran")
    told, found = float(said[0].split()[-2]), run.columns["memory/peak"][-1] / 1024
    return [
        judged(
            "memory check before the first step, LoRA",
            f"told {told:.1f} GiB, the run took {found:.1f}",
            "within 20 %",
            abs(told / found - 1) <= 0.2,
        )
    ]
