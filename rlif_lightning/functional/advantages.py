"""Rewards to advantages: each completion against the others of its prompt (GRPO, arXiv 2402.03300)."""

from collections.abc import Callable, Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

Scale = Literal["group", "batch", "none"]
Baseline = Literal["mean", "leave_one_out"]


def group_advantages(
    rewards: Tensor,
    group_size: int,
    *,
    scale: Scale = "group",
    baseline: Baseline = "mean",
    batch_std: Tensor | None = None,
    min_spread: float = 0.0,
    eps: float = 1e-4,
) -> tuple[Tensor, Tensor]:
    """Advantages within each group: (r - baseline) / (std + eps), std unbiased.

    A row with a reward that is not finite (NaN: no token to score) is unusable: it enters neither mean nor
    std and gets advantage 0. A group is gated, all its advantages 0, where it has fewer than two usable rows
    or its std is at most ``min_spread``: to standardise a spread that is only rounding turns noise into
    advantages of size 1. Equal rewards are always gated.

    Args:
        rewards: [N], higher is better, rows of a group next to each other.
        group_size: G.
        scale: What the difference is divided by. ``group``: the std of the group (arXiv 2402.03300). ``batch``:
            the std of the rewards of the whole rollout (arXiv 2508.08221), so that groups that differ little
            count little. ``none``: nothing (Dr. GRPO, arXiv 2503.20783), advantages in the reward's unit.
        baseline: ``mean`` of the group, or ``leave_one_out``: the mean of the others (RLOO, arXiv 2402.14740),
            which is the former times n / (n - 1).
        batch_std: [] of :func:`batch_std`, for scale ``batch`` only.
        min_spread: Largest std that still gates, in the reward's own unit.
        eps: Added to the std.

    Returns:
        Advantages [N] without gradient, and gated [P] bool.

    Raises:
        ValueError: The rewards are not [N] with N a multiple of the group size, the scale or the baseline is
            unknown, or scale ``batch`` comes without a std.
    """
    if rewards.ndim != 1 or group_size < 1 or len(rewards) % group_size:
        raise ValueError(
            "rewards do not divide into groups\n"
            f"  got: rewards {list(rewards.shape)}, group_size {group_size}\n"
            "  expected: rewards [N] with N a multiple of group_size"
        )
    for what, value, known in (("scale", scale, get_args(Scale)), ("baseline", baseline, get_args(Baseline))):
        if value not in known:
            raise ValueError(f"unknown {what}\n  got: {value!r}\n  expected: one of {known}")
    if (scale == "batch") != (batch_std is not None):
        raise ValueError("scale 'batch', and no other, needs the std of the batch\n  expected: batch_std []")
    dtype = torch.promote_types(rewards.dtype, torch.float32)
    r = rewards.detach().to(dtype).reshape(-1, group_size)  # [P, G]
    usable = r.isfinite()  # [P, G]
    n = usable.sum(1, keepdim=True)  # [P, 1]
    # Counted from the group's best, equal rewards are exactly 0; their plain mean may be off by a rounding,
    # and that would pass for a spread.
    best = r.where(usable, -torch.inf).amax(1, keepdim=True)  # [P, 1]
    r = (r - best).where(usable, 0)
    centred = (r - r.sum(1, keepdim=True) / n).where(usable, 0)  # [P, G]
    std = (centred.square().sum(1, keepdim=True) / (n - 1)).sqrt()  # [P, 1], meaningless where n < 2: gated
    gated = (n < 2) | (std <= max(min_spread, 0.0))  # [P, 1]
    advantages = centred
    if baseline == "leave_one_out":
        advantages = advantages * n / (n - 1)  # where n is 1: gated
    if scale == "group":
        advantages = advantages / (std + eps)
    elif batch_std is not None:
        advantages = advantages / (batch_std + eps)
    return advantages.masked_fill(gated, 0).flatten(), gated.squeeze(1)


def batch_std(rewards: Tensor, total: Callable[[Tensor], Tensor] = lambda x: x) -> Tensor:
    """Unbiased standard deviation [] in float64 of all finite rewards of a rollout, over all processes.

    Rewards [N] are those of this process, ``total`` sums a tensor over the processes. 0 where fewer than two rewards
    are finite.
    """
    r = rewards.detach().double()
    r = r[r.isfinite()]
    count, s = total(torch.stack([torch.tensor(float(len(r)), device=r.device, dtype=r.dtype), r.sum()])).unbind()
    squares = total((r - s / count.clamp(min=1)).square().sum())
    return (squares / (count - 1).clamp(min=1)).sqrt()


def combine_advantages(parts: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Advantages of several rewards as one: A = sum_k weight_k * A_k.

    The sum is not standardised again, so a weight is the share of its reward in the gradient, and doubling
    all weights doubles it. A negative weight turns a reward round. Each part is a tensor [N], as is their sum.
    """
    return torch.stack([w * p for w, p in zip(weights, parts, strict=True)]).sum(0)
