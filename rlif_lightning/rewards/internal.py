"""The rewards of RLIF: what the policy says of its own completions, no labels."""

from abc import abstractmethod
from collections.abc import Mapping
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from rlif_lightning.errors import UserError
from rlif_lightning.functional.aggregation import Aggregation, aggregate
from rlif_lightning.functional.token_stats import Statistic, TokenStats, token_stats
from rlif_lightning.rewards.base import Reward, Weight
from rlif_lightning.rollout import Rollout

Annotator = Literal["policy", "reference", "ema"]
NOT_OF_THE_STATISTIC = frozenset({"_points", "aggregation", "window", "annotator", "requires"})
"""Attributes of every internal reward, which do not change the statistic of a token."""


class InternalReward(Reward):
    """A statistic of the next-token distributions along a completion, aggregated over its tokens.

    A subclass in a file of your own needs :meth:`statistic` alone. It is computed from the logits that the token is
    drawn from, so it costs no forward.

    The distributions are softmax(logits / temperature) with the temperature of the sampler;
    ``rollout.statistics_temperature`` sets another one. top_k, top_p and min_p do not enter.

    Args:
        aggregation: How a completion's tokens are combined. ``mean`` or ``sum``: over all its tokens. ``last_k``:
            mean over its last k tokens. ``bottom_q``: mean over the share q of its tokens that are the least certain.
        k: Number of tokens for ``last_k``.
        q: Share of tokens for ``bottom_q``, above 0 and at most 1; rounded up to whole tokens.
        annotator: Whose distributions are read. ``policy``: those that the completion was sampled from ("online").
            ``reference``: those of the frozen policy of the start ("offline", known to be hacked, arXiv 2505.19590).
            ``ema``: those of a running mean of the policy's weights.
        weight: Weight of this reward among several.

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
        self.requires = (self.requires | {annotator}) - {"policy"}

    @property
    def name(self) -> str:
        """The class's name in snake case, with what differs from the default."""
        differs = [x for x in (self.aggregation, self.annotator) if x not in ("mean", "policy")]
        return "_".join([super().name, *differs])

    @abstractmethod
    def statistic(self, logp: Tensor) -> Tensor:
        """What a token is worth by the distribution that it was drawn from, larger is better; without gradient.

        Args:
            logp: [..., V] log-probabilities in nats, fp32; -inf where the model rules a token out. Other rewards read
                it, too: write nothing into it.

        Returns:
            [...] floating-point numbers, none of them nan.
        """

    @property
    def statistics(self) -> Mapping[str, Statistic]:
        """:meth:`statistic`, checked, under a name that no statistic with other numbers has."""
        return {self._statistic_name: self._checked_statistic}

    def token_values(self, stats: TokenStats) -> Tensor:
        """What each token is worth [N, T], larger is better; anything outside the completions."""
        if self._statistic_name not in stats.own:
            wrong = f"The completions were scored without the statistic of the reward {self.class_path}"
            raise UserError(wrong, do="name the reward where they are scored: score(..., rewards=[...])")
        return stats.own[self._statistic_name]

    def __call__(self, rollout: Rollout) -> Tensor:
        """Rewards [N]."""
        return self._aggregated(rollout.statistics(self.annotator), rollout.samples.completion_mask)

    def of_logits(self, logits: Tensor, ids: Tensor, mask: Tensor, temperature: float = 1.0) -> Tensor:
        """The same for plain tensors, whoever made them.

        Args:
            logits: [N, T, V] that predict the tokens.
            ids: [N, T] token ids, from 0 to V - 1 at padding too.
            mask: [N, T] bool, the completions' tokens.
            temperature: Divides the logits first.

        Returns:
            Rewards [N], without gradient, NaN where a row has no token.

        Raises:
            ValueError: The shapes do not match.
        """
        with torch.no_grad():
            return self._aggregated(token_stats(logits, ids, temperature, self.statistics), mask)

    def _aggregated(self, stats: TokenStats, mask: Tensor) -> Tensor:
        values = self.token_values(stats)
        if self.statistics and bool(values[mask].isnan().any()):
            raise UserError(
                f"The statistic of the reward {self.class_path} is not a number for some tokens",
                got=f"nan for {int(values[mask].isnan().sum())} of {int(mask.sum())} tokens",
                expected="a number for every distribution, those with probabilities of 0 among them",
            )
        return aggregate(values, mask, self.aggregation, *self.window)

    @cached_property
    def _statistic_name(self) -> str:
        """The class path and the subclass's own settings: rewards that differ in neither share their numbers."""
        own = {name: value for name, value in vars(self).items() if name not in NOT_OF_THE_STATISTIC}
        return f"{self.class_path}{own or ''}"

    def _checked_statistic(self, logp: Tensor) -> Tensor:
        version = None if logp.is_inference() else logp._version
        value: object = self.statistic(logp)
        if version is not None and logp._version != version:
            raise UserError(
                f"The statistic of the reward {self.class_path} writes into the log-probabilities, which others read",
                do="compute it without operations in place, such as exp_",
            )
        if not isinstance(value, Tensor):
            got = type(value).__name__
        elif value.shape != logp.shape[:-1] or not value.is_floating_point():
            got = f"{list(value.shape)} of {value.dtype}"
        else:
            return value.to(logp.dtype)
        raise UserError(
            f"The statistic of the reward {self.class_path} must be one number per token",
            got=got,
            expected=f"a floating-point tensor {list(logp.shape[:-1])} from log-probabilities {list(logp.shape)}",
        )


