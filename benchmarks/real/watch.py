"""What is seen only from inside of a run: the sampler next to a plain forward, and memory by phase."""

import json
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from benchmarks.clock import memory_mb
from benchmarks.memory import Phases
from rlif_lightning.callbacks.plan_settings import plan_settings
from rlif_lightning.planning.memory import memory
from rlif_lightning.rollout import Samples


class SamplerWatch(pl.Callback):
    """Compares the first rollout with plain forwards, and notes resident memory (MiB) as the run goes on.

    Args:
        out: JSON file for both.
    """

    def __init__(self, out: str) -> None:
        self.out, self.found = Path(out), {}
        self.resident: list[tuple[str, float, float]] = []  # when, resident then, the most so far

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Follow the sampler, whose rollouts are drawn in the precision of the run."""
        sampler = pl_module.collector.sampler
        sample = sampler.sample

        def sampled(*args: Any) -> Any:
            drawn = sample(*args)
            self.note("rollout")
            if not self.found:
                gap = plain_gap(sampler.policy, drawn)
                kl = float((gap.exp() - 1 - gap).mean())
                self.found = {"largest_gap": float(gap.abs().max()), "sampler_kl": kl, "tokens": len(gap)}
            return drawn

        sampler.sample = sampled
        self.note("load")

    def note(self, when: str) -> None:
        """Take resident memory down."""
        self.resident.append((when, memory_mb("VmRSS"), memory_mb("VmHWM")))

    def on_before_optimizer_step(self, *_: Any) -> None:
        """The gradient is whole."""
        self.note("update")

    def on_train_batch_end(self, *_: Any) -> None:
        """Of each slice; behind the last one the step has been taken."""
        self.note("slice")

    def on_train_end(self, *_: Any) -> None:
        """Write."""
        self.out.write_text(json.dumps(self.found | {"resident": self.resident}))


@torch.no_grad()
def plain_gap(policy: nn.Module, drawn: Samples) -> Tensor:
    """Log-probabilities (nats) by unpadded, uncached forwards, minus the sampler's.

    Returns:
        One per sampled token [M].
    """
    assert drawn.logprob is not None
    gap = []
    for row in range(len(drawn.lengths)):
        prompt = drawn.prompt_ids[row][drawn.prompt_mask[row]]
        completion = drawn.completion_ids[row][drawn.completion_mask[row]]
        logits = policy(input_ids=torch.cat([prompt, completion])[None], use_cache=False).logits[0]
        logp = logits[len(prompt) - 1 : -1].float().log_softmax(-1)
        plain = logp.gather(-1, completion[:, None])[:, 0]
        gap.append(plain - drawn.logprob[row][drawn.completion_mask[row]])
    return torch.cat(gap)


class MemoryWatch(Phases):
    """Marks phases in the profile around it, and plans the run for the prompts that it has.

    Args:
        out: JSON file for the plan's phases and for what was held when training began, in bytes.
    """

    def __init__(self, out: str) -> None:
        self.out, self.held = Path(out), 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Count what is held, then mark the start."""
        states = (t for o in trainer.optimizers for s in o.state.values() for t in s.values() if torch.is_tensor(t))
        self.held = held([*pl_module.parameters(), *states])
        super().on_train_start(trainer, pl_module)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Plan and write."""
        longest = max(len(p.ids) for p in trainer.datamodule.prompts["train"])
        settings = plan_settings(pl_module, pl_module.collector, str(trainer.precision), longest)
        plan = memory(settings, device="cpu")
        said = {"planned": plan.phases, "parameters": plan.weights.parameters, "held": self.held}
        self.out.write_text(json.dumps(said))


def held(tensors: list[Tensor]) -> int:
    """Bytes of tensors, each storage once; of 4-bit weights the scales too."""
    for state in [t.quant_state for t in tensors if getattr(t, "quant_state", None) is not None]:
        tensors = [*tensors, *(t for t in state.as_dict(packed=True).values() if torch.is_tensor(t))]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())
