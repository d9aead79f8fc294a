"""One optimiser step: its metrics, summed over the slices of its window, and the entropy bonus that acts in it."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from rlif_lightning.functional.entropy import adapted_coefficient
from rlif_lightning.functional.loss_records import PolicyLoss
from rlif_lightning.models.trainable import gather

COUNTED = ("loss", "ratio", "clipped", "kl", "entropy", "tokens")  # of PolicyLoss, summed over a window


class EntropyBonus:
    """Its coefficient over a run, from a given one on: constant, or adapted to a target (nats per token).

    See :func:`~rlif_lightning.functional.entropy.adapted_coefficient`.
    """

    def __init__(self, coefficient: float, target: float | None) -> None:
        self.coefficient, self.target = coefficient, target
        self._is_low = target is None  # below the target at the last step: the bonus acts
        self._is_asked_for = coefficient > 0 or target is not None

    @property
    def current(self) -> float | None:
        """The coefficient in the current step; 0 unless the last one was below its target. None: there is no bonus.

        Whether it is None, and so whether the update takes its own distributions' entropy, is constant over a run.
        """
        if not self._is_asked_for:
            return None
        return self.coefficient if self._is_low else 0.0

    def adapt(self, entropy: float) -> None:
        """Take in the mean entropy (nats) of the step just taken."""
        if self.target is not None:
            self._is_low = entropy < self.target
            self.coefficient = adapted_coefficient(self.coefficient, entropy, self.target)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs: nothing where the coefficient is constant."""
        return {} if self.target is None else {"coefficient": self.coefficient, "is_low": self._is_low}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from there; a coefficient that is or was constant is that of the settings."""
        if self.target is not None and state:
            self.coefficient, self._is_low = state["coefficient"], state["is_low"]


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

        ``total`` sums a tensor over all processes; ``refers``: whether the divergence was taken.
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
        if bonus.current is not None:
            metrics["train/entropy"] = entropy / tokens
            if bonus.target is not None:
                metrics["train/entropy_coefficient"] = bonus.current
        if not empty:
            bonus.adapt(entropy / tokens)
        if self.grad_norm is not None:
            metrics["train/grad_norm"] = float(self.grad_norm)
        return metrics
