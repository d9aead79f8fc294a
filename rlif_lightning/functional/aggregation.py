"""Internal rewards: one number per completion from the policy's own per-token statistics.

Each takes a statistic [N, T] of :class:`~rlif_lightning.functional.token_stats.TokenStats`, turns it so that
larger is more certain, and aggregates it over the tokens of the completion, see :func:`aggregate`. The statistics
are those of softmax(z / tau): with the temperature tau of the sampler by default, with another one where
``rollout.statistics_temperature`` says so.

No reward carries a gradient (the reward of a sample is a constant of the policy-gradient step, arXiv 2505.19590).
A row without a token in the mask gets NaN: it is unusable, not bad, and
:func:`~rlif_lightning.functional.advantages.group_advantages` leaves it out.
"""

from fractions import Fraction
from typing import Literal, get_args

import torch
from torch import Tensor

Aggregation = Literal["mean", "sum", "last_k", "bottom_q"]


def self_certainty(
    token_self_certainty: Tensor, mask: Tensor, aggregation: Aggregation = "mean", k: int = 16, q: float = 0.2
) -> Tensor:
    """Self-certainty of arXiv 2505.19590 [N]: KL(U || p_t) in nats over the tokens; at least 0, unbounded above.

    The paper takes the mean; the sum rewards length as well. Arguments and errors: :func:`aggregate`.
    """
    return aggregate(token_self_certainty, mask, aggregation, k, q)


def token_entropy(
    entropy: Tensor, mask: Tensor, aggregation: Aggregation = "mean", k: int = 16, q: float = 0.2
) -> Tensor:
    """Token-level entropy reward [N]: minus the entropy H(p_t) of each step, in nats; at most 0.

    Mean in arXiv 2603.08660, sum in arXiv 2505.15134; the sum penalises length as well. The bottom q are the
    tokens of the *highest* entropy. Arguments and errors: :func:`aggregate`.
    """
    return aggregate(-entropy, mask, aggregation, k, q)


def trajectory_entropy(
    logprob: Tensor, mask: Tensor, aggregation: Aggregation = "mean", k: int = 16, q: float = 0.2
) -> Tensor:
    """Trajectory-level entropy reward [N]: the log-probability log p_t(o_t) of the completion, in nats; at most 0.

    With ``sum`` its expectation under the policy is minus the entropy of whole completions, and equals that
    of the summed :func:`token_entropy`; for the mean neither holds. Mean in arXiv 2603.08660, sum in
    arXiv 2505.15134; the sum penalises length as well. Arguments and errors: :func:`aggregate`.
    """
    return aggregate(logprob, mask, aggregation, k, q)


def expected_agreement(
    token_agreement: Tensor, mask: Tensor, aggregation: Aggregation = "mean", k: int = 16, q: float = 0.2
) -> Tensor:
    """Expected agreement [N]: sum_j p_tj^2, the chance that two draws of a token agree; a mean is in (0, 1].

    After RLSC (arXiv 2506.06395), whose objective is that chance for whole responses; this is taken token by
    token. Arguments and errors: :func:`aggregate`.
    """
    return aggregate(token_agreement, mask, aggregation, k, q)


def probability_margin(
    margin: Tensor, mask: Tensor, aggregation: Aggregation = "mean", k: int = 16, q: float = 0.2
) -> Tensor:
    """Probability margin [N]: the largest minus the second-largest probability of a step; a mean is in [0, 1].

    Arguments and errors: :func:`aggregate`.
    """
    return aggregate(margin, mask, aggregation, k, q)


def aggregate(values: Tensor, mask: Tensor, aggregation: Aggregation = "mean", k: int = 16, q: float = 0.2) -> Tensor:
    """One number per completion from one number per token, without gradient.

    Args:
        values: [N, T], larger is more certain; anything, nan and inf included, outside the mask.
        mask: [N, T] bool, the tokens that count.
        aggregation: ``mean`` or ``sum`` over the tokens; ``last_k``: mean over the last k tokens (all, where there
            are fewer); ``bottom_q``: mean over the ceil(q * tokens) least certain tokens, those of lowest value.
        k: Tokens of ``last_k``, at least 1.
        q: Share of ``bottom_q``, above 0 and at most 1.

    Returns:
        [N] fp32 (float64 for float64 values), NaN where a row has no token.

    Raises:
        ValueError: Shapes differ, the aggregation is unknown, or k or q is out of range.
    """
    if values.ndim != 2 or values.shape != mask.shape:
        raise ValueError(
            "a reward needs one value and one mask entry per token\n"
            f"  got: values {list(values.shape)}, mask {list(mask.shape)}\n"
            "  expected: both [N, T]"
        )
    if aggregation not in get_args(Aggregation):
        expected = " or ".join(map(repr, get_args(Aggregation)))
        raise ValueError(f"unknown aggregation\n  got: {aggregation!r}\n  expected: {expected}")
    if k < 1 or not 0 < q <= 1:
        raise ValueError(f"aggregation out of range\n  got: k {k}, q {q}\n  expected: k >= 1 and 0 < q <= 1")
    values = values.detach().to(torch.promote_types(values.dtype, torch.float32))
    empty = ~mask.any(1)  # [N]
    if aggregation == "last_k":
        from_end = mask.flip(1).cumsum(1).flip(1)  # [N, T] 1 at the last token
        mask = mask & (from_end <= k)
    elif aggregation == "bottom_q":
        lowest = _ceil_share(mask.sum(1, keepdim=True), q)  # [N, 1]
        values = values.masked_fill(~mask, torch.inf).sort(1).values  # padding last
        mask = torch.arange(values.shape[1], device=values.device) < lowest
    total = values.where(mask, 0).sum(1)  # [N]; where, not a product: padding may hold nan
    return (total if aggregation == "sum" else total / mask.sum(1)).masked_fill(empty, torch.nan)


def _ceil_share(count: Tensor, q: float) -> Tensor:
    """ceil(q * count), at least 1, of whole numbers: exact, where 0.07 * 100 as floats is above 7."""
    share = Fraction(q).limit_denominator(1_000_000)
    return ((count * share.numerator + share.denominator - 1) // share.denominator).clamp(min=1)
