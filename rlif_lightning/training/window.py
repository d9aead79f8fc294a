"""The metrics of one optimiser step, summed over the slices of its window."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from rlif_lightning.functional.loss_records import PolicyLoss
from rlif_lightning.models.trainable import gather
from rlif_lightning.training.entropy_bonus import EntropyBonus

COUNTED = ("loss", "ratio", "clipped", "kl", "entropy", "tokens")  # of PolicyLoss, summed over a window


class Window:
    """What is known about the optimiser step under way."""

    def __init__(self) -> None:
        self.sums: Tensor | None = None  # [6] so far, in the order of COUNTED
        self.grad_norm: Tensor | None = None  # before clipping
        self.learning_rate = 0.0

    def count(self, result: PolicyLoss) -> None:
        """Add a slice."""
        values = torch.stack([getattr(result, key).detach().float() for key in COUNTED])
        self.sums = values if self.sums is None else self.sums + values

    def note_step(self, optimizer: Optimizer) -> None:
        """Keep what the step is about to be taken with."""
        self.learning_rate = optimizer.param_groups[0]["lr"]  # when the step is logged, it is the next one's
        grads = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        self.grad_norm = gather(nn.utils.get_total_norm(grads))

    def metrics(self, total: Callable[[Any], Tensor], refers: bool, bonus: EntropyBonus) -> dict[str, float]:
        """Means over the step just taken; starts new sums, and adapts the entropy's coefficient to its target.

        Args:
            total: Sums a tensor over all processes.
            refers: Whether the divergence was taken.
            bonus: Of the entropy.
        """
        loss, ratio, clipped, kl, entropy, tokens = total(self.sums).tolist()
        empty, tokens = not tokens, max(tokens, 1.0)
        self.sums = None
        metrics = {
            "train/loss": loss,
            "train/ratio_mean": ratio / tokens,
            "train/clip_fraction": clipped / tokens,
            "train/learning_rate": self.learning_rate,
        }
        if refers:
            metrics["train/kl"] = kl / tokens
        coefficient = bonus.current
        if coefficient is not None:
            metrics["train/entropy"] = entropy / tokens
            if bonus.target is not None:
                metrics["train/entropy_coefficient"] = coefficient
        if not empty:
            bonus.adapt(entropy / tokens)
        if self.grad_norm is not None:
            metrics["train/grad_norm"] = float(self.grad_norm)
        return metrics
