"""Rewards by what the completions of a prompt agree on: their answers, no labels."""

import math
from collections import Counter
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from rlif_lightning.errors import UserError
from rlif_lightning.rewards.base import Reward, Weight
from rlif_lightning.rollout import Rollout


class MajorityVote(Reward):
    """1 for an answer in the largest class of equivalent answers among the prompt's votes, 0 for any other.

    TTRL (arXiv 2504.16084), and the majority-vote baseline (GRPO-PV) of arXiv 2505.19590. No answer never wins
    and gets 0. Of classes of one size the first to occur wins. ``rollout.votes`` lets more completions vote than
    are trained on.

    Args:
        threshold: Smallest share of the votes, missing answers included, that makes a majority. A prompt without a
            majority or without any answer abstains: NaN for its group, which then teaches nothing.
        weight: Weight of this reward among several.

    Raises:
        UserError: The threshold is not from 0 to 1.
    """

    requires = frozenset({"answers"})
    abstains = True

    def __init__(self, threshold: float = 0.0, weight: Weight = 1.0) -> None:
        super().__init__(weight)
        if not 0 <= threshold <= 1:
            raise UserError("The threshold of MajorityVote is not a share", got=threshold, expected="from 0 to 1")
        self.threshold = threshold

    def __call__(self, rollout: Rollout) -> Tensor:
        """Rewards [N]: 0, 1 or NaN."""
        return _per_group(rollout, self._verdicts)

    def _verdicts(self, votes: Sequence[int | None]) -> dict[int | None, float]:
        sizes = Counter(x for x in votes if x is not None)
        winner = max(sizes, key=sizes.__getitem__, default=None)  # the first of equals
        if winner is None or sizes[winner] / len(votes) < self.threshold:
            return dict.fromkeys(votes, math.nan)
        return {x: float(x == winner) for x in votes}


class ClusterFrequency(Reward):
    """Share of the prompt's votes that are equivalent to the completion's answer: in [0, 1], 0 without an answer.

    EMPO (arXiv 2504.05812), with classes of equivalent answers as its clusters. Missing answers count among the
    votes.
    """

    requires = frozenset({"answers"})

    def __call__(self, rollout: Rollout) -> Tensor:
        """Rewards [N]."""
        return _per_group(rollout, _shares)


def _per_group(rollout: Rollout, values: Callable[[Sequence[int | None]], dict[int | None, float]]) -> Tensor:
    """[N] from a value of each class of a prompt's votes; the votes beyond the group have had their say."""
    tables = [(values(votes), votes[: rollout.group_size]) for votes in rollout.votes]
    numbers = [table[x] for table, group in tables for x in group]
    return torch.tensor(numbers, device=rollout.samples.completion_ids.device)


def _shares(votes: Sequence[int | None]) -> dict[int | None, float]:
    return {x: 0.0 if x is None else size / len(votes) for x, size in Counter(votes).items()}
