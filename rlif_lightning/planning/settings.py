"""What of a recipe decides about memory, as plain numbers and names."""

from dataclasses import dataclass, fields, replace
from typing import Any

import torch

from rlif_lightning.data.batch_plan import BatchPlan
from rlif_lightning.models.precision import frozen_dtype


@dataclass(frozen=True, kw_only=True)
class Network:
    """What decides about a policy's forward besides its batch; compared by value, so that dry runs are remembered."""

    config: Any  # of the model
    precision: str
    lora: dict[str, Any] | None = None
    gradient_checkpointing: bool = False
    trust_remote_code: bool = False
    shards: int = 1  # processes that share weights, gradients and optimiser states

    def __hash__(self) -> int:
        """Of the fields that have a hash."""
        return hash((self.precision, self.gradient_checkpointing, self.shards))

    @property
    def layers(self) -> int:
        """Decoder layers."""
        return int(self.config.get_text_config().num_hidden_layers)

    @property
    def vocabulary(self) -> int:
        """Logits of a token."""
        return int(self.config.get_text_config().vocab_size)

    @property
    def half(self) -> torch.dtype | None:
        """Of the autocast; None: full precision throughout."""
        return {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(self.precision)

    @property
    def made(self) -> int:
        """Bytes of a number as a layer or the head makes it."""
        return 4 if self.half is None else 2

    @property
    def base(self) -> torch.dtype:
        """Of the weights as they are loaded: those that train are in full precision."""
        return torch.float32 if self.lora is None else frozen_dtype(self.precision)

    def autocast(self) -> torch.autocast:
        """The Trainer's precision. Copies of sharded weights are not kept."""
        return torch.autocast("cpu", self.half, enabled=self.half is not None, cache_enabled=self.shards == 1)


@dataclass(frozen=True, eq=False, kw_only=True)
class Settings(Network):
    """A recipe's settings as a plan sees them; its methods say what follows from them."""

    model: str
    batch: BatchPlan
    max_new_tokens: int
    prompt_tokens: int  # of the longest prompt
    state_bytes: float = 8.0  # that the optimiser keeps per trainable number
    steps_at_once: bool = True  # on a GPU the optimiser takes all weights together, with a copy of their size
    from_adapter: bool = False  # switching the adapter off does not give its start, so a copy is kept
    quantization: str | None = None
    fused_loss: bool = True  # loss and gradient of the logits together, where the head is a weight alone
    references: frozenset[str] = frozenset()  # frozen, ema, synced
    statistics: int = 3  # per token, kept of a rollout
    votes: int = 0  # completions per prompt that are sampled for their votes; 0: the group
    rows: int | None = None  # decoded at a time; None: as many as half of the free memory holds
    native: bool = True  # our own sampler, not another engine

    @property
    def network(self) -> Network:
        """For dry runs."""
        return Network(**{f.name: getattr(self, f.name) for f in fields(Network)})

    @property
    def copies(self) -> bool:
        """Whether the frozen reference is a copy of all weights."""
        return self.lora is None and "frozen" in self.references

    @property
    def micro_rows(self) -> int:
        """Completions of one forward and backward."""
        return self.batch.window_rows // self.batch.slices

    @property
    def per_prompt(self) -> int:
        """Completions that are sampled of a prompt."""
        return self.votes or self.batch.group_size

    @property
    def sampled_rows(self) -> int:
        """Completions that a process samples for one rollout."""
        return self.batch.rank_prompts * self.per_prompt

    def changed(self, **changes: Any) -> "Settings":
        """With other values; ``micro_batch_size`` is the batch's."""
        if "micro_batch_size" in changes:
            changes["batch"] = replace(self.batch, micro_batch_size=changes.pop("micro_batch_size"))
        return replace(self, **changes)
