"""What internal rewards are held against: the label itself, chance, and what is easily had without reasoning."""

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from rlif_lightning.errors import UserError
from rlif_lightning.functional.seeds import completion_seed
from rlif_lightning.functional.token_stats import Statistic
from rlif_lightning.rewards.base import Reward, Weight
from rlif_lightning.rollout import Rollout


class Verifiable(Reward):
    """1 for a right answer, 0 for a wrong one (RLVR): the supervised baseline."""

    requires = frozenset({"labels"})

    def __call__(self, rollout: Rollout) -> Tensor:
        """Rewards [N]."""
        assert rollout.correct is not None
        return rollout.correct


class Random(Reward):
    """A uniform number in [0, 1) from the completion's seed: the control that no claim should lack."""

    def __call__(self, rollout: Rollout) -> Tensor:
        """Rewards [N]."""
        numbers = [completion_seed(int(s), 1) / 2**63 for s in rollout.seeds]
        return torch.tensor(numbers, device=rollout.samples.completion_ids.device)


class Format(Reward):
    """1 where an answer can be read out of the completion, right or wrong, else 0.

    Partial credit besides :class:`Verifiable`, or by itself the control for gains that are format alone.
    """

    requires = frozenset({"answers"})

    def __call__(self, rollout: Rollout) -> Tensor:
        """Rewards [N]."""
        found = [float(a is not None) for a in rollout.answers]
        return torch.tensor(found, device=rollout.samples.completion_ids.device)


class Length(Reward):
    """Number of tokens of the completion, the end token included: minus it, where short ones are preferred.

    Args:
        prefer: Whether ``short`` or ``long`` completions are preferred.
        weight: Weight of this reward among several.
    """

    def __init__(self, prefer: Literal["short", "long"], weight: Weight = 1.0) -> None:
        super().__init__(weight)
        self.prefer, self.sign = prefer, {"short": -1.0, "long": 1.0}[prefer]

    @property
    def name(self) -> str:
        """``length_short`` or ``length_long``."""
        return f"{super().name}_{self.prefer}"

    def __call__(self, rollout: Rollout) -> Tensor:
        """Rewards [N]."""
        return self.sign * rollout.samples.lengths.float()


class Shuffled(Reward):
    """Another reward, dealt to the wrong completions: its values permuted within each group.

    The control with that reward's own distribution and nothing of its meaning. The permutation is a function of
    the completions' seeds alone; a completion may get its own value.

    Args:
        reward: Reward whose values are shuffled.
        weight: Weight of this reward among several.

    Raises:
        UserError: The inner reward has a weight, which would do nothing.
    """

    def __init__(self, reward: Reward, weight: Weight = 1.0) -> None:
        super().__init__(weight)
        if any(w != 1 for _, w in reward._points):
            raise UserError(
                f"The weight of the reward {reward.name} does nothing inside Shuffled",
                do="give the weight to Shuffled",
            )
        self.reward = reward
        self.requires = reward.requires
        self.abstains = reward.abstains

    @property
    def statistics(self) -> Mapping[str, Statistic]:
        """The inner reward's."""
        return self.reward.statistics

    @property
    def name(self) -> str:
        """``shuffled_`` and the inner reward's name."""
        return f"{super().name}_{self.reward.name}"

    def __call__(self, rollout: Rollout) -> Tensor:
        """Rewards [N]."""
        values = self.reward(rollout).view(-1, rollout.group_size)  # [P, G]
        seeds = rollout.seeds.to(values.device)
        keys = torch.tensor([completion_seed(int(s), 2) for s in seeds], device=values.device)  # 1 is Random's
        # The k-th smallest seed of a group gets the value of the k-th smallest key: wherever its rows stand.
        to, source = seeds.view_as(values).argsort(1), keys.view_as(values).argsort(1)
        return torch.empty_like(values).scatter(1, to, values.gather(1, source)).flatten()
