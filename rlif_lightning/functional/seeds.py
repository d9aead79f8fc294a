"""Seeds of completions: functions of the run's seed and of a completion's place in the run, and of nothing else."""

from collections.abc import Sequence

import torch
from torch import Tensor


def completion_seed(seed: int, *position: int) -> int:
    """A 63-bit seed that depends on every number given and on nothing else.

    splitmix64 finaliser, folded over the numbers: neighbouring positions get unrelated seeds.
    """
    mask = (1 << 64) - 1
    state = seed & mask
    for number in position:
        state = (state ^ (number & mask)) + 0x9E3779B97F4A7C15 & mask
        state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 & mask
        state = (state ^ (state >> 27)) * 0x94D049BB133111EB & mask
        state ^= state >> 31
    return state >> 1


def completion_seeds(seed: int, positions: Sequence[tuple[int, ...]], group_size: int) -> Tensor:
    """[N] int64 seeds, f(seed, position of the prompt, index in the group): rank and row order never enter."""
    return torch.tensor([completion_seed(seed, *p, g) for p in positions for g in range(group_size)])
