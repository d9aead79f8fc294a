"""Did the step do what it should? Gradients finite, weights moved."""

from typing import Any

import torch

from benchmarks.gate import Gate


class Watch:
    """Checks of an optimiser step, kept out of its time.

    Args:
        gate: Where to say it.
    """

    def __init__(self, gate: Gate) -> None:
        self.gate = gate
        self.before: list[torch.Tensor] = []

    def before_step(self, model: torch.nn.Module) -> None:
        """Gradients are there: every weight has one, and all are finite."""
        with self.gate.excluding(), torch.no_grad():
            grads = [p.grad for p in model.parameters()]
            finite = all(g is not None and bool(g.sum().isfinite()) for g in grads)
            self.gate.note(finite=finite)
            self.before = [_part(p).clone() for p in model.parameters()]

    def after_step(self, model: torch.nn.Module) -> None:
        """Every weight matrix has moved."""
        with self.gate.excluding(), torch.no_grad():
            pairs = zip(self.before, model.parameters(), strict=True)
            self.gate.note(moved=bool(self.before) and all(not old.equal(_part(p)) for old, p in pairs))


def _part(weight: Any) -> torch.Tensor:
    """Some of a weight: enough to see that it moved."""
    return weight.detach().flatten()[:4096]
