"""What a sampler is told and what it must offer."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from rlif_lightning.errors import UserError, check_ranges
from rlif_lightning.functional.token_stats import Statistic
from rlif_lightning.models.policy import Policy
from rlif_lightning.models.stop_strings import StopStrings
from rlif_lightning.rollout import Samples

Progress = Callable[[int, int], None]  # (tokens sampled so far, most tokens there can be)
TEMPERATURES = (1e-3, 1e3)
"""Below, logits divided by it overflow or pick one token; above, all tokens are equally likely."""

MOST_TOKENS = 10**7
"""No model reads more; memory for a longest completion is asked for at once."""


@dataclass(frozen=True)
class Sampling:
    """The distribution that completions are drawn from.

    The log-probability of the ratio and the KL is always that of softmax(z / temperature) before any filter.
    """

    max_new_tokens: int  # longest completion
    temperature: float = 1.0  # divides the logits; 0 takes the most likely token (greedy)
    top_k: int = 0  # keep the k most likely tokens; 0 keeps all
    top_p: float = 1.0  # keep the smallest set of tokens whose probability reaches this
    min_p: float = 0.0  # drop tokens less likely than this share of the most likely one
    # of the distribution that entropy, self-certainty and rewards describe; None: temperature, or 1 where that is 0
    statistics_temperature: float | None = None
    # what to take besides log-probability, entropy and self-certainty, by name; see token_stats
    statistics: Mapping[str, Statistic] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuse what no sampler can do."""
        wanted, (low, high) = self.statistics_temperature, TEMPERATURES
        warm = self.temperature == 0 or low <= self.temperature <= high
        check_ranges(
            "",
            ("max_new_tokens", self.max_new_tokens, 1 <= self.max_new_tokens <= MOST_TOKENS, f"1 to {MOST_TOKENS}"),
            ("temperature", self.temperature, warm, f"0 (greedy), or {low} to {high}"),
            ("top_k", self.top_k, self.top_k >= 0, "0 (off) or more"),
            ("top_p", self.top_p, 0 < self.top_p <= 1, "above 0, at most 1 (off)"),
            ("min_p", self.min_p, 0 <= self.min_p < 1, "from 0 (off) to below 1"),
            ("statistics_temperature", wanted, wanted is None or low <= wanted <= high, f"{low} to {high}"),
        )

    def settings(self) -> dict[str, Any]:
        """What files of results say of it: every setting, the statistics by name."""
        return {**vars(self), "statistics": list(self.statistics)}

    @property
    def filtered(self) -> bool:
        """Whether the sampled distribution differs from softmax(z / temperature)."""
        return self.top_k > 0 or self.top_p < 1 or self.min_p > 0


class Sampler(Protocol):
    """Draws completions from a policy."""

    def check(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, device: torch.device | None, processes: int = 1
    ) -> None:
        """Refuse, before the weights are loaded, what could not work.

        Args:
            prompts: Token lists that it will complete.
            sampling: The distribution that it will draw from.
            device: The policy's; None: its weights are shared out over processes.
            processes: How many sample.

        Raises:
            UserError: It could not start, could not get the weights, or could not sample so.
        """

    def update(self, policy: nn.Module, end_ids: Sequence[int], pad_id: int, stop: StopStrings | None = None) -> None:
        """Take the policy's current weights, and what ends its completions; called before each rollout."""

    def sample(
        self,
        prompts: Sequence[Sequence[int]],  # P token lists of any length
        group_size: int,  # G
        seeds: Tensor,  # [N] one per completion, which depends on nobody else's
        sampling: Sampling,
        progress: Progress | None = None,  # told how far the longest open completion is
    ) -> Samples:
        """Draw N = P * G completions, groups next to each other; with statistics where the engine has them."""

    def release(self) -> None:
        """Give back what memory the sampler can until the next update; called after each rollout."""


@contextmanager
def up_to_date(sampler: Sampler, policy: Policy) -> Iterator[nn.Module]:
    """The sampler has the policy's current weights; yields the whole model, without gradients and dropout."""
    with policy.inference() as model:
        sampler.update(model, policy.end_ids, policy.pad_id, policy.stop)
        try:
            yield model
        finally:
            sampler.release()


def diverged() -> UserError:
    """What to say where the policy's logits are not finite."""
    return UserError(
        "The policy's logits are not numbers any more: training has diverged",
        do="go back to an earlier checkpoint with a smaller learning rate, or clip gradients; before the first step, "
        "check the model's weights and trainer.precision",
    )
