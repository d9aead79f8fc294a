"""The rewards that a diagnosis compares."""

import inspect
from collections.abc import Sequence

from rlif_lightning import rewards as room
from rlif_lightning.rewards import Random, Reward, Verifiable

CONTROLS = frozenset({"Verifiable", "Random", "Format", "Length", "Shuffled"})  # no internal feedback


def candidates(recipe: Sequence[Reward], labels: bool) -> list[Reward]:
    """The rewards to compare: all internal ones there are, the recipe's, chance, and the label where there is one."""
    classes = [getattr(room, name) for name in room.__all__ if name not in CONTROLS]
    settings = {cls: inspect.signature(cls).parameters.values() for cls in classes if not inspect.isabstract(cls)}
    found = [cls() for cls, given in settings.items() if all(p.default is not p.empty for p in given)]
    named = {r.name: r for r in [*found, *recipe, Random(), Verifiable()]}
    return [r for r in named.values() if labels or "labels" not in r.requires]


def internal_rewards(rewards: Sequence[Reward]) -> dict[str, bool]:
    """Names of those that may be chosen for training: whether each is made of the answers' agreement itself."""
    return {r.name: "answers" in r.requires for r in rewards if not isinstance(r, Random | Verifiable)}
