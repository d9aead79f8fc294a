"""What every reward is."""

import re
from abc import ABC, abstractmethod
from typing import ClassVar

from torch import Tensor

from rlif_lightning.rollout import Rollout


class Reward(ABC):
    """One number per completion, larger is better.

    Several rewards combine by their advantages: each is standardised in its group, then weighted, then
    summed; so a weight of 0.1 acts as 0.1, and a weight below 0 turns the reward around.

    Args:
        weight: Of this reward among several.
    """

    requires: ClassVar[frozenset[str]] = frozenset()
    """What the rollout must hold beside the policy's own statistics: of ``labels``, ``reference``."""

    def __init__(self, weight: float = 1.0) -> None:
        self.weight = weight

    @property
    def name(self) -> str:
        """The class's name in snake case, under which the reward is logged."""
        return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", type(self).__name__).lower()

    @abstractmethod
    def __call__(self, rollout: Rollout) -> Tensor:
        """Rewards [N], without gradient; NaN marks a completion that can't be scored."""
