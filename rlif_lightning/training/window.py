"""One optimiser step: its metrics, summed over the slices of its window, and the entropy bonus that acts in it."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from rlif_lightning.errors import UserError
from rlif_lightning.functional.entropy import adapted_coefficient
from rlif_lightning.functional.loss_records import PolicyLoss
from rlif_lightning.models.trainable import gather

MOST_SKIPPED = 3  # skipped steps in a row that end a run
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
    """What is known about the optimiser step under way.

    A step whose gradient is not finite is skipped: the optimiser gets no gradient, so weights, moments and their
    count stay as they are, and so does the entropy bonus. Schedule, step number and references go on. In
    float16 a gradient may overflow because the loss is scaled up too far; each skipped step halves that scale.
    """

    def __init__(self) -> None:
        self.sums: Tensor | None = None  # [6] so far, in the order of COUNTED
        self.grad_norm: Tensor | None = None  # before clipping
        self.learning_rate = 0.0
        self.loss_scale: float | None = None  # that the step is taken with; None: its precision needs none
        self.skipped = self.skipped_in_a_row = 0  # steps: of the run, and up to the last one

    def count(self, result: PolicyLoss) -> None:
        """Add a slice."""
        values = torch.stack([getattr(result, key).detach().float() for key in COUNTED])
        self.sums = values if self.sums is None else self.sums + values

    def note_step(self, optimizer: Optimizer, loss_scale: float | None = None) -> None:
        """Keep what the step is about to be taken with; skip it where its gradient is not finite."""
        self.loss_scale = loss_scale
        self.learning_rate = optimizer.param_groups[0]["lr"]  # when the step is logged, it is the next one's
        grads = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        self.grad_norm = gather(nn.utils.get_total_norm(grads))  # the same on all processes
        if self.grad_norm.isfinite():
            self.skipped_in_a_row = 0
            return
        self.skipped, self.skipped_in_a_row = self.skipped + 1, self.skipped_in_a_row + 1
        optimizer.zero_grad()  # to None: every optimiser leaves weights without a gradient alone

    def check_skipped(self) -> None:
        """Refuse to go on where step after step is skipped, and the scale of the loss is not to blame."""
        if self.skipped_in_a_row >= MOST_SKIPPED and (self.loss_scale is None or self.loss_scale <= 1):
            raise UserError(
                f"{self.skipped_in_a_row} steps in a row had a gradient that is not finite and were skipped",
                got=f"a gradient norm of {self.grad_norm}",
                do="lower model.optimizer.lr, model.kl_coefficient, model.entropy_coefficient or the weights of "
                "rollout.rewards, and begin again or continue with --ckpt_path last",
            )

    def state_dict(self) -> dict[str, int]:
        """What a resumed run counts on from."""
        return {"skipped": self.skipped, "skipped_in_a_row": self.skipped_in_a_row}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Count on from there."""
        self.skipped, self.skipped_in_a_row = state.get("skipped", 0), state.get("skipped_in_a_row", 0)

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
            "train/skipped_steps": float(self.skipped),
        }
        if self.loss_scale is not None:
            metrics["train/loss_scale"] = self.loss_scale
        if refers:
            metrics["train/kl"] = kl / tokens
        if bonus.current is not None:
            metrics["train/entropy"] = entropy / tokens
            if bonus.target is not None:
                metrics["train/entropy_coefficient"] = bonus.current
        if not empty and not self.skipped_in_a_row:
            bonus.adapt(entropy / tokens)
        if self.grad_norm is not None:
            metrics["train/grad_norm"] = float(self.grad_norm)
        return metrics
