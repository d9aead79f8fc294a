"""The coefficient of the entropy bonus over a run: constant, or adapted to hold the entropy at a target."""

from typing import Any

from rlif_lightning.functional.entropy import adapted_coefficient


class EntropyBonus:
    """The coefficient of each optimiser step; see :func:`~rlif_lightning.functional.entropy.adapted_coefficient`.

    Args:
        coefficient: Weight of the mean entropy at the start.
        target: Entropy in nats per token that it is adapted to; None: constant.
    """

    def __init__(self, coefficient: float, target: float | None) -> None:
        self.coefficient, self.target = coefficient, target
        self._is_low = target is None  # below the target at the last step: the bonus acts
        self._is_asked_for = coefficient > 0 or target is not None

    @property
    def current(self) -> float | None:
        """The coefficient in the current step; 0 unless the last one was below its target. None: there is no bonus.

        Whether it is None, and so whether the update takes the entropy of its own distributions, is constant over a
        run.
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
