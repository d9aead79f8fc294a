"""What of a recipe decides about memory and time."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from rlif_lightning.data.batch_plan import BatchPlan
from rlif_lightning.planning.configs import model_config
from rlif_lightning.planning.dry_run import Network

if TYPE_CHECKING:
    from rlif_lightning.training.collector import Collector
    from rlif_lightning.training.module import RLIFModule


@dataclass(frozen=True)
class Settings:
    """A recipe's settings as a plan sees them; its methods say what follows from them."""

    model: str
    config: Any  # of the model
    precision: str
    batch: BatchPlan
    max_new_tokens: int
    prompt_tokens: int  # of the longest prompt
    optimizer: Callable[[Any], torch.optim.Optimizer]
    lora: dict[str, Any] | None = None
    from_adapter: bool = False  # switching the adapter off does not give its start, so a copy is kept
    quantization: str | None = None
    gradient_checkpointing: bool = False
    attn_implementation: str | None = None
    trust_remote_code: bool = False
    one_pass: bool = True  # loss and gradient of the logits together, where the head is a weight alone
    plain: bool = False  # all logits of a slice at once
    versions: frozenset[str] = frozenset()  # frozen, ema, synced
    statistics: int = 3  # per token, kept of a rollout
    drawn: int = 0  # completions per prompt, votes among them; 0: the group
    rows: int | None = None  # decoded at a time; None: as many as half of the free memory holds
    native: bool = True  # our own sampler, not another engine
    steps: int | None = None  # of the run, where it is not epochs that end it
    shards: int = 1  # processes that share weights, gradients and optimiser states

    @property
    def half(self) -> torch.dtype | None:
        """Of the autocast; None: full precision throughout."""
        if self.precision in ("bf16-mixed", "16-mixed"):
            return torch.bfloat16 if self.precision.startswith("bf16") else torch.float16
        return None

    @property
    def base(self) -> torch.dtype:
        """Of the weights as they are loaded, see :meth:`RLIFModule.configure_model`."""
        frozen = self.lora is not None
        return torch.bfloat16 if frozen and self.precision.startswith("bf16") else torch.float32

    @property
    def network(self) -> Network:
        """For dry runs."""
        return Network(
            self.config,
            self.half,
            self.base,
            self.lora,
            self.gradient_checkpointing,
            self.attn_implementation,
            caches_casts=self.shards == 1,
            trust_remote_code=self.trust_remote_code,
        )

    @property
    def reduces(self) -> bool:
        """Whether processes with a whole model each add their gradients up (DDP)."""
        return self.batch.world_size > 1 and self.shards == 1

    @property
    def micro_rows(self) -> int:
        """Completions of one forward and backward."""
        return self.batch.window_rows // self.batch.slices

    @property
    def rollout_rows(self) -> int:
        """Completions of one rollout on one process."""
        return self.batch.rank_prompts * self.batch.group_size

    @property
    def per_prompt(self) -> int:
        """Completions that are drawn of a prompt."""
        return self.drawn or self.batch.group_size

    def prompts_and_rows(self, rows: int) -> tuple[int, int]:
        """Prompts and completions that the sampler decodes at a time, if it may decode so many rows."""
        prompts = min(self.batch.rank_prompts, max(1, rows // self.per_prompt))
        return prompts, prompts * self.per_prompt

    def but(self, **changes: Any) -> "Settings":
        """With other values; those of the batch by their own names."""
        sizes = {k: changes.pop(k) for k in ("micro_batch_size", "prompts_per_step", "group_size") if k in changes}
        return replace(self, batch=replace(self.batch, **sizes), **changes)


def read_settings(
    module: "RLIFModule",
    rollout: "Collector",
    *,
    precision: str,
    prompt_tokens: int,
    devices: int = 1,
    shards: int = 1,
    steps: int | None = None,
) -> Settings:
    """The settings of a recipe's objects; no weights are loaded.

    Args:
        module: Its settings and the name of its model.
        rollout: Sizes, sampler and rewards.
        precision: Of the Trainer.
        prompt_tokens: Of the longest prompt.
        devices: Processes, over all nodes.
        shards: Processes that share weights, gradients and optimiser states.
        steps: Optimiser steps of the run; None: not known before the data are read.

    Raises:
        UserError: The model's or the adapter's configuration can't be found, or the sizes do not divide.
    """
    from rlif_lightning.functional.losses import is_separable
    from rlif_lightning.models.lora import adapter_settings, off_is_the_start
    from rlif_lightning.sampling import NativeSampler
    from rlif_lightning.training.collector import ANNOTATORS

    needs = frozenset().union(*(r.requires for r in rollout.rewards)) & ANNOTATORS.keys()
    sampler, policy = rollout.sampler, module.policy_settings
    return Settings(
        model=policy.name,
        config=model_config(policy.name, **policy.source),
        precision=precision,
        batch=replace(rollout.plan, world_size=devices),
        max_new_tokens=rollout.sampling.max_new_tokens,
        prompt_tokens=prompt_tokens,
        optimizer=module.make_optimizer,
        lora=policy.lora if policy.adapter is None else adapter_settings(policy.adapter),
        from_adapter=not off_is_the_start(policy.lora, policy.adapter),
        quantization=policy.quantization,
        gradient_checkpointing=policy.gradient_checkpointing,
        attn_implementation=policy.attn_implementation,
        trust_remote_code=policy.trust_remote_code,
        one_pass=is_separable(module.loss) and not module.entropy_bonus.measured and not module.plain_forward,
        plain=module.plain_forward,
        versions=frozenset({*module.needs, *(ANNOTATORS[a] for a in needs)}),
        statistics=3 + len(rollout.sampling.statistics),
        drawn=rollout.votes or 0,
        rows=getattr(sampler, "rows", None),
        native=isinstance(sampler, NativeSampler),
        steps=steps,
        shards=shards,
    )
