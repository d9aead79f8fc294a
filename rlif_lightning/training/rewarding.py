"""From rewards to advantages: what the completions of one rollout are worth."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from rlif_lightning.errors import UserError, check_ranges
from rlif_lightning.functional.advantages import Baseline, Scale, batch_std, combine_advantages, group_advantages
from rlif_lightning.grading import agreement
from rlif_lightning.rewards import Reward
from rlif_lightning.rewards.base import LARGEST
from rlif_lightning.rollout import Rollout


@dataclass(frozen=True)
class AdvantageSettings:
    """How rewards become advantages; see :func:`rlif_lightning.functional.advantages.group_advantages`."""

    scale: Scale = "group"
    baseline: Baseline = "mean"
    min_spread: float = 1e-4
    mask_truncated: bool = False
    agreement_band: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        """Refuse numbers out of range."""
        band = self.agreement_band
        check_ranges(
            "rollout",
            ("min_spread", self.min_spread, self.min_spread >= 0, "0 or more"),
            ("agreement_band", band, band is None or 0 <= band[0] <= band[1] <= 1, "0 <= low <= high <= 1"),
        )


def _checked(reward: Reward, value: object, rows: int) -> Tensor:
    """A reward's numbers as float32 [N]; anything else is refused, and nothing finite at all unless it abstains."""
    if not isinstance(value, Tensor) or value.shape != (rows,) or value.is_complex() or value.is_meta:
        kind = type(value).__name__
        if isinstance(value, Tensor):
            kind = f"a tensor of shape {list(value.shape)}, {value.dtype}, on {value.device}"
        raise UserError(
            f"The reward {reward.class_path} must return one number per completion",
            got=kind,
            expected=f"a tensor [{rows}] of real numbers",
        )
    finite = value.isfinite()
    if not reward.abstains and not finite.any():
        wrong = f"The reward {reward.class_path} gave no finite number for any completion, so nothing can be learned"
        raise UserError(wrong, do="correct the reward, or choose another in rollout.rewards")
    value = value.float()
    if (value[finite].abs() > LARGEST).any():
        raise UserError(
            f"The reward {reward.class_path} gave numbers too large to compare in float32",
            got=f"{value[finite].abs().max():.3g}",
            expected=f"at most {LARGEST:g} in size",
            do="divide the reward by a constant: advantages are the same",
        )
    return value


class ScoredRollout(NamedTuple):
    """A rollout with rewards and advantages, and which of its groups teach nothing."""

    rollout: Rollout  # with rewards, advantages [N] and loss mask [N, T]
    gated: Tensor  # [P] bool: the spread of every reward with a weight is too small
    filtered: Tensor | None  # [P] bool: agreement outside the band, where there is a band


def with_advantages(
    rollout: Rollout,
    rewards: Sequence[Reward],
    weights: Sequence[float],
    settings: AdvantageSettings,
    total: Callable[[Tensor], Tensor] = lambda x: x,
) -> ScoredRollout:
    """Reward the completions and compare them within their groups.

    Each reward's numbers are standardised in the group, weighted and summed; a weight of 0 computes a reward for the
    log only. ``total`` sums a tensor over the processes.
    """
    samples, g = rollout.samples, rollout.group_size
    usable = samples.ended if settings.mask_truncated else torch.ones_like(samples.ended)  # [N]
    filtered = None
    if settings.agreement_band is not None:
        low, high = settings.agreement_band
        outside = [not low <= agreement(votes) <= high for votes in rollout.votes]
        filtered = torch.tensor(outside, device=usable.device)  # [P]
        usable = usable & ~filtered.repeat_interleave(g)
    values, parts, gates = {}, [], []
    for reward, weight in zip(rewards, weights, strict=True):
        # A reward of the user's own may have made its tensor on the CPU.
        value = values[reward.name] = _checked(reward, reward(rollout), len(usable)).to(usable.device)
        # Out of the group's statistics and, below, of the loss: not a reward of 0.
        value = value.masked_fill(~usable, torch.nan)
        part, gated = group_advantages(
            value,
            g,
            scale=settings.scale,
            baseline=settings.baseline,
            batch_std=batch_std(value, total).to(value.dtype) if settings.scale == "batch" else None,
            min_spread=settings.min_spread,
        )
        parts.append(part)
        if weight:
            gates.append(gated)
    mask = samples.completion_mask & usable[:, None]
    done = replace(rollout, rewards=values, advantages=combine_advantages(parts, weights), loss_mask=mask)
    nothing = torch.ones(len(usable) // g, dtype=torch.bool, device=usable.device)
    return ScoredRollout(done, torch.stack(gates).all(0) if gates else nothing, filtered)
