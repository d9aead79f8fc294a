"""The three rewards of RLIF: what the policy says of its own completions, no labels."""

from typing import Literal

from torch import Tensor

from rlif_lightning.functional.rewards import self_certainty, token_entropy, trajectory_entropy
from rlif_lightning.functional.token_stats import TokenStats
from rlif_lightning.rewards.base import Reward
from rlif_lightning.rollout import Rollout


class InternalReward(Reward):
    """A statistic of the policy that sampled the completion ("online"), in nats.

    Args:
        aggregation: ``mean`` or ``sum`` over the completion's tokens.
        weight: Of this reward among several.
    """

    def __init__(self, aggregation: Literal["mean", "sum"] = "mean", weight: float = 1.0) -> None:
        super().__init__(weight)
        self.aggregation: Literal["mean", "sum"] = aggregation

    @staticmethod
    def stats(rollout: Rollout) -> TokenStats:
        """Per-token statistics [N, T] of the sampling policy."""
        assert rollout.samples.stats is not None
        return rollout.samples.stats


class SelfCertainty(InternalReward):
    """KL(U || p) averaged over tokens: how far each next-token distribution is from uniform.

    arXiv 2505.19590, equation 2. Not negative and unbounded above.
    """

    def __call__(self, rollout: Rollout) -> Tensor:
        """Rewards [N]."""
        return self_certainty(self.stats(rollout).self_certainty, rollout.samples.completion_mask, self.aggregation)


class TokenEntropy(InternalReward):
    """Minus the entropy of the next-token distributions: at most 0. arXiv 2506.17219."""

    def __call__(self, rollout: Rollout) -> Tensor:
        """Rewards [N]."""
        return token_entropy(self.stats(rollout).entropy, rollout.samples.completion_mask, self.aggregation)


class TrajectoryEntropy(InternalReward):
    """Log-probability of the completion: at most 0. arXiv 2506.17219.

    On policy its expected sum is minus the entropy over whole completions.
    """

    def __call__(self, rollout: Rollout) -> Tensor:
        """Rewards [N]."""
        return trajectory_entropy(self.stats(rollout).logprob, rollout.samples.completion_mask, self.aggregation)
