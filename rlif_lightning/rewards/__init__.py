"""Rewards: small classes chosen by class path in a recipe, one number per completion, larger is better.

They are internal (what the policy says of its own completions), of answers (what the completions of a prompt agree
on), or baselines and controls. A wrong-sign control is any reward with a negative weight.
"""

from rlif_lightning.rewards.agreement import ClusterFrequency, MajorityVote
from rlif_lightning.rewards.base import Reward
from rlif_lightning.rewards.controls import Format, Length, Random, Shuffled, Verifiable
from rlif_lightning.rewards.internal import (
    ExpectedAgreement,
    InternalReward,
    ProbabilityMargin,
    SelfCertainty,
    TokenEntropy,
    TrajectoryEntropy,
)

__all__ = [
    "ClusterFrequency", "ExpectedAgreement", "Format", "InternalReward", "Length", "MajorityVote",
    "ProbabilityMargin", "Random", "Reward", "SelfCertainty", "Shuffled", "TokenEntropy", "TrajectoryEntropy",
    "Verifiable",
]  # fmt: skip
