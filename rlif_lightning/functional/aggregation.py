"""Internal rewards: one number per completion from one number per token.

No reward carries a gradient (the reward of a sample is a constant of the policy-gradient step, arXiv 2505.19590).
A row without a token in the mask gets NaN: it is unusable, not bad, and
:func:`~rlif_lightning.functional.advantages.group_advantages` leaves it out.
"""

from fractions import Fraction
from typing import Literal, get_args

import torch
from torch import Tensor

Aggregation = Literal["mean", "sum", "last_k", "bottom_q"]


def aggregate(
    values: Tensor,  # [N, T], larger is more certain; anything, nan and inf included, outside the mask
    mask: Tensor,  # [N, T] bool, the tokens that count
    aggregation: Aggregation = "mean",
    k: int = 16,  # tokens of last_k, at least 1
    q: float = 0.2,  # share of bottom_q, above 0 and at most 1
) -> Tensor:
    """One number per completion from one number per token, without gradient.

    ``mean`` or ``sum`` over the tokens; ``last_k``: mean over the last k tokens (all, where there are fewer);
    ``bottom_q``: mean over the ceil(q * tokens) least certain tokens, those of lowest value.

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
