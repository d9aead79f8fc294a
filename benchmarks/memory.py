"""Planned and measured memory of a step, by phase: ``rlif plan`` against torch's own allocator on a CPU.

    python -m benchmarks.memory

Random Qwen2 models of more than 100 M parameters go through two optimiser steps of the real Trainer. Measured is
what torch.profiler says that the CPU's allocator gave and took back, above what was there when training began.
"""

import argparse
import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch.profiler import ProfilerActivity, profile, record_function

from benchmarks import result, shapes
from benchmarks.shapes import LORA
from rlif_lightning import PromptDataModule, RLIFModule, Source
from rlif_lightning.callbacks import RolloutCallback
from rlif_lightning.callbacks.plan_settings import plan_settings
from rlif_lightning.planning.memory import PHASES, memory
from rlif_lightning.rewards import SelfCertainty

BEGIN, END = "<!-- memory -->", "<!-- /memory -->"
MARK = "phase: "
TALL = {"vocab_size": 8192, "hidden_size": 1024, "num_hidden_layers": 9, "intermediate_size": 3072}
WIDE = {"vocab_size": 151936, "hidden_size": 512, "num_hidden_layers": 9, "intermediate_size": 2048}


@dataclass(frozen=True)
class Case:
    """A model, how it is trained, and the batch."""

    name: str
    sizes: dict[str, int]
    model: dict[str, Any] = field(default_factory=dict)
    precision: str = "32-true"
    prompt: int = 32
    tokens: int = 48
    prompts: int = 2
    group: int = 4
    micro: int = 4


CASES = (
    Case("small vocabulary, full", TALL, {"kl_coefficient": 0.01}),
    Case("small vocabulary, full, checkpointing", TALL, {"gradient_checkpointing": True}),
    Case("small vocabulary, LoRA", TALL, {"lora": LORA, "kl_coefficient": 0.01}),
    Case("small vocabulary, LoRA, checkpointing", TALL, {"lora": LORA, "gradient_checkpointing": True}),
    Case("large vocabulary, full", WIDE, {"kl_coefficient": 0.01}),
    Case("large vocabulary, LoRA, checkpointing", WIDE, {"lora": LORA, "gradient_checkpointing": True}),
    Case("large vocabulary, gspo (two passes), LoRA", WIDE, {"lora": LORA, "loss": "gspo"}),
    Case(
        "long, full, checkpointing", TALL, {"gradient_checkpointing": True}, tokens=256, prompts=2, group=2, micro=2
    ),
    Case("long, LoRA", TALL, {"lora": LORA}, tokens=256, prompts=2, group=2, micro=2),
    Case("bf16-mixed, full", WIDE, {"kl_coefficient": 0.01}, "bf16-mixed", tokens=32),
    Case("bf16-mixed, LoRA", TALL, {"lora": LORA}, "bf16-mixed", tokens=32),
)


class Phases(pl.Callback):
    """Marks in the profile where a phase begins; wherever it stands among the callbacks."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Here is what measured memory is above of."""
        collector, step = pl_module.collector, pl_module.training_step
        with_references, sample = collector.with_references, collector.sampler.sample

        def referred(*args: Any) -> Any:
            mark("reference")
            done = with_references(*args)
            mark("between")
            return done

        def sampled(*args: Any) -> Any:
            mark("rollout")
            return sample(*args)

        def updated(*args: Any) -> Any:
            mark("update")
            return step(*args)

        collector.sampler.sample, collector.with_references = sampled, referred
        pl_module.training_step = updated
        mark("start")

    def on_before_optimizer_step(self, *_: Any) -> None:
        """The gradient is whole."""
        mark("optimiser step")

    def on_train_batch_end(self, *_: Any) -> None:
        """Gradients of the step just taken are still there."""
        mark("between")


def mark(phase: str) -> None:
    """Leave a name in the profile."""
    with record_function(MARK + phase):
        pass


