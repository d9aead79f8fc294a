"""Internal rewards: one number per completion from the policy's own per-token statistics.

All are in nats, higher is better, and carry no gradient (the reward of a sample is a constant of the
policy-gradient step, arXiv 2505.19590). A row without a token in the mask gets NaN: it is unusable, not bad,
and :func:`~rlif_lightning.functional.advantages.group_advantages` leaves it out.
"""

from typing import Literal

import torch
from torch import Tensor

Aggregation = Literal["mean", "sum"]


def self_certainty(token_self_certainty: Tensor, mask: Tensor, aggregation: Aggregation = "mean") -> Tensor:
    """Self-certainty of arXiv 2505.19590: KL(U || p_t) over the tokens of a completion; at least 0.

    Args:
        token_self_certainty: [N, T] KL(U || p_t).
        mask: [N, T] bool, the tokens that count.
        aggregation: The paper takes the mean; the sum rewards length as well.

    Returns:
        [N] rewards, NaN where the mask is empty.

    Raises:
        ValueError: Shapes differ, or the aggregation is unknown.
    """
    return _aggregate(token_self_certainty, mask, aggregation)


def token_entropy(entropy: Tensor, mask: Tensor, aggregation: Aggregation = "mean") -> Tensor:
    """Token-level entropy reward: minus the entropy H(p_t) of each step; at most 0.

    Args:
        entropy: [N, T] H(p_t).
        mask: [N, T] bool, the tokens that count.
        aggregation: Mean in arXiv 2603.08660, sum in arXiv 2505.15134; the sum penalises length as well.

    Returns:
        [N] rewards, NaN where the mask is empty.

    Raises:
        ValueError: Shapes differ, or the aggregation is unknown.
    """
    return -_aggregate(entropy, mask, aggregation)


def trajectory_entropy(logprob: Tensor, mask: Tensor, aggregation: Aggregation = "mean") -> Tensor:
    """Trajectory-level entropy reward: the log-probability of the completion itself; at most 0.

    With ``sum`` its expectation under the policy is minus the entropy of whole completions, and equals that
    of the summed :func:`token_entropy`; for the mean neither holds.

    Args:
        logprob: [N, T] log p_t(o_t).
        mask: [N, T] bool, the tokens that count.
        aggregation: Mean in arXiv 2603.08660, sum in arXiv 2505.15134; the sum penalises length as well.

    Returns:
        [N] rewards, NaN where the mask is empty.

    Raises:
        ValueError: Shapes differ, or the aggregation is unknown.
    """
    return _aggregate(logprob, mask, aggregation)


def _aggregate(values: Tensor, mask: Tensor, aggregation: Aggregation) -> Tensor:
    """Mean or sum [N] of values [N, T] over the mask; NaN where a row has no token."""
    if values.ndim != 2 or values.shape != mask.shape:
        raise ValueError(
            "a reward needs one value and one mask entry per token\n"
            f"  got: values {list(values.shape)}, mask {list(mask.shape)}\n"
            "  expected: both [N, T]"
        )
    if aggregation not in ("mean", "sum"):
        raise ValueError(f"unknown aggregation\n  got: {aggregation!r}\n  expected: 'mean' or 'sum'")
    values = values.detach().to(torch.promote_types(values.dtype, torch.float32))
    total = values.where(mask, 0).sum(1)  # [N]; where, not a product: padding may hold nan
    tokens = mask.sum(1)  # [N]
    return (total / tokens if aggregation == "mean" else total).masked_fill(tokens == 0, torch.nan)