class _FromEveryRollout(InternalReward):
    """A reward by what every rollout holds already, on a faster path than :meth:`InternalReward.statistic`."""

    def __init_subclass__(cls) -> None:
        """Refuse a statistic of its own, which nothing would compute."""
        super().__init_subclass__()
        if cls.statistic is not _FromEveryRollout.statistic:
            do = "derive it from rlif_lightning.rewards.InternalReward"
            raise UserError(f"The reward {cls.__name__} has a statistic that its base class would ignore", do=do)

    @property
    def statistics(self) -> Mapping[str, Statistic]:
        return {}

    def statistic(self, logp: Tensor) -> Tensor:
        raise NotImplementedError


class SelfCertainty(_FromEveryRollout):
    """KL(U || p) in nats: how far each next-token distribution is from uniform.

    arXiv 2505.19590, equation 2, with the mean over tokens; the sum rewards length as well. Not negative and
    unbounded above.
    """

    def token_values(self, stats: TokenStats) -> Tensor:
        """KL(U || p) [N, T] in nats."""
        return stats.self_certainty


class TokenEntropy(_FromEveryRollout):
    """Minus the entropy of the next-token distributions in nats: at most 0.

    Mean in arXiv 2603.08660 and 2506.17219, sum in arXiv 2505.15134; the sum penalises length as well.
    """

    def token_values(self, stats: TokenStats) -> Tensor:
        """Minus H(p) [N, T] in nats."""
        return -stats.entropy


class TrajectoryEntropy(_FromEveryRollout):
    """Log-probability of the completion in nats: at most 0.

    Mean in arXiv 2603.08660 and 2506.17219, sum in arXiv 2505.15134; the sum penalises length as well. On policy the
    expectation of the sum is minus the entropy over whole completions, and equals that of the summed
    :class:`TokenEntropy`; for the mean neither holds.
    """

    def token_values(self, stats: TokenStats) -> Tensor:
        """Log-probability [N, T] in nats."""
        return stats.logprob


class ExpectedAgreement(InternalReward):
    """Sum of the squared next-token probabilities, the chance that two draws of a token agree: in (0, 1], not nats.

    After RLSC (arXiv 2506.06395), which maximises that chance for whole responses.
    """

    def statistic(self, logp: Tensor) -> Tensor:
        """sum_j p_j^2."""
        return logp.exp().square().sum(-1)


class ProbabilityMargin(InternalReward):
    """Largest next-token probability minus the second largest: in [0, 1], not nats."""

    def statistic(self, logp: Tensor) -> Tensor:
        """p_(1) - p_(2)."""
        first, second = logp.exp().topk(2, -1).values.unbind(-1)
        return first - second
