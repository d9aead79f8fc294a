"""Entropy in the update: which tokens learn, and how strongly a bonus keeps the entropy up."""

import math
from collections.abc import Callable

from torch import Tensor


def top_entropy_mask(
    entropy: Tensor,  # [N, T] in nats; may hold anything outside the mask
    mask: Tensor,  # [N, T] bool, the tokens to choose among
    fraction: float,  # share of them to keep, above 0; 1 keeps all
    gather: Callable[[Tensor], Tensor] = lambda x: x,  # joins [n] with those of other processes, whose n differs
) -> Tensor:
    """The tokens with the highest entropy (arXiv 2506.01939: the best fifth carries the learning).

    The threshold is the (1 - fraction) quantile of all entropies in the mask, over rows and processes; tokens at the
    threshold are in, so at least one is, and equal entropies may add some.

    Returns:
        [N, T] bool, within the mask.

    Raises:
        ValueError: Shapes differ, or the fraction is not in (0, 1].
    """
    if entropy.shape != mask.shape:
        raise ValueError(
            "entropy and mask differ in shape\n"
            f"  got: {list(entropy.shape)} and {list(mask.shape)}\n"
            "  expected: [N, T] both"
        )
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction is out of range\n  got: {fraction}\n  expected: above 0, at most 1")
    chosen = gather(entropy[mask])
    if fraction == 1 or not len(chosen):
        return mask
    # The tokens at or above the quantile, counted; torch.quantile refuses more than 2^24 numbers.
    kept = 1 + math.floor(fraction * (len(chosen) - 1))
    threshold = chosen.kthvalue(len(chosen) - kept + 1).values
    return mask & (entropy >= threshold)


def adapted_coefficient(coefficient: float, entropy: float, target: float, step: float = 0.005) -> float:
    """The entropy bonus's coefficient after an optimiser step (Skywork-OR1, arXiv 2505.22312, section 4).

    One step up where the entropy is below the target, one step down otherwise, never below 0. The paper, too,
    applies the coefficient only while the entropy is below the target; that is left to the caller. Coefficient and
    entropy, a mean over tokens in nats, are those of the step just taken; ``step`` is the paper's.
    """
    return max(0.0, coefficient + (step if entropy < target else -step))
