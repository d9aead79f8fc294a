"""The rewards of RLIF: what the policy says of its own completions, no labels."""

from typing import Literal

from torch import Tensor

from rlif_lightning.errors import UserError
from rlif_lightning.functional import aggregation as f
from rlif_lightning.functional.aggregation import Aggregation
from rlif_lightning.functional.token_stats import TokenStats
from rlif_lightning.rewards.base import Reward, Weight
from rlif_lightning.rollout import Rollout

Annotator = Literal["policy", "reference", "ema"]


class InternalReward(Reward):
    """A statistic of the next-token distributions along a completion.

    The distributions are softmax(logits / temperature) with the temperature of the sampler;
    ``rollout.statistics_temperature`` sets another one. top_k, top_p and min_p do not enter.

    Args:
        aggregation: ``mean`` or ``sum`` over the completion's tokens; ``last_k``: mean over its last k tokens;
            ``bottom_q``: mean over the least certain share q of its tokens.
        k: Tokens of ``last_k``.
        q: Share of ``bottom_q``, above 0 and at most 1; rounded up to whole tokens.
        annotator: Whose distributions. ``policy``: those that the completion was drawn from ("online").
            ``reference``: the frozen policy of the start ("offline", known to be hacked, arXiv 2505.19590).
            ``ema``: a running mean of the policy's weights.
        weight: Of this reward among several.

    Raises:
        UserError: k is below 1, or q is not above 0 and at most 1.
    """

    def __init__(
        self,
        aggregation: Aggregation = "mean",
        k: int = 16,
        q: float = 0.2,
        annotator: Annotator = "policy",
        weight: Weight = 1.0,
    ) -> None:
        super().__init__(weight)
        if k < 1 or not 0 < q <= 1:
            raise UserError(
                f"The aggregation of the reward {type(self).__name__} is out of range",
                got=f"k {k}, q {q}",
                expected="k of at least 1 token, and a share q above 0 and at most 1",
            )
        self.aggregation: Aggregation = aggregation
        self.window = (k, q)
        self.annotator: Annotator = annotator
        self.requires = frozenset({annotator}) - {"policy"}

    @property
    def name(self) -> str:
        """The class's name in snake case, with what differs from the default."""
        parts = [super().name, "" if self.aggregation == "mean" else self.aggregation]
        return "_".join(p for p in [*parts, "" if self.annotator == "policy" else self.annotator] if p)

    def stats_and_mask(self, rollout: Rollout) -> tuple[TokenStats, Tensor]:
        """The annotator's statistics and the completions' mask, [N, T] each."""
        return rollout.statistics(self.annotator), rollout.samples.completion_mask


class SelfCertainty(InternalReward):
    """KL(U || p) in nats: how far each next-token distribution is from uniform.

    arXiv 2505.19590, equation 2. Not negative and unbounded above.
    """

    def __call__(self, rollout: Rollout) -> Tensor:
        """Rewards [N]."""
        stats, mask = self.stats_and_mask(rollout)
        return f.self_certainty(stats.self_certainty, mask, self.aggregation, *self.window)


class TokenEntropy(InternalReward):
    """Minus the entropy of the next-token distributions in nats: at most 0. arXiv 2506.17219."""

    def __call__(self, rollout: Rollout) -> Tensor:
        """Rewards [N]."""
        stats, mask = self.stats_and_mask(rollout)
        return f.token_entropy(stats.entropy, mask, self.aggregation, *self.window)


class TrajectoryEntropy(InternalReward):
    """Log-probability of the completion in nats: at most 0. arXiv 2506.17219.

    On policy its expected sum is minus the entropy over whole completions.
    """

    def __call__(self, rollout: Rollout) -> Tensor:
        """Rewards [N]."""
        stats, mask = self.stats_and_mask(rollout)
        return f.trajectory_entropy(stats.logprob, mask, self.aggregation, *self.window)


class ExpectedAgreement(InternalReward):
    """Sum of the squared next-token probabilities, the chance that two draws of a token agree: in (0, 1], not nats.

    After RLSC (arXiv 2506.06395), which maximises that chance for whole responses.
    """

    statistics = frozenset({"expected_agreement"})

    def __call__(self, rollout: Rollout) -> Tensor:
        """Rewards [N]."""
        stats, mask = self.stats_and_mask(rollout)
        assert stats.expected_agreement is not None
        return f.expected_agreement(stats.expected_agreement, mask, self.aggregation, *self.window)


class ProbabilityMargin(InternalReward):
    """Largest next-token probability minus the second largest: in [0, 1], not nats."""

    statistics = frozenset({"margin"})

    def __call__(self, rollout: Rollout) -> Tensor:
        """Rewards [N]."""
        stats, mask = self.stats_and_mask(rollout)
        assert stats.margin is not None
        return f.probability_margin(stats.margin, mask, self.aggregation, *self.window)
