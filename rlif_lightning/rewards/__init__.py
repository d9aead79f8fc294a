"""Rewards: small classes chosen by class path in a recipe, one number per completion, larger is better.

Internal, what the policy says of its own completions:

- :class:`SelfCertainty`: KL(U || p) of the next-token distributions,
- :class:`TokenEntropy`: minus their entropy,
- :class:`TrajectoryEntropy`: log-probability of the completion,
- :class:`ExpectedAgreement`: sum of their squared probabilities,
- :class:`ProbabilityMargin`: their largest probability minus the second largest.

Of answers, what the completions of a prompt agree on:

- :class:`MajorityVote`: 1 for the most frequent answer,
- :class:`ClusterFrequency`: share of the votes for the same answer.

Baselines and controls (a wrong-sign control is any reward with a negative weight):

- :class:`Verifiable`: 1 for the right answer, by labels,
- :class:`Format`: 1 for any answer,
- :class:`Length`: minus or plus the number of tokens,
- :class:`Random`: a number without meaning,
- :class:`Shuffled`: another reward's values, dealt to the wrong completions.
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
    "ClusterFrequency",
    "ExpectedAgreement",
    "Format",
    "InternalReward",
    "Length",
    "MajorityVote",
    "ProbabilityMargin",
    "Random",
    "Reward",
    "SelfCertainty",
    "Shuffled",
    "TokenEntropy",
    "TrajectoryEntropy",
    "Verifiable",
]
