"""The rewards of RLIF: what the policy says of its own completions, no labels."""

from typing import Literal

from torch import Tensor

from rlif_lightning.functional.rewards import self_certainty, token_entropy, trajectory_entropy
from rlif_lightning.rewards.base import Reward, Weight
from rlif_lightning.rollout import Rollout

Annotator = Literal["policy", "reference", "ema"]


class InternalReward(Reward):
    """A statistic of the next-token distributions along a completion, in nats.

    Args:
        aggregation: ``mean`` or ``sum`` over the completion's tokens.
        annotator: Whose distributions. ``policy``: those that the completion was drawn from ("online").
            ``reference``: the frozen policy of the start ("offline", known to be hacked, arXiv 2505.19590).
            ``ema``: a running mean of the policy's weights.
        weight: Of this reward among several.
    """

    def __init__(
        self,
        aggregation: Literal["mean", "sum"] = "mean",
        annotator: Annotator = "policy",
        weight: Weight = 1.0,
    ) -> None:
        super().__init__(weight)
        self.aggregation: Literal["mean", "sum"] = aggregation
        self.annotator: Annotator = annotator
        self.requires = frozenset({annotator}) - {"policy"}

    @property
    def name(self) -> str:
        """The class's name in snake case, with what differs from the default."""
        parts = [super().name, "" if self.aggregation == "mean" else self.aggregation]
        return "_".join(p for p in [*parts, "" if self.annotator == "policy" else self.annotator] if p)


class SelfCertainty(InternalReward):
    """KL(U || p) averaged over tokens: how far each next-token distribution is from uniform.

    arXiv 2505.19590, equation 2. Not negative and unbounded above.
    """

    def __call__(self, rollout: Rollout) -> Tensor:
        """Rewards [N]."""
        values = rollout.statistics(self.annotator).self_certainty
        return self_certainty(values, rollout.samples.completion_mask, self.aggregation)


class TokenEntropy(InternalReward):
    """Minus the entropy of the next-token distributions: at most 0. arXiv 2506.17219."""

    def __call__(self, rollout: Rollout) -> Tensor:
        """Rewards [N]."""
        values = rollout.statistics(self.annotator).entropy
        return token_entropy(values, rollout.samples.completion_mask, self.aggregation)


class TrajectoryEntropy(InternalReward):
    """Log-probability of the completion: at most 0. arXiv 2506.17219.

    On policy its expected sum is minus the entropy over whole completions.
    """

    def __call__(self, rollout: Rollout) -> Tensor:
        """Rewards [N]."""
        values = rollout.statistics(self.annotator).logprob
        return trajectory_entropy(values, rollout.samples.completion_mask, self.aggregation)
