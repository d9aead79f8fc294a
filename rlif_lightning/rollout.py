"""What a sampler returns, and a rollout: samples with their rewards and advantages."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from rlif_lightning.functional.token_stats import TokenStats


def pad_left(prompts: Sequence[Sequence[int]], pad_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids and bool mask [P, L], padded on the left."""
    width = max(map(len, prompts))
    ids = torch.tensor([[pad_id] * (width - len(p)) + list(p) for p in prompts], device=device)
    mask = torch.tensor([[False] * (width - len(p)) + [True] * len(p) for p in prompts], device=device)
    return ids, mask


def left_trim(mask: Tensor) -> int:
    """Columns that are padding in every row of a left-padded mask [N, L]."""
    return int(mask.shape[1] - mask.sum(1).max())


@dataclass(frozen=True)
class Samples:
    """Completions of a sampler, rows of a group next to each other."""

    prompt_ids: Tensor  # [N, L] padded on the left
    prompt_mask: Tensor  # [N, L] bool
    completion_ids: Tensor  # [N, T] padded on the right
    completion_mask: Tensor  # [N, T] bool, up to and including the token that ends it
    ended: Tensor  # [N] bool: closed by an end token or a stop string, not cut off
    logprob: Tensor | None = None  # [N, T] log softmax(z / tau) of the token, unfiltered
    stats: TokenStats | None = None  # [N, T] each, at the statistics temperature
    kept_mass: Tensor | None = None  # [N, T] probability that top-p, top-k and min-p left to choose from
    engine_logprob: Tensor | None = None  # [N, T] as logprob, by the engine that drew it, if another program

    @property
    def lengths(self) -> Tensor:
        """[N] completion tokens."""
        return self.completion_mask.sum(1)

    def texts(self, decode: Callable[[list[list[int]]], list[str]]) -> list[str]:
        """[N] completions as text, padding left out."""
        rows = zip(self.completion_ids.tolist(), self.lengths.tolist(), strict=True)
        return decode([ids[:n] for ids, n in rows])

    def rows(self, index: Tensor) -> "Samples":
        """Some rows, trimmed to their longest prompt and completion."""
        index = index.to(self.completion_ids.device)
        start, width = left_trim(self.prompt_mask[index]), int(self.lengths[index].max())
        return Samples(
            prompt_ids=self.prompt_ids[index, start:],
            prompt_mask=self.prompt_mask[index, start:],
            completion_ids=self.completion_ids[index, :width],
            completion_mask=self.completion_mask[index, :width],
            ended=self.ended[index],
            stats=None if self.stats is None else self.stats.map(lambda x: x[index, :width]),
            **_cut(self, ("logprob", "kept_mass", "engine_logprob"), index, width),
        )


@dataclass(frozen=True)
class Rollout:
    """Samples of one rank with all that rewards may ask for, then their rewards and advantages."""

    samples: Samples
    group_size: int
    temperature: float
    seeds: Tensor  # [N] int64, one per completion
    texts: list[str] = field(default_factory=list)  # [N] completions as text
    answers: list[str | None] = field(default_factory=list)  # [N] normalised answers, None: none found
    correct: Tensor | None = None  # [N] float 0/1, None without labels
    votes: list[list[int | None]] = field(default_factory=list)  # [P][>= G] number of each answer's class of
    # equivalent answers within its prompt, None: no answer; the first G are the group, more may vote
    answer_mask: Tensor | None = None  # [N, T] bool: tokens that carry a character of the answer; where asked for
    annotations: dict[str, TokenStats] = field(default_factory=dict)  # by whom else: "reference", "ema" -> [N, T]
    start_logprob: Tensor | None = None  # [N, T] under the policy as it was at the start
    kl_logprob: Tensor | None = None  # [N, T] under what the KL term refers to
    rewards: dict[str, Tensor] = field(default_factory=dict)  # name -> [N]
    advantages: Tensor | None = None  # [N]
    loss_mask: Tensor | None = None  # [N, T] tokens that enter the loss
    surrogate_mask: Tensor | None = None  # [N, T] those of them that learn from the advantage; None: all
    importance: Tensor | None = None  # [N, T] factor of the surrogate, min(policy / engine, cap); None: 1
    grading_timeouts: int = 0  # answers for which grading had no time left

    def statistics(self, annotator: str = "policy") -> TokenStats:
        """Per-token statistics [N, T] of the completions under the sampling policy, or another annotator."""
        stats = self.samples.stats if annotator == "policy" else self.annotations[annotator]
        assert stats is not None
        return stats

    def slice(self, index: Tensor) -> "Rollout":
        """The rows of one micro-batch, trimmed; texts and rewards stay with the whole rollout."""
        samples = self.samples.rows(index)
        width = samples.completion_ids.shape[1]
        index = index.to(samples.completion_ids.device)
        names = ("answer_mask", "kl_logprob", "loss_mask", "surrogate_mask", "importance")
        return replace(
            self,
            samples=samples,
            seeds=self.seeds[index.to(self.seeds.device)],
            texts=[],
            answers=[],
            votes=[],
            correct=None,
            rewards={},
            annotations={},
            start_logprob=None,
            advantages=None if self.advantages is None else self.advantages[index],
            **_cut(self, names, index, width),
        )


def _cut(whole: Any, names: Sequence[str], index: Tensor, width: int) -> dict[str, Any]:
    """Some rows of the optional fields [N, T], as wide as the longest of them."""
    fields = {name: getattr(whole, name) for name in names}
    return {name: None if x is None else x[index, :width] for name, x in fields.items()}
