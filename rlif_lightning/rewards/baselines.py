"""What internal rewards are held against: the label itself, and chance."""

import torch
from torch import Tensor

from rlif_lightning.rewards.base import Reward
from rlif_lightning.rollout import Rollout, completion_seed


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