def measured(case: Case, folder: str) -> tuple[dict[str, int], dict[str, int], int]:
    """Peak bytes of each phase above the start as measured and as planned; parameters of the model."""
    pl.seed_everything(0, verbose=False)
    module = RLIFModule(folder, optimizer=partial(torch.optim.AdamW, lr=1e-6), **case.model)
    rollout = RolloutCallback(
        prompts_per_step=case.prompts,
        group_size=case.group,
        micro_batch_size=case.micro,
        max_new_tokens=case.tokens,
        rewards=[SelfCertainty()],
    )
    trainer = pl.Trainer(
        accelerator="cpu", max_steps=2, gradient_clip_val=1.0, precision=case.precision, logger=False,  # type: ignore[arg-type]
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
        callbacks=[rollout, Phases()],
    )  # fmt: skip
    data = PromptDataModule(Source(f"{folder}/prompts.jsonl", prompt="question", answer=None), template="{prompt}")
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        trainer.fit(module, data)
    found = peaks(recorded)
    settings = plan_settings(module, rollout.collector, precision=case.precision, prompt_tokens=case.prompt)
    plan = memory(settings, device="cpu")
    loaded = ("weights", "adapter", "reference")
    planned = {
        p: sum(v for k, v in parts.items() if k not in loaded) for p, parts in plan.phases.items() if p in found
    }
    return {p: found[p] for p in planned}, planned, plan.weights.parameters


def peaks(recorded: profile) -> dict[str, int]:
    """Of each phase: the most bytes above those at the mark ``start``."""
    events = recorded.profiler.kineto_results.events()  # type: ignore[union-attr]
    chosen = [e for e in events if e.name() == "[memory]" or e.name().startswith(MARK)]
    now, start, phase = 0, 0, ""
    most: dict[str, int] = {}
    for event in sorted(chosen, key=lambda e: e.start_ns()):
        if event.name() == "[memory]":
            now += event.nbytes()
        else:
            phase = event.name().removeprefix(MARK)
            if phase == "start":
                start, phase = now, "between"
        if phase:
            most[phase] = max(most.get(phase, 0), now - start)
    return {p: most[p] for p in PHASES if p in most}


def table(rows: Sequence[tuple[Case, int, dict[str, int], dict[str, int]]]) -> str:
    """A line per case: planned / measured MB of each phase, and the error at the peak."""
    phases = [p for p in PHASES if p != "load"]
    lines = [
        "| model and training | parameters | " + " | ".join(phases) + " | peak |",
        "|---" * (3 + len(phases)) + "|",
    ]
    for case, parameters, found, planned in rows:
        cells = [f"{planned[p] / 1e6:,.0f} / {found[p] / 1e6:,.0f}" if p in found else "" for p in phases]
        most, plan = max(found.values()), max(planned.values())
        precision = "" if case.precision == "32-true" or case.precision in case.name else f", {case.precision}"
        lines.append(
            f"| {case.name}{precision} | {parameters / 1e6:.0f} M | {' | '.join(cells)} | {plan / most - 1:+.0%} |"
        )
    return "\n".join(lines) + "\n"


def run(cases: Sequence[Case]) -> list[tuple[Case, int, dict[str, int], dict[str, int]]]:
    """Measure one case after another."""
    rows = []
    for case in cases:
        with tempfile.TemporaryDirectory() as folder:
            shapes.save(Path(folder), "A", case.prompt, **case.sizes)
            found, planned, parameters = measured(case, folder)
        rows.append((case, parameters, found, planned))
        print(table(rows[-1:]).splitlines()[-1], flush=True)
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", type=int, default=list(range(len(CASES))), help="numbers, from 0")
    parser.add_argument("--out", type=Path, help="a JSON file with the numbers in bytes")
    parser.add_argument("--docs", type=Path, help=f"document with {BEGIN} and {END} to put the table in")
    options = parser.parse_args(arguments)
    rows = run([CASES[i] for i in options.cases])
    text = table(rows)
    if options.out is not None:
        options.out.write_text(
            json.dumps([{"case": c.name, "measured": f, "planned": p} for c, _, f, p in rows]) + "\n"
        )
    if options.docs is not None:
        result.fill(options.docs, text, BEGIN, END)


if __name__ == "__main__":
    main()
