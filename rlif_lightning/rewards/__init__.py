"""Rewards: small classes chosen by class path in a recipe."""

from rlif_lightning.rewards.base import Reward
from rlif_lightning.rewards.baselines import Random, Verifiable
from rlif_lightning.rewards.internal import SelfCertainty, TokenEntropy, TrajectoryEntropy

__all__ = ["Random", "Reward", "SelfCertainty", "TokenEntropy", "TrajectoryEntropy", "Verifiable"]
