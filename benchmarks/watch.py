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
        self.before: dict[str, torch.Tensor] = {}

    def before_step(self, model: torch.nn.Module) -> None:
        """Gradients are there: every weight that trains has one, and all are finite."""
        with self.gate.excluding(), torch.no_grad():
            grads = [p.grad for _, p in _trained(model)]
            finite = all(g is not None and bool(g.sum().isfinite()) for g in grads)
            self.gate.note(finite=finite)
            # A fresh adapter's A has a gradient of 0, because its B is 0.
            self.before = {n: _part(p).clone() for n, p in _trained(model) if "lora_A" not in n or p.grad.any()}

    def after_step(self, model: torch.nn.Module) -> None:
        """Every weight matrix that trains has moved."""
        with self.gate.excluding(), torch.no_grad():
            pairs = [(self.before[n], _part(p)) for n, p in _trained(model) if n in self.before]
            self.gate.note(moved=bool(pairs) and all(not old.equal(new) for old, new in pairs))


def _trained(model: torch.nn.Module) -> list[tuple[str, Any]]:
    return [(name, p) for name, p in model.named_parameters() if p.requires_grad]


def _part(weight: Any) -> torch.Tensor:
    """Some of a weight: enough to see that it moved."""
    return weight.detach().flatten()[:4096]
