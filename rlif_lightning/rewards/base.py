"""What every reward is."""

import itertools
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from functools import cached_property

from torch import Tensor

from rlif_lightning.errors import UserError
from rlif_lightning.functional.token_stats import Statistic
from rlif_lightning.rollout import Rollout

Weight = float | list[tuple[int, float]]
LARGEST = 1e15  # of rewards and of their weights: the squares of larger numbers overflow in float32
REQUIREMENTS = frozenset({"labels", "answers", "answer_mask", "reference", "ema"})


class Reward(ABC):
    """One number per completion, larger is better.

    Several rewards combine by their advantages: each is standardised in its group, then weighted, then
    summed; so a weight of 0.1 acts as 0.1, a weight below 0 turns the reward around, and one of 0 only logs it.

    Args:
        weight: Weight of this reward among several: a number, or a schedule ``[[step, weight], ...]``, linear between
            the given steps and constant before the first and after the last.
    """

    requires: frozenset[str] = frozenset()
    """What the rollout must hold: of ``labels``, ``answers`` (that can be read out of the completions),
    ``answer_mask`` (which tokens are the answer's), ``reference``, ``ema`` (statistics under these annotators)."""
    abstains: bool = False
    """Whether a rollout of nothing but NaN is a verdict (no prompt had a majority) and not a mistake."""

    def __init__(self, weight: Weight = 1.0) -> None:
        self._points = [(0, weight)] if isinstance(weight, int | float) else [(int(s), float(w)) for s, w in weight]
        rising = all(a[0] < b[0] for a, b in itertools.pairwise(self._points))
        if not self._points or not rising or not all(abs(w) <= LARGEST for _, w in self._points):
            raise UserError(
                "The weight of a reward is neither a number nor a schedule",
                got=weight,
                expected=f"a number of at most {LARGEST:g} in size, or [[step, weight], ...] with rising steps",
            )

    @cached_property
    def _points(self) -> list[tuple[int, float]]:
        """Steps and weights, which ``__init__`` sets; this is for a class whose own ``__init__`` forgets that."""
        wrong = f"The __init__ of the reward {self.class_path} does not call that of its base class"
        raise UserError(wrong, do="begin it with super().__init__(weight=weight)")

    def weight_at(self, step: int) -> float:
        """The weight at an optimiser step."""
        for (s0, w0), (s1, w1) in itertools.pairwise(self._points):
            if s0 <= step < s1:
                return w0 + (w1 - w0) * (step - s0) / (s1 - s0)
        return self._points[0][1] if step < self._points[0][0] else self._points[-1][1]

    @property
    def is_silent(self) -> bool:
        """Whether the weight is 0 throughout."""
        return not any(w for _, w in self._points)

    @property
    def name(self) -> str:
        """The class's name in snake case, under which the reward is logged."""
        return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", type(self).__name__).lower()

    @property
    def statistics(self) -> Mapping[str, Statistic]:
        """Statistics of each token that the rollout must hold besides the usual three, by name."""
        return {}

    @property
    def class_path(self) -> str:
        """As a recipe names the class."""
        return f"{type(self).__module__}.{type(self).__qualname__}"

    @abstractmethod
    def __call__(self, rollout: Rollout) -> Tensor:
        """Rewards [N], without gradient; NaN marks a completion that can't be scored."""


def statistics_of(rewards: Iterable[Reward]) -> dict[str, Statistic]:
    """What a sampler has to take besides the usual three for these rewards, by name."""
    return {name: statistic for reward in rewards for name, statistic in reward.statistics.items()}


def requirements_of(rewards: Iterable[Reward]) -> frozenset[str]:
    """What a rollout must hold for these rewards; a :class:`UserError` where nothing is called so."""
    required = frozenset[str]()
    for reward in rewards:
        if unknown := set(reward.requires) - REQUIREMENTS:
            raise UserError(
                f"The reward {reward.class_path} requires what no rollout has",
                got=", ".join(sorted(unknown)),
                expected=f"a frozenset with some of {', '.join(sorted(REQUIREMENTS))}",
            )
        required |= reward.requires
    return required
